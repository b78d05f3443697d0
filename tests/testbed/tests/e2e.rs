//! A bed raised from nothing, used, hurt and taken down, as one story: raising one for every test would cost minutes.
//!
//! It deliberately tests the test bed only; what runs on it is tested in `tests/e2e`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, panic::AssertUnwindSafe, time::Duration};

use futures::FutureExt;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod, Service};
use kube::{
    Api, Client, ResourceExt,
    api::{AttachParams, DeleteParams, ListParams, PostParams},
    runtime::wait::{await_condition, conditions},
};
use kubernest_testbed::{Options, Progress, Testbed};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

/// Waits for what a cluster does by itself within seconds.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn e2e_testbed_from_nothing_to_nothing() {
    // Unoptimized, the future of a long story is larger than a test thread's stack.
    let run = || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(from_nothing_to_nothing());
    };
    std::thread::Builder::new()
        .stack_size(64 << 20)
        .spawn(run)
        .unwrap()
        .join()
        .unwrap();
}

async fn from_nothing_to_nothing() {
    let options = Options {
        name: format!("t{}", std::process::id()),
        nodes: 2,
        volumes: 2,
        static_cpus: Some(1),
        progress: Progress::Shown,
    };
    let bed = Testbed::up(&options).await.unwrap();
    let told = AssertUnwindSafe(story(&bed)).catch_unwind().await;
    if told.is_err() {
        eprintln!("{}", bed.diagnose().await);
    }
    let check = Testbed::open(&options.name).unwrap();
    bed.add_host("10.0.0.1".parse().unwrap(), "tenant.test").unwrap();
    assert!(
        check.leftovers().iter().any(|l| l.contains("tenant.test")),
        "leftovers see what is there"
    );
    bed.down().await.unwrap();
    assert_eq!(check.leftovers(), Vec::<String>::new());
    assert!(told.is_ok(), "the story failed; see above");
}

