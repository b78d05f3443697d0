//! Configuration files of a tenant's API server and kubelet that are the same for all tenants: audit, authentication,
//! encryption at rest, cipher suites. CIS Kubernetes Benchmark numbers stand beside what they ask for.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

/// Cipher suites for TLS 1.2 with ECDSA keys; TLS 1.3's are not configurable (CIS 1.2.29, 4.2.12).
pub const CIPHER_SUITES: [&str; 3] = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// Anonymous requests reach the health endpoints only (CIS 1.2.1; KEP-4633).
pub fn authentication() -> Value {
    json!({
        "apiVersion": "apiserver.config.k8s.io/v1beta1",
        "kind": "AuthenticationConfiguration",
        "anonymous": {
            "enabled": true,
            "conditions": [{"path": "/livez"}, {"path": "/readyz"}, {"path": "/healthz"}],
        },
    })
}

/// Secrets are encrypted in etcd (CIS 1.2.27, 1.2.28); `key` has 32 bytes.
pub fn encryption(key: &[u8]) -> Value {
    json!({
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "EncryptionConfiguration",
        "resources": [{
            "resources": ["secrets"],
            "providers": [
                {"secretbox": {"keys": [{"name": "key1", "secret": STANDARD.encode(key)}]}},
                {"identity": {}},
            ],
        }],
    })
}

/// Who changed what, and who read Secrets; not the control plane's own chatter, nor any Secret's content (CIS 3.2).
pub fn audit() -> Value {
    let silent_users = [
        "system:kube-controller-manager",
        "system:kube-scheduler",
        "system:kube-proxy",
        "system:apiserver",
    ];
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi*"]},
            {"level": "None", "users": silent_users, "verbs": ["get", "list", "watch"]},
            {"level": "None", "userGroups": ["system:nodes"], "verbs": ["get", "list", "watch"]},
            {"level": "None", "resources": [
                {"group": "coordination.k8s.io", "resources": ["leases"]},
                {"group": "", "resources": ["events", "nodes/status", "pods/status"]},
                {"group": "events.k8s.io", "resources": ["events"]},
                {"group": "discovery.k8s.io", "resources": ["endpointslices"]},
            ]},
            {"level": "Metadata", "resources": [
                {"group": "", "resources": ["secrets", "configmaps", "serviceaccounts/token"]},
                {"group": "authentication.k8s.io", "resources": ["tokenreviews"]},
            ]},
            {"level": "Metadata", "resources": [
                {"group": "", "resources": ["pods/exec", "pods/attach", "pods/portforward", "pods/proxy", "services/proxy"]},
            ]},
            {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
            {"level": "None"},
        ],
    })
}
