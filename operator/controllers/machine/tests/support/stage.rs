//! A namespace with the machine controllers at work in it, and what stories ask of it.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod, Secret, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Config};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_integration::{ControlPlane, install_crds};
use kubernest_machine::{Emulation, Options};
use kubernest_runtime::{CancellationToken, Metrics};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::gate::Gate;
use super::kubelet::Kubelet;

/// No state takes longer to come about.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Who the controllers are; what they may do is `rbac.yaml`, and in [`SYSTEM`] what the chart's Role says.
const USER: &str = "kubernest-machine";
/// Where Kubernest runs.
pub const SYSTEM: &str = "kubernest-system";

/// The API server, with CRDs and the controllers' rights.
pub struct Theatre {
    plane: ControlPlane,
}

impl Theatre {
    pub async fn open() -> Self {
        let plane = ControlPlane::start().await.unwrap();
        let client = plane.client().await.unwrap();
        install_crds(&client).await.unwrap();
        let rules: Vec<PolicyRule> = serde_saphyr::from_str(include_str!("../../rbac.yaml")).unwrap();
        let metadata = ObjectMeta {
            name: Some(USER.to_owned()),
            ..ObjectMeta::default()
        };
        let role = ClusterRole {
            metadata,
            rules: Some(rules),
            aggregation_rule: None,
        };
        Api::all(client.clone())
            .create(&PostParams::default(), &role)
            .await
            .unwrap();
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
        }))
        .unwrap();
        Api::all(client.clone())
            .create(&PostParams::default(), &binding)
            .await
            .unwrap();
        grant_system_rights(&client).await;
        Self { plane }
    }

    /// The administrator's client.
    pub async fn client(&self) -> Client {
        self.plane.client().await.unwrap()
    }

    /// How the controllers reach the API server: as themselves.
    pub async fn controllers_config(&self) -> Config {
        let kubeconfig = Kubeconfig::read_from(self.plane.kubeconfig()).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        config.auth_info.impersonate = Some(USER.to_owned());
        config
    }
}

/// What the chart's Role grants in the system namespace.
async fn grant_system_rights(client: &Client) {
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": SYSTEM}})).unwrap();
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
    let role: Role = serde_json::from_value(json!({"metadata": {"name": USER}, "rules": [
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"],
         "resourceNames": ["kubernest-launcher-ca", "kubernest-launcher-client"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["update"], "resourceNames": ["kubernest-launcher-client"]},
    ]}))
    .unwrap();
    Api::namespaced(client.clone(), SYSTEM)
        .create(&PostParams::default(), &role)
        .await
        .unwrap();
    let binding: RoleBinding = serde_json::from_value(json!({
        "metadata": {"name": USER},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": USER},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
    }))
    .unwrap();
    Api::namespaced(client.clone(), SYSTEM)
        .create(&PostParams::default(), &binding)
        .await
        .unwrap();
}

/// A client whose writes go through the gate.
pub fn gated(config: &Config, gate: &Gate) -> Client {
    ClientBuilder::try_from(config.clone())
        .unwrap()
        .with_layer(gate)
        .build()
}

/// A namespace with controllers at work in it.
pub struct Stage {
    pub client: Client,
    pub namespace: String,
    pub kubelet: Option<Kubelet>,
    pub controllers: Controllers,
}

/// The controllers of one operator process, which dies when dropped.
pub struct Controllers(JoinHandle<()>);

impl Controllers {
    pub fn start(client: Client) -> Self {
        let options = Options {
            launcher_image: "launcher@sha256:1".to_owned(),
            emulation: Emulation::Auto,
        };
        Self(tokio::spawn(kubernest_machine::run(
            client,
            SYSTEM,
            options,
            Metrics::new(),
            CancellationToken::new(),
        )))
    }
}

impl Controllers {
    pub fn kill(&self) {
        self.0.abort();
    }
}

impl Drop for Controllers {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Stage {
    pub async fn set(theatre: &Theatre, namespace: &str) -> Self {
        let mut stage = Self::without_kubelet(theatre, namespace).await;
        stage.kubelet = Some(Kubelet::start(&stage.client, namespace).await);
        stage
    }

    pub async fn without_kubelet(theatre: &Theatre, namespace: &str) -> Self {
        let controllers = Controllers::start(gated(&theatre.controllers_config().await, &Gate::new(None)));
        Self::with_controllers(theatre, namespace, controllers).await
    }

    pub async fn with_controllers(theatre: &Theatre, namespace: &str, controllers: Controllers) -> Self {
        let client = theatre.client().await;
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let object: Namespace =
            serde_json::from_value(json!({"metadata": {"name": namespace, "labels": labels}})).unwrap();
        Api::all(client.clone())
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        // The controller manager would make it.
        let account: ServiceAccount = serde_json::from_value(json!({"metadata": {"name": "default"}})).unwrap();
        Api::namespaced(client.clone(), namespace)
            .create(&PostParams::default(), &account)
            .await
            .unwrap();
        Self {
            client,
            namespace: namespace.to_owned(),
            kubelet: None,
            controllers,
        }
    }