async fn story(bed: &Testbed) {
    let client = bed.client().await.unwrap();
    let image = bed.load_testbox().await.unwrap();
    assert_eq!(
        bed.load_testbox().await.unwrap(),
        image,
        "loading twice is loading once"
    );

    step("a second up changes nothing", async {
        let before = node_versions(&client).await;
        let again = Options {
            name: bed.plan().name().into(),
            nodes: 2,
            volumes: 2,
            static_cpus: Some(1),
            progress: Progress::Silent,
        };
        let started = std::time::Instant::now();
        Testbed::up(&again).await.unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "took {:?}",
            started.elapsed()
        );
        assert_eq!(before, node_versions(&client).await);
    })
    .await;

    step("a Service by name across the nodes", async {
        run_pod(&client, pod("server", &bed.plan().node_name(0), &image, "serve 8080 hello")).await;
        run_pod(&client, pod("client", &bed.plan().node_name(1), &image, "sleep 1000000")).await;
        let services: Api<Service> = Api::default_namespaced(client.clone());
        let service = json!({"metadata": {"name": "hello"}, "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        services.create(&PostParams::default(), &serde_json::from_value(service).unwrap()).await.unwrap();
        eventually(|| exec(&client, "client", "fetch hello.default.svc.cluster.local 80"), "hello").await;
        eventually(|| exec(&client, "server", "fetch hello 80"), "hello").await;
        assert_eq!(exec(&client, "client", "fetch outside.example 80").await, "outside.example: no such name");
        // The way of webhooks and aggregated APIs: from the API server straight to a pod.
        let through = http::Request::get("/api/v1/namespaces/default/services/hello/proxy/").body(Vec::new()).unwrap();
        assert_eq!(client.request_text(through).await.unwrap().trim(), "hello");
    })
    .await;

    step("a second network through Multus, seen by a pod that watches /run/netns", async {
        let mut watcher = pod("watcher", &bed.plan().node_name(0), &image, "sleep 1000000");
        watcher["spec"]["hostNetwork"] = json!(true);
        watcher["spec"]["hostPID"] = json!(true);
        watcher["spec"]["containers"][0]["securityContext"] = json!({"privileged": true, "runAsUser": 0});
        watcher["spec"]["containers"][0]["volumeMounts"] =
            json!([{"name": "netns", "mountPath": "/run/netns", "mountPropagation": "HostToContainer"}]);
        watcher["spec"]["volumes"] = json!([{"name": "netns", "hostPath": {"path": "/run/netns"}}]);
        run_pod(&client, watcher).await;
        let before = exec(&client, "watcher", "ls /run/netns").await;

        let resource = kube::api::ApiResource::from_gvk_with_plural(
            &kube::api::GroupVersionKind::gvk("k8s.cni.cncf.io", "v1", "NetworkAttachmentDefinition"),
            "network-attachment-definitions",
        );
        let networks: Api<kube::api::DynamicObject> = Api::default_namespaced_with(client.clone(), &resource);
        let config = json!({"cniVersion": "1.0.0", "name": "second", "type": "bridge", "bridge": "second"}).to_string();
        let network = json!({"apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition", "metadata": {"name": "second"}, "spec": {"config": config}});
        networks.create(&PostParams::default(), &serde_json::from_value(network).unwrap()).await.unwrap();
        let mut two = pod("two-networks", &bed.plan().node_name(0), &image, "sleep 1000000");
        two["metadata"]["annotations"] = json!({"k8s.v1.cni.cncf.io/networks": "[{\"name\":\"second\",\"interface\":\"tap1\"}]"});
        run_pod(&client, two).await;
        assert_eq!(exec(&client, "two-networks", "ls /sys/class/net").await, "eth0\nlo\ntap1");

        let netns = exec(&client, "watcher", "ls /run/netns").await;
        let new = netns.lines().find(|n| !before.contains(n)).expect("the new pod's network namespace is seen");
        let kind = exec(&client, "watcher", &format!("stat -f -c %t /run/netns/{new}")).await;
        assert_eq!(kind, "6e736673", "nsfs (linux/magic.h)");
        let pods: Api<Pod> = Api::default_namespaced(client.clone());
        let uid = pods.get("two-networks").await.unwrap().uid().unwrap();
        pods.delete("two-networks", &DeleteParams::default()).await.unwrap();
        let deleted = await_condition(pods, "two-networks", conditions::is_deleted(&uid));
        tokio::time::timeout(PATIENCE, deleted).await.expect("Multus lets the pod go").unwrap();
    })
    .await;

    step("a container image as a volume", async {
        let mut pod = pod("image-volume", &bed.plan().node_name(1), &image, "sleep 1000000");
        pod["spec"]["volumes"] = json!([{"name": "disk", "image": {"reference": image, "pullPolicy": "IfNotPresent"}}]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "disk", "mountPath": "/disk"}]);
        run_pod(&client, pod).await;
        assert_eq!(
            exec(&client, "image-volume", "ls /disk/bin/fetch").await,
            "/disk/bin/fetch"
        );
    })
    .await;

    step("a processor for one pod alone", async {
        let mut alone = pod("alone", &bed.plan().node_name(1), &image, "sleep 1000000");
        let whole = json!({"cpu": "1", "memory": "16Mi"});
        alone["spec"]["containers"][0]["resources"] = json!({"requests": whole, "limits": whole});
        run_pod(&client, alone).await;
        let allowed = "grep Cpus_allowed_list /proc/self/status";
        let own = exec(&client, "alone", allowed).await;
        assert!(!own.contains(['-', ',']) && own.contains("Cpus_allowed_list"), "{own}");
        run_pod(
            &client,
            pod("others", &bed.plan().node_name(1), &image, "sleep 1000000"),
        )
        .await;
        assert_ne!(exec(&client, "others", allowed).await, own);
        for pod in ["alone", "others"] {
            let pods: Api<Pod> = Api::default_namespaced(client.clone());
            pods.delete(pod, &DeleteParams::default()).await.unwrap();
        }
    })
    .await;

    step(
        "a claim is bound, written by uid 107, and its volume used again",
        volumes(&client, &image),
    )
    .await;

    step("node files are the node's own", async {
        let at = |i: usize, command: &'static str| on_node(bed, i, command);
        at(0, "touch /var/lib/kubelet/device-plugins/mark /run/kubernest/mark /opt/cni/bin/mark /etc/cni/net.d/mark").await;
        let seen = "ls -d /var/lib/kubelet/device-plugins/mark /run/kubernest/mark /opt/cni/bin/mark /etc/cni/net.d/mark | wc -l";
        assert_eq!(at(0, seen).await, "4");
        assert_eq!(at(1, seen).await, "0");
        at(0, "rm /opt/cni/bin/mark /etc/cni/net.d/mark").await;
    })
    .await;

    step("a node cut off the network and joined again", async {
        bed.cut_network(1).await.unwrap();
        await_ready(&client, &bed.plan().node_name(1), false).await;
        bed.restore(1).await.unwrap();
        await_ready(&client, &bed.plan().node_name(1), true).await;
        eventually(|| exec(&client, "client", "fetch hello 80"), "hello").await;
    })
    .await;

    step("kubelet and containerd killed: pods run on", async {
        let seen = || exec(&client, "server", "stat -c %Y /proc/1");
        let before = seen().await;
        bed.kill_node(0).await.unwrap();
        eventually(|| exec(&client, "client", "fetch hello 80"), "hello").await;
        bed.restore(0).await.unwrap();
        eventually(seen, &before).await;
    })
    .await;

    step("a node powered off loses its processes, not its disk", async {
        bed.power_off(1).await.unwrap();
        await_ready(&client, &bed.plan().node_name(1), false).await;
        bed.restore(1).await.unwrap();
        run_pod(&client, pod("after", &bed.plan().node_name(1), &image, "sleep 1000000")).await;
        eventually(|| exec(&client, "after", "fetch hello 80"), "hello").await;
    })
    .await;
}

