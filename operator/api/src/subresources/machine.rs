//! Subresources of a VirtualMachine: reads what is there, asks [`super::lifecycle`], writes what it says.

use axum::{
    Json,
    body::Bytes,
    http::{HeaderValue, StatusCode, header::WARNING},
    response::{IntoResponse, Response},
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
    core::NamespaceResourceScope,
};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_runtime::json::Seen;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    FIELD_MANAGER,
    answer::{Failure, Kind},
    lifecycle::{self, Found, RestartOptions, StartOptions, StopOptions},
};
use crate::bodies::VALUES;

/// How often a decision is made anew because what it was made on has changed.
const TRIES: usize = 5;
/// Fields of a machine by which it refers to more of its spec.
const REFERENCES: [&str; 2] = ["spec.instancetype", "spec.preference"];

/// Most fields that are warned of by name.
const WARNINGS: usize = 31;
/// Most bytes of such a name; Kubernetes cuts its warnings there as well (apiserver, pkg/endpoints/filters/warning.go).
const WARNING_BYTES: usize = 256;

/// The machine and its instance.
pub struct Machines {
    machines: Api<VirtualMachine>,
    instances: Api<VirtualMachineInstance>,
    name: String,
}

/// Body of a request as options: JSON or YAML, none is the default. Fields that are not known come back by name.
pub fn options<T: DeserializeOwned + Default>(body: &Bytes) -> Result<(T, Vec<String>), Failure> {
    let mut unknown = Vec::new();
    let text = body.trim_ascii();
    if text.is_empty() || text == b"null" {
        return Ok((T::default(), unknown));
    }
    let text = std::str::from_utf8(text).map_err(|error| unreadable(&error))?;
    let value: Value = serde_saphyr::from_str(text).map_err(|error| unreadable(&error))?;
    let options = serde_ignored::deserialize(value, |path| unknown.push(path.to_string()));
    unknown.retain(|path| !matches!(path.as_str(), "kind" | "apiVersion"));
    Ok((options.map_err(|error| unreadable(&error))?, unknown))
}

fn unreadable(error: &dyn std::fmt::Display) -> Failure {
    Failure::bad_request(format!("Can not unmarshal Request body to struct, error: {error}"))
}

/// An answer without a body, that warns of fields that were left out of account, as Kubernetes does.
pub fn done(code: StatusCode, unknown: &[String]) -> Response {
    warned(code.into_response(), unknown)
}

fn warned(mut response: Response, unknown: &[String]) -> Response {
    let named = unknown.iter().take(WARNINGS).map(|path| {
        let path = &path[..path.floor_char_boundary(WARNING_BYTES)];
        format!("unknown field \\\"{path}\\\"")
    });
    let more = unknown.len().saturating_sub(WARNINGS);
    let more = (more > 0).then(|| format!("{more} more unknown fields"));
    for warning in named.chain(more) {
        if let Ok(warning) = HeaderValue::from_str(&format!("299 - \"{warning}\"")) {
            response.headers_mut().append(WARNING, warning);
        }
    }
    response
}

/// What is asked of a machine.
pub struct Change {
    wanted: Wanted,
    dry_run: bool,
    unknown: Vec<String>,
}

enum Wanted {
    Start(StartOptions),
    Stop(StopOptions),
    Restart(RestartOptions),
}

impl Change {
    /// PUT `start`.
    pub fn start(body: &Bytes) -> Result<Self, Failure> {
        Self::parse(body, |options: &StartOptions| &options.dry_run, Wanted::Start)
    }

    /// PUT `stop`.
    pub fn stop(body: &Bytes) -> Result<Self, Failure> {
        Self::parse(body, |options: &StopOptions| &options.dry_run, Wanted::Stop)
    }

    /// PUT `restart`.
    pub fn restart(body: &Bytes) -> Result<Self, Failure> {
        Self::parse(body, |options: &RestartOptions| &options.dry_run, Wanted::Restart)
    }

    fn parse<T: DeserializeOwned + Default>(
        body: &Bytes,
        dry_run: fn(&T) -> &Option<Vec<String>>,
        wanted: fn(T) -> Wanted,
    ) -> Result<Self, Failure> {
        let (options, unknown) = options::<T>(body)?;
        Ok(Self {
            dry_run: lifecycle::is_dry_run(dry_run(&options).as_deref())?,
            wanted: wanted(options),
            unknown,
        })
    }

