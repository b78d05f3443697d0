//! What runs inside a tenant beside its nodes' programs: access rules, flannel, CoreDNS. Their images are preloaded in
//! the node image; nothing is pulled. Applies nothing itself.

use std::net::Ipv4Addr;

use kube::core::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use serde_json::{Value, json};

use super::{
    flags::CLUSTER_DOMAIN,
    network::API_PORT,
    pki::{ADMIN_GROUP, BOOTSTRAP_GROUP, KUBELET_CLIENT},
};
use crate::tenantcluster::validate::Validated;

/// Namespace of the add-ons.
pub const NAMESPACE: &str = "kube-system";
/// CoreDNS' Deployment, whose availability decides whether the add-ons are ready.
pub const COREDNS: &str = "coredns";
/// As the node image names them.
const FLANNEL_IMAGE: &str = "localhost/kubernest-flannel:v0.28.4";
const COREDNS_IMAGE: &str = "localhost/kubernest-coredns:v1.13.2";
/// VXLAN port of the tenant's pod network; Linux' default, as flannel has it.
const FLANNEL_PORT: u16 = 8472;

/// An add-on object that is malformed here, at build time.
#[derive(Debug, thiserror::Error)]
#[error("the add-on object {name} can't be built")]
pub struct AddonError {
    name: String,
    #[source]
    source: serde_json::Error,
}

/// An object with the resource it is applied to.
pub type Addon = (ApiResource, DynamicObject);

/// Every add-on in the order of application: access rules first, since kubelets wait for them.
pub fn all(valid: &Validated, control_plane_ip: Ipv4Addr) -> Result<Vec<Addon>, AddonError> {
    let mut values = access();
    values.extend(flannel(valid, control_plane_ip));
    values.extend(coredns(valid));
    values.into_iter().map(object).collect()
}

fn object(value: Value) -> Result<Addon, AddonError> {
    let name = format!("{} {}", value["kind"], value["metadata"]["name"]);
    let object: DynamicObject = serde_json::from_value(value).map_err(|source| AddonError { name, source })?;
    let types = object.types.clone().unwrap_or(TypeMeta {
        api_version: String::new(),
        kind: String::new(),
    });
    let (group, version) = types.api_version.split_once('/').unwrap_or(("", &types.api_version));
    Ok((
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &types.kind)),
        object,
    ))
}

fn binding(name: &str, role: &str, subject_kind: &str, subject: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": subject_kind, "name": subject}],
    })
}

/// Roles are Kubernetes' own; without the last, `kubectl exec` and `logs` are forbidden to the API server.
fn access() -> Vec<Value> {
    vec![
        binding(
            "kubernest:node-bootstrappers",
            "system:node-bootstrapper",
            "Group",
            BOOTSTRAP_GROUP,
        ),
        binding("kubernest:cluster-admins", "cluster-admin", "Group", ADMIN_GROUP),
        binding(
            "kubernest:kubelet-api-admin",
            "system:kubelet-api-admin",
            "User",
            KUBELET_CLIENT,
        ),
    ]
}

fn account(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": NAMESPACE}})
}

fn role(name: &str, rules: Value) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": name},
        "rules": rules,
    })
}

fn account_binding(name: &str, role: &str, account: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
    })
}

fn flannel(valid: &Validated, control_plane_ip: Ipv4Addr) -> Vec<Value> {
    let net_conf = json!({
        "Network": valid.pod_cidr.to_string(),
        "EnableNFTables": true,
        "Backend": {"Type": "vxlan", "Port": FLANNEL_PORT},
    });
    let environment = json!([
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        // Past kube-proxy, so that the pod network does not wait for Services.
        {"name": "KUBERNETES_SERVICE_HOST", "value": control_plane_ip.to_string()},
        {"name": "KUBERNETES_SERVICE_PORT", "value": API_PORT.to_string()},
    ]);
    let container = json!({
        "name": "flannel",
        "image": FLANNEL_IMAGE,
        "imagePullPolicy": "Never",
        "command": ["/opt/bin/flanneld"],
        "args": ["--ip-masq", "--kube-subnet-mgr", "--iface=eth1"],
        "env": environment,
        "resources": {"requests": {"cpu": "50m", "memory": "40Mi"}},
        "securityContext": {
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
        },
        "volumeMounts": [
            {"name": "run", "mountPath": "/run/flannel"},
            {"name": "config", "mountPath": "/etc/kube-flannel"},
            {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
        ],
    });
    vec![
        account("flannel"),
        role(
            "flannel",
            json!([
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            ]),
        ),
        account_binding("flannel", "flannel", "flannel"),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "flannel", "namespace": NAMESPACE},
            "data": {"net-conf.json": net_conf.to_string()},
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": "flannel", "namespace": NAMESPACE, "labels": {"app.kubernetes.io/name": "flannel"}},
            "spec": {
                "selector": {"matchLabels": {"app.kubernetes.io/name": "flannel"}},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
                "template": {
                    "metadata": {"labels": {"app.kubernetes.io/name": "flannel"}},
                    "spec": {
                        "hostNetwork": true,
                        "priorityClassName": "system-node-critical",
                        "serviceAccountName": "flannel",
                        "tolerations": [{"operator": "Exists"}],
                        "containers": [container],
                        "volumes": [
                            {"name": "run", "hostPath": {"path": "/run/flannel", "type": "DirectoryOrCreate"}},
                            {"name": "config", "configMap": {"name": "flannel"}},
                            {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
                        ],
                    },
                },
            },
        }),
    ]
}