    pub fn machines(&self) -> Api<VirtualMachine> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn instances(&self) -> Api<VirtualMachineInstance> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn create(&self, machine: Value) -> VirtualMachine {
        self.machines()
            .create(&PostParams::default(), &serde_json::from_value(machine).unwrap())
            .await
            .unwrap()
    }

    pub async fn change(&self, change: Value) {
        self.machines()
            .patch("vm", &PatchParams::default(), &Patch::Merge(change))
            .await
            .unwrap();
    }

    pub fn secrets(&self, namespace: &str) -> Api<Secret> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Asks as `kubernest-api` does: a JSON patch of the machine's status, by another field manager.
    pub async fn ask(&self, requests: Value) {
        let patch = json!([{"op": "add", "path": "/status/stateChangeRequests", "value": requests}]);
        let patch = Patch::<()>::Json(serde_json::from_value(patch).unwrap());
        self.machines()
            .patch_status("vm", &PatchParams::default(), &patch)
            .await
            .unwrap();
    }

    pub async fn instance_when(
        &self,
        what: &str,
        holds: impl Fn(&VirtualMachineInstance) -> bool,
    ) -> VirtualMachineInstance {
        let wait = await_condition(self.instances(), "vm", |instance: Option<&VirtualMachineInstance>| {
            instance.is_some_and(&holds)
        });
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found.unwrap().unwrap(),
            Err(_) => panic!(
                "{}: no {what}: {:#?}",
                self.namespace,
                self.instances().get_opt("vm").await.unwrap()
            ),
        }
    }

    pub async fn machine_when(&self, what: &str, holds: impl Fn(&VirtualMachine) -> bool) -> VirtualMachine {
        let wait = await_condition(self.machines(), "vm", |machine: Option<&VirtualMachine>| {
            machine.is_some_and(&holds)
        });
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found.unwrap().unwrap(),
            Err(_) => panic!(
                "{}: no {what}: {:#?}",
                self.namespace,
                self.machines().get_opt("vm").await.unwrap()
            ),
        }
    }

    pub async fn running(&self) -> VirtualMachine {
        self.machine_when("running machine", |machine| {
            printable(machine) == "Running" && ready(machine)
        })
        .await
    }

    pub async fn machine_gone(&self) {
        let wait = await_condition(self.machines(), "vm", |machine: Option<&VirtualMachine>| {
            machine.is_none()
        });
        tokio::time::timeout(PATIENCE, wait)
            .await
            .expect("the machine goes")
            .unwrap();
    }

    pub async fn instance(&self) -> VirtualMachineInstance {
        self.instances().get("vm").await.unwrap()
    }

    pub async fn pod(&self) -> Pod {
        let mut pods = self.pods().list(&ListParams::default()).await.unwrap().items;
        assert_eq!(pods.len(), 1, "one pod");
        pods.remove(0)
    }

    pub async fn assert_nothing_left(&self) {
        assert!(
            self.machines()
                .list(&ListParams::default())
                .await
                .unwrap()
                .items
                .is_empty(),
            "machines"
        );
        assert!(
            self.instances()
                .list(&ListParams::default())
                .await
                .unwrap()
                .items
                .is_empty(),
            "instances"
        );
        assert!(
            self.pods().list(&ListParams::default()).await.unwrap().items.is_empty(),
            "pods"
        );
    }

    /// Waits until the controllers' watches are open, so that what follows measures them and not their start.
    pub async fn controllers_listen(&self) {
        let mut machine = machine();
        machine["spec"]["runStrategy"] = json!("Halted");
        self.create(machine).await;
        self.machine_when("listening controllers", |machine| printable(machine) == "Stopped")
            .await;
        self.machines().delete("vm", &DeleteParams::default()).await.unwrap();
        self.machine_gone().await;
    }
}

/// What `kubectl get vm` shows.
pub fn printable(machine: &VirtualMachine) -> &str {
    machine
        .status
        .as_ref()
        .and_then(|status| status.printable_status.as_deref())
        .unwrap_or_default()
}

/// Whether the machine's status says so.
pub fn ready(machine: &VirtualMachine) -> bool {
    machine.status.as_ref().is_some_and(|status| status.ready)
}

/// A small machine that always runs.
pub fn machine() -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine",
        "metadata": {"name": "vm"},
        "spec": {"runStrategy": "Always", "template": {
            "metadata": {"labels": {"kubernest.io/slot": "vm"}},
            "spec": {
                "terminationGracePeriodSeconds": 5,
                "domain": {
                    "cpu": {"cores": 2},
                    "memory": {"guest": "512Mi"},
                    "devices": {"disks": [{"name": "os", "disk": {"bus": "virtio"}}]},
                },
                "volumes": [{"name": "os", "containerDisk": {"image": "localhost/node@sha256:1"}}],
            },
        }},
    })
}