    fn decide(&self, found: Found<'_>) -> Result<lifecycle::Change, Failure> {
        match &self.wanted {
            Wanted::Start(options) => lifecycle::start(found, options),
            Wanted::Stop(options) => lifecycle::stop(found, options),
            Wanted::Restart(options) => lifecycle::restart(found, options),
        }
    }
}

/// PUT `expand-vm-spec`: the machine of the body. Nothing that a spec can refer to is supported, so one that refers to
/// something is refused, and any other is whole as it stands.
pub fn expand_given(namespace: &str, body: &Bytes) -> Result<Response, Failure> {
    let text = std::str::from_utf8(body).map_err(|error| unreadable(&error))?;
    if Seen::of(text).values > VALUES {
        return Err(Failure::bad_request(format!(
            "more than {VALUES} values are no machine"
        )));
    }
    let mut object: Value = serde_json::from_str(text).map_err(|error| unreadable(&error))?;
    if !object.is_object() {
        return Err(Failure::invalid("VirtualMachine", &["it is no JSON object".to_owned()]));
    }
    let mut unknown = Vec::new();
    let machine = serde_ignored::deserialize(&object, |path| unknown.push(path.to_string()));
    let machine: VirtualMachine = machine.map_err(|error| Failure::invalid("VirtualMachine", &[error.to_string()]))?;
    unknown.retain(|path| !matches!(path.as_str(), "kind" | "apiVersion"));
    let refers = |path: &&String| REFERENCES.contains(&path.as_str());
    if let Some(reference) = unknown.iter().find(refers) {
        return Err(Failure::bad_request(format!("{reference}: not supported")));
    }
    let theirs = machine.metadata.namespace.filter(|theirs| !theirs.is_empty());
    if theirs.is_some_and(|theirs| theirs != namespace) {
        return Err(Failure::bad_request(format!(
            "VM namespace must be empty or {namespace}"
        )));
    }
    object["metadata"]["namespace"] = namespace.into();
    Ok(warned(Json(object).into_response(), &unknown))
}

/// The API of a kind in a namespace.
pub fn api<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

impl Machines {
    /// Of this name.
    pub fn new(client: &Client, namespace: &str, name: &str) -> Self {
        Self {
            machines: api(client, namespace),
            instances: api(client, namespace),
            name: name.to_owned(),
        }
    }

    /// Decides on what is there and writes it; anew while what is there changes in between.
    pub async fn change(&self, change: Change) -> Result<Response, Failure> {
        let mut tries = 1;
        loop {
            let machine = self.machine().await?;
            let own = self.own(&machine).await?;
            let decided = change.decide(Found {
                machine: &machine,
                instance: own.as_ref(),
            })?;
            match self.write(decided, change.dry_run).await {
                Ok(()) => return Ok(done(StatusCode::ACCEPTED, &change.unknown)),
                Err(kube::Error::Api(answer)) if is_outdated(&answer) && tries < TRIES => tries += 1,
                Err(kube::Error::Api(answer)) if is_outdated(&answer) => {
                    return Err(Failure::conflict(Kind::Machine, &self.name, &answer.message));
                }
                Err(error) => return Err(Failure::internal("writing the change", &error)),
            }
        }
    }

    /// GET `expand-spec`: nothing that a spec can refer to is supported, so that it is whole as it stands.
    pub async fn expand(&self) -> Result<Response, Failure> {
        Ok(Json(self.machine().await?).into_response())
    }

    /// The instance that a request to the machine is passed on to.
    pub async fn instance(&self) -> Result<VirtualMachineInstance, Failure> {
        let machine = self.machine().await?;
        let own = self.own(&machine).await?;
        own.ok_or_else(|| Failure::conflict(Kind::Machine, &self.name, "VMI is not started"))
    }

    /// The machine's own instance. One of the name that is another's is none of its affairs: who may do something to the
    /// machine may not therefore do it to that one.
    async fn own(&self, machine: &VirtualMachine) -> Result<Option<VirtualMachineInstance>, Failure> {
        let found = self.instances.get_opt(&self.name).await;
        let found = found.map_err(|error| Failure::internal("reading the instance", &error))?;
        Ok(found.filter(|instance| owns(machine, instance)))
    }

    async fn machine(&self) -> Result<VirtualMachine, Failure> {
        let found = self.machines.get_opt(&self.name).await;
        found
            .map_err(|error| Failure::internal("reading the machine", &error))?
            .ok_or_else(|| Failure::not_found(Kind::Machine, &self.name))
    }