fn coredns(valid: &Validated) -> Vec<Value> {
    let corefile = format!(
        ".:53 {{\n    errors\n    health {{\n        lameduck 5s\n    }}\n    ready\n    \
         kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{\n        pods insecure\n        \
         fallthrough in-addr.arpa ip6.arpa\n        ttl 30\n    }}\n    prometheus :9153\n    \
         forward . /etc/resolv.conf {{\n        max_concurrent 1000\n    }}\n    cache 30\n    loop\n    reload\n    \
         loadbalance\n}}\n"
    );
    let labels = json!({"k8s-app": "kube-dns", "app.kubernetes.io/name": COREDNS});
    let container = json!({
        "name": COREDNS,
        "image": COREDNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "ports": [
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
            {"name": "metrics", "containerPort": 9153, "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "50m", "memory": "40Mi"}, "limits": {"memory": "170Mi"}},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {
            "httpGet": {"path": "/health", "port": 8080},
            "initialDelaySeconds": 60, "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 5,
        },
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
        },
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns", "readOnly": true}],
    });
    let prefer_workers = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
        "weight": 100,
        "preference": {"matchExpressions": [
            {"key": "node-role.kubernetes.io/control-plane", "operator": "DoesNotExist"},
        ]},
    }]}});
    vec![
        account(COREDNS),
        role(
            "system:coredns",
            json!([
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ]),
        ),
        account_binding("system:coredns", "system:coredns", COREDNS),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": COREDNS, "namespace": NAMESPACE},
            "data": {"Corefile": corefile},
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": COREDNS, "namespace": NAMESPACE, "labels": labels.clone()},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": {"k8s-app": "kube-dns"}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
                "template": {
                    "metadata": {"labels": labels.clone()},
                    "spec": {
                        "priorityClassName": "system-cluster-critical",
                        "serviceAccountName": COREDNS,
                        "dnsPolicy": "Default",
                        "affinity": prefer_workers,
                        "tolerations": [
                            {"key": "CriticalAddonsOnly", "operator": "Exists"},
                            {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"},
                        ],
                        "containers": [container],
                        "volumes": [{"name": "config", "configMap": {"name": COREDNS}}],
                    },
                },
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "kube-dns", "namespace": NAMESPACE,
                "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
            },
            "spec": {
                "clusterIP": valid.service_ip(10).to_string(),
                "selector": {"k8s-app": "kube-dns"},
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
                    {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
                ],
            },
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenantcluster::validate::{
        tests::{cluster, options},
        validate,
    };

    #[test]
    fn plan_addons_apply_access_rules_first() {
        let valid = validate(&cluster(json!({"version": "v1.35.4"})), &options()).unwrap();
        let all = all(&valid, "100.64.0.10".parse().unwrap()).unwrap();
        let names: Vec<_> = all
            .iter()
            .map(|(kind, object)| format!("{} {}", kind.plural, object.metadata.name.as_deref().unwrap()))
            .collect();
        assert_eq!(names[0], "clusterrolebindings kubernest:node-bootstrappers");
        assert!(names.contains(&"daemonsets flannel".to_owned()), "{names:?}");
        let objects: Vec<_> = all.into_iter().map(|(_, object)| object).collect();
        insta::assert_yaml_snapshot!(objects);
    }
}
