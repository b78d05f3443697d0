//! Stories of what a spec asks of the cluster around the machine: addresses, an account, processors for its guest.

mod processors;

use futures::FutureExt;
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use kubernest_crds::kubevirt::v1::VirtualMachineInstance;
use serde_json::{Value, json};

use crate::story;
use crate::support::stage::{Stage, Theatre, machine};

/// Tells all of them.
pub async fn tell(theatre: &Theatre) {
    let nodes: Api<Node> = Api::all(theatre.client().await);
    let node = json!({
        "metadata": {"name": "elsewhere"}, "spec": {"podCIDR": "10.60.1.0/24", "podCIDRs": ["10.60.1.0/24"]},
    });
    let node = serde_json::from_value(node).unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    story(
        "guest network",
        reconcile_guest_network(&Stage::set(theatre, "guest-network").await).boxed(),
    )
    .await;
    nodes.delete("elsewhere", &DeleteParams::default()).await.unwrap();
    story(
        "service account",
        reconcile_service_account(&Stage::set(theatre, "account").await).boxed(),
    )
    .await;
    story(
        "dedicated processors",
        processors::reconcile_dedicated_processors(&Stage::set(theatre, "processors").await).boxed(),
    )
    .await;
    story("changed pods", processors::reconcile_changed_pods(theatre).boxed()).await;
}

/// Waits until the instance says, in a condition, that it is not run for this reason and with these words.
async fn refused(stage: &Stage, reason: &str, words: &str) {
    let says = |instance: &VirtualMachineInstance| {
        let mut conditions = instance.status.iter().flat_map(|status| &status.conditions);
        conditions.any(|condition| {
            let message = condition.message.as_deref().unwrap_or_default();
            condition.reason.as_deref() == Some(reason) && message.contains(words)
        })
    };
    stage.instance_when(words, says).await;
    let pods = stage.pods().list(&ListParams::default()).await.unwrap();
    assert!(pods.items.is_empty(), "no pod of a machine that is refused");
}

fn on_network(cidr: &str) -> Value {
    let mut machine = machine();
    let spec = &mut machine["spec"]["template"]["spec"];
    spec["domain"]["devices"]["interfaces"] = json!([{"name": "default", "masquerade": {}}]);
    spec["networks"] = json!([{"name": "default", "pod": {"vmNetworkCIDR": cidr}}]);
    machine
}

async fn reconcile_guest_network(stage: &Stage) {
    stage.controllers_listen().await;
    stage.create(on_network("10.60.0.0/16")).await;
    let words = "spec.networks[0].pod.vmNetworkCIDR: 10.60.0.0/16 overlaps 10.60.1.0/24";
    refused(stage, "InvalidSpec", words).await;
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
    stage.create(on_network("192.168.7.0/24")).await;
    stage.running().await;
    let annotations = stage.pod().await.metadata.annotations.unwrap();
    let networks = &annotations["k8s.v1.cni.cncf.io/networks"];
    assert!(networks.contains(r#""network":"192.168.7.0/24""#), "{networks}");
}

async fn reconcile_service_account(stage: &Stage) {
    let mut machine = machine();
    let volumes = machine["spec"]["template"]["spec"]["volumes"].as_array_mut().unwrap();
    volumes.push(json!({"name": "token", "serviceAccount": {"serviceAccountName": "robot"}}));
    stage.create(machine).await;
    refused(stage, "FailedCreate", "robot").await;
    let account: ServiceAccount = serde_json::from_value(json!({"metadata": {"name": "robot"}})).unwrap();
    let accounts = Api::namespaced(stage.client.clone(), &stage.namespace);
    accounts.create(&PostParams::default(), &account).await.unwrap();
    stage.running().await;
    let spec = stage.pod().await.spec.unwrap();
    assert_eq!(spec.service_account_name.as_deref(), Some("robot"));
    // The API server's own plugin adds nothing to what was asked for.
    let volumes = spec.volumes.unwrap();
    let projected: Vec<_> = volumes.iter().filter(|volume| volume.projected.is_some()).collect();
    assert_eq!(projected.len(), 1, "{projected:?}");
    assert_eq!(projected[0].name, "token");
}
