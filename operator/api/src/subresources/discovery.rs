//! What clients ask before anything else: groups, resources, OpenAPI, version. Open to everybody, as upstream.
//!
//! Without the resource list kubectl finds no short name of any group, and `virtctl version` nothing to compare with.

use serde_json::{Map, Value, json};

use super::resources::{ALL, GROUP, INSTANCES, MACHINES, Subresource, VERSIONS};

/// The version of KubeVirt that the API behaves like; virtctl compares major and minor with its own.
const COMPATIBLE: &str = "v1.9.0";

/// `/apis`.
pub fn groups() -> Value {
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group()]})
}

/// `/apis/<group>`.
pub fn group() -> Value {
    let version = |version: &str| json!({"groupVersion": format!("{GROUP}/{version}"), "version": version});
    json!({
        "kind": "APIGroup", "apiVersion": "v1", "name": GROUP,
        "versions": VERSIONS.map(version),
        "preferredVersion": version(VERSIONS[0]),
    })
}

/// `/apis/<group>/<version>`.
pub fn resources(version: &str) -> Value {
    let resource = |row: &Subresource| {
        json!({
            "name": row.full_name(), "singularName": "", "namespaced": true,
            "kind": row.kind(), "verbs": [row.verb()],
        })
    };
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": format!("{GROUP}/{version}"),
        "resources": ALL.iter().map(resource).collect::<Vec<_>>(),
    })
}

/// Root paths, as `kubectl get --raw /` shows them.
pub fn paths() -> Value {
    let mut paths = vec!["/apis".to_owned(), format!("/apis/{GROUP}")];
    paths.extend(VERSIONS.map(|version| format!("/apis/{GROUP}/{version}")));
    paths.extend(["/healthz", "/openapi/v2", "/openapi/v3"].map(str::to_owned));
    json!({"paths": paths})
}

/// `…/version`, in the shape of apimachinery's `version.Info`.
pub fn version() -> Value {
    let (major, minor) = COMPATIBLE
        .trim_start_matches('v')
        .split_once('.')
        .map(|(major, rest)| (major, rest.split('.').next().unwrap_or_default()))
        .unwrap_or_default();
    json!({
        "major": major, "minor": minor,
        "gitVersion": format!("{COMPATIBLE}+kubernest.{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "",
        "goVersion": "none (Rust)", "compiler": "rustc",
        "platform": format!("linux/{}", if cfg!(target_arch = "x86_64") { "amd64" } else { std::env::consts::ARCH }),
    })
}

/// `/openapi/v2`.
pub fn openapi_v2() -> Value {
    let mut all = Map::new();
    for version in VERSIONS {
        for row in &ALL {
            all.extend(operations(version, row, false));
        }
    }
    json!({"swagger": "2.0", "info": info(), "paths": all})
}

/// `/openapi/v3`: which documents there are.
pub fn openapi_v3() -> Value {
    let entry = |version: &str| {
        let path = format!("apis/{GROUP}/{version}");
        let url = format!("/openapi/v3/{path}");
        (path, json!({"serverRelativeURL": url}))
    };
    let paths: Map<String, Value> = VERSIONS.into_iter().map(entry).collect();
    json!({"paths": paths})
}

/// `/openapi/v3/apis/<group>/<version>`.
pub fn openapi_v3_of(version: &str) -> Value {
    let paths: Map<String, Value> = ALL.iter().flat_map(|row| operations(version, row, true)).collect();
    json!({"openapi": "3.0.0", "info": info(), "paths": paths})
}

fn info() -> Value {
    json!({"title": "Kubernest: subresources of KubeVirt's API", "version": env!("CARGO_PKG_VERSION")})
}

/// The paths of a row with their operation.
fn operations(version: &str, row: &Subresource, v3: bool) -> Vec<(String, Value)> {
    let parameter = |name: &str| {
        let mut parameter = json!({"name": name, "in": "path", "required": true});
        if v3 {
            parameter["schema"] = json!({"type": "string"});
        } else {
            parameter["type"] = json!("string");
        }
        parameter
    };
    let tails: &[&str] = match row.name {
        "portforward" => &["/{port}", "/{port}/{protocol}"],
        _ => &[""],
    };
    let operation = |tail: &&str| {
        let path = format!("/apis/{GROUP}/{version}/namespaces/{{namespace}}/{}{tail}", row.path());
        let names = path
            .split('{')
            .skip(1)
            .filter_map(|rest| rest.split_once('}').map(|(name, _)| name));
        let parameters: Vec<Value> = names.map(parameter).collect();
        let id = match row.parent {
            MACHINES => format!("{version}vm-{}{tail}", row.name),
            INSTANCES => format!("{version}vmi-{}{tail}", row.name),
            parent => format!("{version}-{parent}"),
        };
        let id = id.replace(['/', '{', '}'], "-");
        let code = if row.changes() && row.parent == MACHINES {
            "202"
        } else {
            "200"
        };
        let operation = json!({
            "operationId": id, "summary": row.summary, "parameters": parameters,
            "responses": {code: {"description": "OK"}, "401": {"description": "Unauthorized"}},
        });
        (path, json!({row.method(): operation}))
    };
    tails.iter().map(operation).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discovery_lists_every_subresource() {
        let list = resources("v1");
        let names: Vec<_> = list["resources"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["name"].as_str().unwrap())
            .collect();
        assert!(names.contains(&"virtualmachineinstances/console") && names.contains(&"virtualmachines/start"));
        assert!(names.contains(&"expand-vm-spec"));
        assert_eq!(group()["preferredVersion"]["version"], "v1");
        let v2 = openapi_v2();
        let put = &v2["paths"]["/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{name}/start"];
        assert_eq!(put["put"]["parameters"].as_array().unwrap().len(), 2);
        let given = &v2["paths"]["/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/expand-vm-spec"]["put"];
        assert_eq!(given["parameters"].as_array().unwrap().len(), 1);
        let v3 = openapi_v3_of("v1alpha3");
        assert!(
            v3["paths"]
                .as_object()
                .unwrap()
                .keys()
                .all(|path| path.contains("/v1alpha3/"))
        );
    }

    #[test]
    fn discovery_tells_virtctl_a_semantic_version() {
        let version = version();
        assert_eq!(
            (version["major"].as_str(), version["minor"].as_str()),
            (Some("1"), Some("9"))
        );
        assert!(version["gitVersion"].as_str().unwrap().starts_with("v1.9.0+"));
    }
}
