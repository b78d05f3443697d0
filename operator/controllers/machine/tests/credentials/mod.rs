//! Stories of the launchers' CA, of their client's certificate, and of a launcher's own.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kubernest_crds::kubevirt::v1::VirtualMachine;
use kubernest_domain::control;
use kubernest_pki::{CertificateInfo, San};
use serde_json::json;
use x509_parser::pem::parse_x509_pem;

use crate::support::gate::Gate;
use crate::support::stage::{Controllers, PATIENCE, SYSTEM, Stage, Theatre, gated, machine};

const CA: &str = "kubernest-launcher-ca";
const CLIENT: &str = "kubernest-launcher-client";

fn text(secret: &Secret, name: &str) -> String {
    let data = &secret.data.as_ref().unwrap()[name];
    String::from_utf8(data.0.clone()).unwrap()
}

/// DNS names, and whether it is for servers and for clients.
fn certificate(secret: &Secret) -> (CertificateInfo, (bool, bool)) {
    let pem = text(secret, "tls.crt");
    let (_, parsed) = parse_x509_pem(pem.as_bytes()).unwrap();
    let parsed = parsed.parse_x509().unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    (
        CertificateInfo::from_pem(&pem).unwrap(),
        (usage.server_auth, usage.client_auth),
    )
}

/// Client and CA in their Secrets fit together, and were made once.
pub async fn assert_client_is_right(stage: &Stage) {
    let secrets = stage.secrets(SYSTEM);
    let (ca, client) = (secrets.get(CA).await.unwrap(), secrets.get(CLIENT).await.unwrap());
    let (ca_info, (info, usage)) = (
        CertificateInfo::from_pem(&text(&ca, "tls.crt")).unwrap(),
        certificate(&client),
    );
    assert_eq!(info.sans, [San::Dns(control::CLIENT_NAME.to_owned())]);
    assert_eq!(usage, (false, true), "a client only");
    assert!(info.signed_by(&ca_info));
    assert_eq!(text(&client, "ca.crt"), text(&ca, "tls.crt"));
    assert_eq!(ca.type_.as_deref(), Some("kubernetes.io/tls"));
}

/// Names of the Secrets made for launchers, each of which goes with its instance; what crashes left is among them.
async fn launcher_secrets(stage: &Stage) -> Vec<String> {
    let all = stage.secrets(&stage.namespace).list(&ListParams::default()).await;
    let goes = |secret: &Secret| {
        let owner = secret.owner_references().first().cloned();
        assert!(owner.is_some_and(|owner| owner.kind == "VirtualMachineInstance"));
        secret.name_any()
    };
    all.unwrap().items.iter().map(goes).collect()
}

/// The Secret of the only launcher pod.
pub async fn assert_launcher_is_right(stage: &Stage) {
    let (pod, instance) = (stage.pod().await, stage.instance().await);
    let secrets = stage.secrets(&stage.namespace);
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut pairs = volumes.filter(|volume| volume.name == "kubernest-control");
    let name = pairs.next().unwrap().secret.clone().unwrap().secret_name.unwrap();
    assert!(name.starts_with(&format!("{}-control-", pod.name_any())), "{name}");
    assert!(launcher_secrets(stage).await.contains(&name));
    let secret = secrets.get(&name).await.unwrap();
    let ca = stage.secrets(SYSTEM).get(CA).await.unwrap();
    let ca_info = CertificateInfo::from_pem(&text(&ca, "tls.crt")).unwrap();
    let (info, usage) = certificate(&secret);
    let uid = instance.uid().unwrap();
    assert_eq!(info.sans, [San::Dns(control::server_name(&uid))]);
    assert_eq!(usage, (true, false), "a server only");
    assert!(info.signed_by(&ca_info));
    let earlier = ca_info.not_after.as_second() - info.not_after.as_second();
    assert!(
        (0..=120).contains(&earlier),
        "it lives as long as the CA: {earlier} s less"
    );
    assert_eq!(text(&secret, "ca.crt"), text(&ca, "tls.crt"));
    let owner = &secret.owner_references()[0];
    assert_eq!(
        (owner.uid.as_str(), owner.controller, owner.block_owner_deletion),
        (uid.as_str(), Some(true), Some(true))
    );
    assert_eq!(
        (secret.immutable, secret.labels()["kubevirt.io/created-by"].as_str()),
        (Some(true), uid.as_str())
    );
}

/// As if Kubernest were new.
pub async fn forget(stage: &Stage) {
    for name in [CA, CLIENT] {
        // Not there: as good.
        let _ = stage.secrets(SYSTEM).delete(name, &DeleteParams::default()).await;
    }
}

async fn damage(stage: &Stage, name: &str) {
    let junk = Patch::Merge(json!({"data": {"tls.key": ByteString(b"junk".to_vec())}}));
    let secrets = stage.secrets(SYSTEM);
    secrets.patch(name, &PatchParams::default(), &junk).await.unwrap();
}

pub async fn reconcile_credentials(stage: &Stage, theatre: &Theatre) {
    stage.create(machine()).await;
    stage.running().await;
    assert_client_is_right(stage).await;
    assert_launcher_is_right(stage).await;
    assert_eq!(launcher_secrets(stage).await.len(), 1);
    stage.machines().delete("vm", &DeleteParams::default()).await.unwrap();
    stage.machine_gone().await;
    stage.controllers.kill();

    damage(stage, CLIENT).await;
    let config = theatre.controllers_config().await;
    let operator = Controllers::start(gated(&config, &Gate::new(None)));
    let mended = async {
        while text(&stage.secrets(SYSTEM).get(CLIENT).await.unwrap(), "tls.key") == "junk" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, mended).await.expect("a new client");
    assert_client_is_right(stage).await;
    operator.kill();

    damage(stage, CA).await;
    let _operator = Controllers::start(gated(&config, &Gate::new(None)));
    stage.create(machine()).await;
    let waits = |machine: &VirtualMachine| {
        let mut conditions = machine.status.iter().flat_map(|status| &status.conditions);
        conditions.any(|condition| {
            let message = condition.message.as_deref().unwrap_or_default();
            message.contains("the launcher cannot have its certificate")
        })
    };
    stage.machine_when("machine that waits for the CA", waits).await;
    let pods = stage.pods().list(&ListParams::default()).await.unwrap();
    assert!(pods.items.is_empty(), "none is started without");
    // What the operator's log says.
    let params = DeleteParams::default();
    stage.secrets(SYSTEM).delete(CA, &params).await.unwrap();
    stage.running().await;
    assert_client_is_right(stage).await;
    assert_launcher_is_right(stage).await;
}
