//! The tenant half alone with real machines: the controller on a real API server, its slots booted by hand from the node
//! image (vm-images/node-image/boot). Takes minutes and a node image, and the end-to-end tests cover it in full, so it
//! runs only when asked for: `cargo nextest run -p kubernest-tenant --run-ignored only real_guests`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a story that cannot go on fails")]

mod support;

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use kubernest_crds::{conditions, kubevirt::v1::VirtualMachine};
use kubernest_integration::{free_port, wait_until};
use kubernest_tenant::Options;
use serde_json::json;
use support::*;

const NS: &str = "org-acme";
const NAME: &str = "customera";
const LIMIT: Duration = Duration::from_secs(540);

/// A machine booted by hand, with all its helpers; gone when dropped.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // The script takes its qemu and virtiofsd with it when it is asked to end.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

fn boot(directory: &Path, secret: &Secret, slot: &str, arguments: &[String]) -> Guest {
    let share = directory.join(slot);
    fs::create_dir(&share).unwrap();
    for (key, value) in secret.data.as_ref().unwrap() {
        fs::write(share.join(key), &value.0).unwrap();
    }
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../vm-images/node-image/boot");
    let log = File::create(directory.join(format!("{slot}.log"))).unwrap();
    let mut command = Command::new(script);
    command
        .args(arguments)
        .arg(&share)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    Guest(command.process_group(0).spawn().unwrap())
}

async fn secret(client: &Client, name: &str) -> Secret {
    let api = Api::<Secret>::namespaced(client.clone(), NS);
    assert!(
        wait_until(PATIENCE, || async { api.get_opt(name).await.unwrap().is_some() }).await,
        "no Secret {name}"
    );
    api.get(name).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots two machines; the end-to-end tests cover it in full"]
async fn reconcile_real_guests_become_ready() {
    let (plane, admin) = outer().await;
    namespace(&admin, NS).await;
    let (port, network) = (free_port().unwrap(), free_port().unwrap());
    let flags = Options {
        node_cidr_pool: "100.64.0.0/10".parse().unwrap(),
        ..options()
    };
    let _operator = Operator::start_with(&admin, &format!("https://127.0.0.1:{port}"), flags);
    let began = Instant::now();
    create(&admin, NS, NAME, json!({"version": "v1.35.4"})).await;
    let machines = Api::<VirtualMachine>::namespaced(admin.clone(), NS);
    let made = || async { machines.get_opt("customera-cp-0").await.unwrap().is_some() };
    assert!(wait_until(PATIENCE, made).await);
    println!("machine of the control plane after {:?}", began.elapsed());

    let directory = std::env::var_os("KUBERNEST_TRIAL_DIRECTORY").map_or(plane.directory().to_owned(), PathBuf::from);
    let mut guests = Vec::new();
    for (slot, memory) in [("customera-cp-0", "2048"), ("customera-default-0", "1024")] {
        let secret = secret(&admin, &format!("{slot}-bootstrap")).await;
        let mut arguments = vec![
            "--memory".to_owned(),
            memory.to_owned(),
            "--network".to_owned(),
            network.to_string(),
        ];
        if memory == "2048" {
            arguments.extend(["--forward".to_owned(), port.to_string()]);
        } else {
            arguments.extend(["--cpus".to_owned(), "1".to_owned()]);
        }
        guests.push(boot(&directory, &secret, slot, &arguments));
        machine_runs(&admin, NS, slot, true).await;
    }
    for type_ in [
        conditions::CONTROL_PLANE_READY,
        conditions::NODES_READY,
        conditions::ADDONS_READY,
        conditions::READY,
    ] {
        let reached = wait_until(LIMIT, || async {
            condition(&cluster(&admin, NS, NAME).await, type_).0 == "True"
        });
        let reached = reached.await;
        println!("{type_} after {:?}", began.elapsed());
        assert!(reached, "{:#?}", cluster(&admin, NS, NAME).await.status);
    }
    let kubeconfig = secret(&admin, "customera-kubeconfig").await;
    fs::write(
        directory.join("tenant.kubeconfig"),
        &kubeconfig.data.unwrap()["value"].0,
    )
    .unwrap();
    if let Some(seconds) = std::env::var("KUBERNEST_TRIAL_LINGER")
        .ok()
        .and_then(|text| text.parse().ok())
    {
        println!("tenant at https://127.0.0.1:{port}");
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}