    async fn write(&self, change: lifecycle::Change, dry_run: bool) -> Result<(), kube::Error> {
        let params = PatchParams {
            dry_run,
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        if let Some(patch) = change.machine {
            self.machines.patch(&self.name, &params, &json_patch(patch)?).await?;
        }
        if let Some(patch) = change.status {
            self.machines
                .patch_status(&self.name, &params, &json_patch(patch)?)
                .await?;
        }
        if let Some(patch) = change.instance {
            match self.instances.patch(&self.name, &params, &json_patch(patch)?).await {
                // It is gone already, or another has taken its place.
                Err(kube::Error::Api(answer)) if answer.code == 404 || is_outdated(&answer) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }
}

fn owns(machine: &VirtualMachine, instance: &VirtualMachineInstance) -> bool {
    let owners = instance.metadata.owner_references.iter().flatten();
    let uid = machine.metadata.uid.as_ref();
    owners
        .into_iter()
        .any(|owner| owner.controller == Some(true) && Some(&owner.uid) == uid)
}

fn json_patch(patch: Value) -> Result<Patch<()>, kube::Error> {
    serde_json::from_value(patch)
        .map(Patch::Json)
        .map_err(kube::Error::SerdeError)
}

/// Whether a write came too late: a conflict, or a JSON patch whose test failed. The API server tells that one by 422 and
/// nothing else; an object that is invalid has causes.
fn is_outdated(answer: &kube::core::Status) -> bool {
    let causes = answer.details.as_ref().map_or(0, |details| details.causes.len());
    answer.code == 409 || (answer.code == 422 && causes == 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn machine_given_is_not_warned_of_without_end() {
        let warnings = |unknown: &[String]| {
            let answer = warned(StatusCode::OK.into_response(), unknown);
            let warnings = answer.headers().get_all(WARNING).into_iter();
            warnings
                .map(|warning| warning.to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(warnings(&vec!["x".to_owned(); 31]).len(), 31);
        let many = warnings(&vec!["x".to_owned(); 50_000]);
        assert_eq!(many.len(), 32);
        assert_eq!(many[31], "299 - \"49969 more unknown fields\"");
        assert!(warnings(&["x".repeat(10_000)])[0].len() < 300);
    }

    #[test]
    fn machine_given_has_few_values_in_much_text() {
        let given = |text: &str, items: Value| {
            let annotations = json!({"a": text});
            let spec = json!({"template": {"spec": {"domain": {"devices": {}}}}});
            let object = json!({"metadata": {"annotations": annotations}, "spec": spec, "x": items});
            expand_given("ns", &Bytes::from(object.to_string()))
        };
        assert!(given(&r#"{"\\,["#.repeat(50_000), json!([])).is_ok());
        let refused = given("", json!(vec![json!({"": 0}); VALUES / 2])).unwrap_err();
        assert_eq!(refused.message, "more than 16384 values are no machine");
    }

    #[test]
    fn machine_given_is_answered_whole_or_refused() {
        let given = |object: Value| expand_given("ns", &Bytes::from(object.to_string()));
        let spec = json!({"runStrategy": "Always", "template": {"spec": {"domain": {"devices": {}}}}});
        let mut object = json!({"kind": "VirtualMachine", "metadata": {"name": "vm"}, "spec": spec, "other": 1});
        let answer = given(object.clone()).unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()[WARNING], "299 - \"unknown field \\\"other\\\"\"");
        object["metadata"]["namespace"] = json!("ns");
        assert!(given(object.clone()).is_ok());
        object["metadata"]["namespace"] = json!("another");
        let elsewhere = given(object.clone()).unwrap_err();
        assert_eq!(elsewhere.message, "VM namespace must be empty or ns");
        object["metadata"]["namespace"] = json!("");
        object["spec"]["instancetype"] = json!({"name": "large"});
        let refers = given(object.clone()).unwrap_err();
        assert_eq!(
            (refers.code, refers.message.as_str()),
            (StatusCode::BAD_REQUEST, "spec.instancetype: not supported")
        );
        object["spec"] = json!({"template": 1});
        let invalid = given(object).unwrap_err().status();
        assert_eq!(invalid["message"], "Object is not a valid VirtualMachine");
        assert!(invalid["details"]["causes"][0]["message"].is_string());
        for unreadable in ["", "[", "{"] {
            let refused = expand_given("ns", &Bytes::from(unreadable)).unwrap_err();
            assert!(refused.message.starts_with("Can not unmarshal"), "{}", refused.message);
        }
        assert_eq!(given(json!([])).unwrap_err().code, StatusCode::BAD_REQUEST);
    }
}
