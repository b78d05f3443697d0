//! A real API server with kubernest-api behind it.

#![allow(dead_code, reason = "no test uses all of it")]

pub mod launcher;

use std::{ffi::OsStr, path::Path, time::Duration};

use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_integration::{ControlPlane, Process, free_port, install_crds, wait_until};
use serde_json::{Value, json};

pub const LIMIT: Duration = Duration::from_secs(30);
pub const BASE: &str = "/apis/subresources.kubevirt.io/v1";

/// An API server that has one replica of kubernest-api behind it.
pub struct Setup {
    pub api: Process,
    pub port: u16,
    pub client: Client,
    pub plane: ControlPlane,
}

impl Setup {
    pub async fn start() -> Self {
        let plane = ControlPlane::start().await.unwrap();
        let client = plane.client().await.unwrap();
        install_crds(&client).await.unwrap();
        for name in ["kubernest-system", "org-acme"] {
            create::<Namespace>(&client, None, json!({"metadata": {"name": name}})).await;
        }
        let (port, metrics) = (free_port().unwrap(), free_port().unwrap());
        // The API server reaches it by name: no proxy makes Services work here.
        let service = json!({"metadata": {"name": "kubernest-api"}, "spec": {
            "type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}],
        }});
        create::<Service>(&client, Some("kubernest-system"), service).await;
        for version in ["v1", "v1alpha3"] {
            let api_service = json!({"metadata": {"name": format!("{version}.subresources.kubevirt.io")}, "spec": {
                "group": "subresources.kubevirt.io", "version": version, "groupPriorityMinimum": 1000, "versionPriority": 15,
                "service": {"name": "kubernest-api", "namespace": "kubernest-system", "port": port},
            }});
            create::<APIService>(&client, None, api_service).await;
        }
        create::<k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration>(
            &client,
            None,
            json!({"metadata": {"name": "kubernest"}, "webhooks": []}),
        )
        .await;
        let arguments = [
            format!("--addr=127.0.0.1:{port}"),
            format!("--metrics-addr=127.0.0.1:{metrics}"),
            "--san=127.0.0.1".to_owned(),
            "--log-format=text".to_owned(),
        ];
        let kubeconfig = plane.kubeconfig();
        let environment: [(&str, &OsStr); 1] = [("KUBECONFIG", kubeconfig.as_os_str())];
        let program = Path::new(env!("CARGO_BIN_EXE_kubernest-api"));
        let log = plane.directory().join("api.log");
        let api = Process::start(program, arguments, &environment, &log).unwrap();
        let setup = Self {
            api,
            port,
            client,
            plane,
        };
        // Not the condition Available: the API server's proxy learns of it a moment later.
        let available = wait_until(LIMIT, || async {
            let alpha = BASE.replace("v1", "v1alpha3");
            let (code, _) = setup.ask("GET", BASE, None, Value::Null).await;
            let (alpha, _) = setup.ask("GET", &alpha, None, Value::Null).await;
            (code, alpha) == (200, 200)
        });
        assert!(
            available.await,
            "not available; kubernest-api said\n{}",
            setup.api.tail(20)
        );
        setup
    }

    /// A request through the API server, as `user` if one is named: code and body.
    pub async fn ask(&self, method: &str, path: &str, user: Option<&str>, body: Value) -> (u16, Value) {
        let mut request = http::Request::builder().method(method).uri(path);
        if let Some(user) = user {
            request = request.header("impersonate-user", user);
        }
        let body = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let request = request.body(kube::client::Body::from(body)).unwrap();
        let response = self.client.send(request).await.unwrap();
        let code = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    pub async fn put(&self, resource: &str, verb: &str, body: Value) -> (u16, String) {
        let path = format!("{BASE}/namespaces/org-acme/{resource}/{verb}");
        let (code, answer) = self.ask("PUT", &path, None, body).await;
        (code, answer["message"].as_str().unwrap_or_default().to_owned())
    }

    pub fn api<K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), "org-acme")
    }

    pub async fn machine(&self, name: &str, strategy: &str) {
        let machine = json!({
            "metadata": {"name": name},
            "spec": {"runStrategy": strategy, "template": {"spec": {"domain": {"devices": {}}}}},
        });
        create::<VirtualMachine>(&self.client, Some("org-acme"), machine).await;
    }

    /// An instance that the API takes for one in this state; of the machine of its name, if there is one.
    pub async fn instance(&self, name: &str, status: Value) -> String {
        let machine = self.api::<VirtualMachine>().get_opt(name).await.unwrap();
        let owner = machine.map(|machine| {
            json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": name, "controller": true,
                "uid": machine.metadata.uid,
            })
        });
        let owners: Vec<Value> = owner.into_iter().collect();
        let instance = json!({
            "metadata": {"name": name, "ownerReferences": owners},
            "spec": {"domain": {"devices": {}}},
        });
        let instance = create::<VirtualMachineInstance>(&self.client, Some("org-acme"), instance).await;
        let params = PatchParams::default();
        let status = Patch::Merge(json!({"status": status}));
        self.api::<VirtualMachineInstance>()
            .patch_status(name, &params, &status)
            .await
            .unwrap();
        instance.metadata.uid.unwrap()
    }
}

pub async fn create<K>(client: &Client, namespace: Option<&str>, object: Value) -> K
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + serde::Serialize,
{
    let kind = kube::api::ApiResource::erase::<K>(&());
    let api: Api<kube::api::DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    };
    let mut object = object;
    object["apiVersion"] = json!(kind.api_version);
    object["kind"] = json!(kind.kind);
    let object = serde_json::from_value(object).unwrap();
    let created = api.create(&PostParams::default(), &object).await.unwrap();
    created.try_parse().unwrap()
}