async fn volumes(client: &Client, image: &str) {
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    // Each node has two volumes: the third round can only run on one that was given back, and finds it empty.
    let mut used = Vec::new();
    for round in 0..5 {
        let claim = json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "16Gi"}}}});
        claims
            .create(&PostParams::default(), &serde_json::from_value(claim).unwrap())
            .await
            .unwrap();
        let mut pod = pod("writer", "", image, "touch /data/disk.img; sleep 1000000");
        pod["spec"]["securityContext"] =
            json!({"runAsUser": 107, "runAsGroup": 107, "fsGroup": 107, "runAsNonRoot": true});
        pod["spec"]["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]);
        pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
        pod["spec"]["containers"][0]["command"] = json!([
            "sh",
            "-c",
            "ls /data > /tmp/before; touch /data/disk.img; exec sleep 1000000"
        ]);
        pod["spec"]["containers"][0]["volumeMounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "tmp", "mountPath": "/tmp"}));
        pod["spec"]["volumes"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "tmp", "emptyDir": {}}));
        run_pod(client, pod).await;
        eventually(|| exec(client, "writer", "stat -c %u:%g /data/disk.img"), "107:107").await;
        assert_eq!(
            exec(client, "writer", "cat /tmp/before").await,
            "",
            "round {round}: the volume was not empty"
        );
        used.push(claims.get("data").await.unwrap().spec.unwrap().volume_name.unwrap());
        pods.delete("writer", &DeleteParams::default()).await.unwrap();
        let gone = claims.delete("data", &DeleteParams::default()).await.unwrap();
        if let Some(claim) = gone.left() {
            let uid = claim.uid().unwrap();
            let deleted = conditions::is_deleted(&uid);
            tokio::time::timeout(PATIENCE, await_condition(claims.clone(), "data", deleted))
                .await
                .unwrap()
                .unwrap();
        }
    }
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    for name in used {
        let available =
            |v: Option<&PersistentVolume>| v.and_then(|v| v.status.as_ref()?.phase.as_deref()) == Some("Available");
        tokio::time::timeout(PATIENCE, await_condition(volumes.clone(), &name, available))
            .await
            .unwrap()
            .unwrap();
    }
}

async fn step(what: &str, work: impl Future<Output = ()>) {
    Progress::Shown
        .step(what, async {
            work.await;
            Ok::<(), ()>(())
        })
        .await
        .unwrap();
}

fn pod(name: &str, node: &str, image: &str, command: &str) -> Value {
    let mut pod = json!({
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", format!("exec {command}")]}],
        },
    });
    if !node.is_empty() {
        pod["spec"]["nodeName"] = json!(node);
    }
    pod
}

async fn run_pod(client: &Client, pod: Value) {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let pod: Pod = serde_json::from_value(pod).unwrap();
    // The service account is made a moment after its namespace.
    let mut created = pods.create(&PostParams::default(), &pod).await;
    for _ in 0..100 {
        match &created {
            Err(kube::Error::Api(status)) if status.code == 403 || status.code == 409 => {}
            _ => break,
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        created = pods.create(&PostParams::default(), &pod).await;
    }
    created.unwrap();
    let name = pod.name_any();
    let running = await_condition(pods, &name, conditions::is_pod_running());
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap_or_else(|_| panic!("{name} does not run"))
        .unwrap();
}

/// What a command in a pod writes, without the last line's end; the error's text when it cannot be run.
async fn exec(client: &Client, pod: &str, command: &str) -> String {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let params = AttachParams::default().stdout(true).stderr(true);
    let mut process = match pods.exec(pod, ["sh", "-c", &format!("{command} 2>&1")], &params).await {
        Ok(process) => process,
        Err(e) => return e.to_string(),
    };
    let mut said = String::new();
    process.stdout().unwrap().read_to_string(&mut said).await.unwrap();
    said.trim_end().to_owned()
}

async fn eventually<F: Future<Output = String>>(mut ask: impl FnMut() -> F, wanted: &str) {
    let mut last = String::new();
    for _ in 0..120 {
        last = ask().await;
        if last == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("wanted {wanted:?}, got {last:?}");
}

async fn await_ready(client: &Client, node: &str, ready: bool) {
    let is = |n: Option<&Node>| {
        let conditions = n.and_then(|n| n.status.as_ref()?.conditions.as_ref());
        conditions.is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && (c.status == "True") == ready))
    };
    let wait = await_condition(Api::<Node>::all(client.clone()), node, is);
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{node} Ready={ready} not seen"))
        .unwrap();
}

/// uid and generation of each node: what a second `up` must not change.
async fn node_versions(client: &Client) -> BTreeMap<String, (Option<String>, Option<i64>)> {
    let nodes = Api::<Node>::all(client.clone())
        .list(&ListParams::default())
        .await
        .unwrap();
    nodes
        .into_iter()
        .map(|n| (n.name_any(), (n.uid(), n.metadata.generation)))
        .collect()
}

async fn on_node(bed: &Testbed, i: usize, command: &str) -> String {
    let argv = bed
        .node_command(i, &["sh".into(), "-c".into(), command.into()])
        .unwrap();
    let output = tokio::process::Command::new(&argv[0])
        .args(&argv[1..])
        .output()
        .await
        .unwrap();
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}
