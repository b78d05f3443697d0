//! The aggregated API behind a real API server: who is believed, who may, what is written, what flows.
//!
//! No machine runs here; consoles of real guests are tested end to end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test; helpers count as production code for clippy"
)]

mod agents;
mod support;

use std::sync::Arc;

use futures::FutureExt;
use hyper_util::rt::TokioIo;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_integration::{PlainStream, StreamError, wait_until};
use kubernest_pki::{CaMaterial, EmbeddedIssuer, Leaf, issue};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use support::{BASE, LIMIT, Setup, create};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn integration_subresources_are_discovered() {
    let setup = Setup::start().await;
    let listed = setup.plane.kubectl(["get", "--raw", BASE]).unwrap();
    let said = String::from_utf8_lossy(&listed.stdout);
    assert!(said.contains("virtualmachineinstances/console"), "{listed:?}");
    let (code, version) = setup.ask("GET", &format!("{BASE}/version"), None, Value::Null).await;
    assert_eq!((code, &version["minor"]), (200, &json!("9")));
    let (code, health) = setup.ask("GET", &format!("{BASE}/healthz"), None, Value::Null).await;
    assert_eq!((code, &health["apiserver"]["connectivity"]), (200, &json!("ok")));
    // Short names of all groups work only while every group can be listed.
    let names = setup.plane.kubectl(["get", "vmi,vm", "-n", "org-acme"]).unwrap();
    assert!(names.status.success(), "{}", String::from_utf8_lossy(&names.stderr));
    for version in ["v1", "v1alpha3"] {
        let path = format!("/openapi/v3/apis/subresources.kubevirt.io/{version}");
        let found = wait_until(LIMIT, || async {
            let (code, document) = setup.ask("GET", &path, None, Value::Null).await;
            code == 200 && document["paths"].as_object().is_some_and(|paths| !paths.is_empty())
        });
        assert!(found.await, "{path} is not merged");
    }
}

#[tokio::test]
async fn integration_subresources_ask_whether_the_user_may() {
    let setup = Setup::start().await;
    setup.machine("vm", "Halted").await;
    let path = format!("{BASE}/namespaces/org-acme/virtualmachines/vm/start");
    let (code, denied) = setup.ask("PUT", &path, Some("ada"), Value::Null).await;
    assert_eq!(code, 403, "{denied}");
    assert!(
        denied["message"]
            .as_str()
            .unwrap()
            .contains("User \"ada\" cannot update"),
        "{denied}"
    );
    let role = "subresources.kubevirt.io";
    let rule = json!({"apiGroups": [role], "resources": ["virtualmachines/start"], "verbs": ["update"]});
    create::<k8s_openapi::api::rbac::v1::Role>(
        &setup.client,
        Some("org-acme"),
        json!({"metadata": {"name": "start"}, "rules": [rule]}),
    )
    .await;
    create::<k8s_openapi::api::rbac::v1::RoleBinding>(
        &setup.client,
        Some("org-acme"),
        json!({
            "metadata": {"name": "start"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "start"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ada"}],
        }),
    )
    .await;
    let allowed = wait_until(LIMIT, || async {
        setup.ask("PUT", &path, Some("ada"), Value::Null).await.0 == 202
    });
    assert!(allowed.await, "{}", setup.api.tail(20));
    let console = format!("{BASE}/namespaces/org-acme/virtualmachineinstances/vm/console");
    match PlainStream::open(&setup.plane.kubeconfig(), &console, Some("ada")).await {
        Err(StreamError::Refused { code: 403, body }) => assert!(body.contains("\"kind\":\"Status\""), "{body}"),
        other => panic!("{:?}", other.err()),
    }
}

#[tokio::test]
async fn integration_subresources_believe_the_front_proxy_only() {
    let setup = Setup::start().await;
    setup.machine("vm", "Halted").await;
    let own = CaMaterial::generate("somebody").unwrap();
    let proxy = setup.plane.front_proxy_ca().unwrap();
    for (what, ca, name, wanted) in [
        ("no certificate", None, "", Some(401)),
        (
            "a name that is not allowed",
            Some(&proxy),
            "kubernetes-admin",
            Some(401),
        ),
        ("another CA", Some(&own), "front-proxy-client", None),
        ("the front proxy", Some(&proxy), "front-proxy-client", Some(202)),
    ] {
        let credential = match ca {
            Some(ca) => {
                let issuer = EmbeddedIssuer::new(ca).unwrap();
                Some(issue(&issuer, &Leaf::client(name, None)).await.unwrap())
            }
            None => None,
        };
        assert_eq!(forged(&setup, credential).await, wanted, "{what}");
    }
}

/// A start asked of kubernest-api itself, with headers that name an administrator; `None` when TLS did not come about.
async fn forged(setup: &Setup, credential: Option<kubernest_pki::Credential>) -> Option<u16> {
    let services: Api<APIService> = Api::all(setup.client.clone());
    let bundle = services
        .get("v1.subresources.kubevirt.io")
        .await
        .unwrap()
        .spec
        .unwrap()
        .ca_bundle
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bundle.0) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
    let config = match credential {
        None => builder.with_no_client_auth(),
        Some(credential) => {
            let chain = CertificateDer::pem_slice_iter(credential.chain_pem.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(credential.key_pem.as_bytes()).unwrap();
            builder
                .with_client_auth_cert(chain.collect::<Result<_, _>>().unwrap(), key)
                .unwrap()
        }
    };
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", setup.port)).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    let request = http::Request::put(format!("{BASE}/namespaces/org-acme/virtualmachines/vm/start"))
        .header("host", "kubernest-api")
        .header("x-remote-user", "kubernetes-admin")
        .header("x-remote-group", "system:masters")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    // A certificate that is not believed ends the connection, in TLS 1.3 after the handshake.
    Some(sender.send_request(request).await.ok()?.status().as_u16())
}

#[tokio::test]
async fn integration_subresources_start_stop_and_restart() {
    let setup = Setup::start().await;
    let machines: Api<VirtualMachine> = setup.api();
    assert_eq!(
        setup.put("virtualmachines/none", "start", Value::Null).await,
        (404, "virtualmachine.kubevirt.io \"none\" not found".to_owned())
    );
    setup.machine("vm", "Halted").await;
    let path = format!("{BASE}/namespaces/org-acme/virtualmachines/vm/start");
    let body = kube::client::Body::from(br#"{"dryRun": ["All"], "what": 1}"#.to_vec());
    let request = http::Request::put(path).body(body).unwrap();
    let warned = setup.client.send(request).await.unwrap();
    assert_eq!(warned.headers()["warning"], "299 - \"unknown field \\\"what\\\"\"");
    let dry = setup
        .put("virtualmachines/vm", "start", json!({"dryRun": ["All"]}))
        .await;
    assert_eq!(dry.0, 202);
    let strategy = async || machines.get("vm").await.unwrap().spec.run_strategy;
    assert_eq!(strategy().await.as_deref(), Some("Halted"));
    assert_eq!(setup.put("virtualmachines/vm", "start", Value::Null).await.0, 202);
    assert_eq!(strategy().await.as_deref(), Some("Always"));
    assert_eq!(
        setup.put("virtualmachines/vm", "start", Value::Null).await,
        (
            409,
            "Operation cannot be fulfilled on virtualmachine.kubevirt.io \"vm\": Always does not support manual start \
             requests"
                .to_owned()
        )
    );
    let uid = setup.instance("vm", json!({"phase": "Running"})).await;
    let running = setup.put("virtualmachines/vm", "start", Value::Null).await;
    assert!(running.1.ends_with("VM is already running"), "{running:?}");
    let forced = setup
        .put("virtualmachines/vm", "restart", json!({"gracePeriodSeconds": 0}))
        .await;
    assert_eq!(forced.0, 202, "{forced:?}");
    let requests = serde_json::to_value(machines.get("vm").await.unwrap().status.unwrap().state_change_requests);
    assert_eq!(
        requests.unwrap(),
        json!([{"action": "Stop", "uid": uid}, {"action": "Start"}])
    );
    let instances: Api<VirtualMachineInstance> = setup.api();
    let grace = instances.get("vm").await.unwrap().spec.termination_grace_period_seconds;
    assert_eq!(grace, Some(0));
    assert_eq!(setup.put("virtualmachines/vm", "stop", Value::Null).await.0, 202);
    assert_eq!(strategy().await.as_deref(), Some("Halted"));
    let (code, expanded) = setup
        .ask(
            "GET",
            &format!("{BASE}/namespaces/org-acme/virtualmachines/vm/expand-spec"),
            None,
            Value::Null,
        )
        .await;
    assert_eq!((code, &expanded["spec"]["runStrategy"]), (200, &json!("Halted")));
}

#[tokio::test]
async fn integration_subresources_expand_a_machine_that_is_sent() {
    let setup = Setup::start().await;
    let path = format!("{BASE}/namespaces/org-acme/expand-vm-spec");
    let spec = json!({"runStrategy": "Halted", "template": {"spec": {"domain": {"devices": {}}}}});
    let machine = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "sent"}, "spec": spec,
    });
    let (code, expanded) = setup.ask("PUT", &path, None, machine.clone()).await;
    assert_eq!((code, &expanded["spec"]), (200, &spec), "{expanded}");
    assert_eq!(expanded["metadata"], json!({"name": "sent", "namespace": "org-acme"}));
    let machines: Api<VirtualMachine> = setup.api();
    assert!(machines.get_opt("sent").await.unwrap().is_none(), "nothing is made");
    let (code, denied) = setup.ask("PUT", &path, Some("ada"), machine.clone()).await;
    let why = denied["message"].as_str().unwrap();
    assert!(
        code == 403 && why.contains("User \"ada\" cannot update resource \"expand-vm-spec\""),
        "{denied}"
    );
    let (code, _) = setup.ask("GET", &path, None, Value::Null).await;
    assert_eq!(code, 400);
    let mut large = machine;
    large["metadata"]["annotations"] = json!({"a": "x".repeat(600 << 10)});
    let (code, refused) = setup.ask("PUT", &path, None, large).await;
    assert_eq!(code, 400, "{refused}");
}

#[tokio::test]
async fn integration_subresources_of_an_instance_answer_by_its_state() {
    let setup = Setup::start().await;
    let name = "virtualmachineinstances/vmi";
    assert_eq!(setup.put(name, "pause", Value::Null).await.0, 404);
    setup.instance("vmi", json!({"phase": "Scheduling"})).await;
    let conflict = "Operation cannot be fulfilled on virtualmachineinstance.kubevirt.io \"vmi\": ";
    for (verb, why) in [
        ("pause", "VM is not running"),
        ("unpause", "VMI is not running"),
        ("softreboot", "VM is not running"),
    ] {
        assert_eq!(
            setup.put(name, verb, Value::Null).await,
            (409, format!("{conflict}{why}"))
        );
    }
    // Whatever it is probed by, as long as it does not run.
    let instances: Api<VirtualMachineInstance> = setup.api();
    let probe = async |probe: Value| {
        let probe = Patch::Merge(json!({"spec": {"livenessProbe": probe}}));
        instances.patch("vmi", &PatchParams::default(), &probe).await.unwrap();
    };
    probe(json!({"tcpSocket": {"port": 22}})).await;
    assert_eq!(
        setup.put(name, "pause", Value::Null).await,
        (409, format!("{conflict}VM is not running"))
    );
    let refused = async |path: &str| {
        let path = format!("{BASE}/namespaces/org-acme/{name}/{path}");
        match PlainStream::open(&setup.plane.kubeconfig(), &path, None).await {
            Err(StreamError::Refused { code, body }) => {
                let status: Value = serde_json::from_str(&body).unwrap();
                assert_eq!((&status["kind"], &status["code"]), (&json!("Status"), &json!(code)));
                (code, status["message"].as_str().unwrap().to_owned())
            }
            other => panic!("{:?}", other.err()),
        }
    };
    assert_eq!(refused("console").await, (400, "VMI is not running".to_owned()));
    assert_eq!(refused("vnc").await, (400, "VMI is not running".to_owned()));
    assert_eq!(refused("portforward/22").await, (400, "VMI is not running".to_owned()));
    assert_eq!(refused("portforward/0").await.0, 400);
    let path = format!("{BASE}/namespaces/org-acme/{name}");
    let (code, _) = setup.ask("GET", &format!("{path}/console"), None, Value::Null).await;
    assert_eq!(code, 400, "a console is a websocket");
    let running = Patch::Merge(json!({"status": {"phase": "Running"}}));
    instances
        .patch_status("vmi", &PatchParams::default(), &running)
        .await
        .unwrap();
    let (code, why) = setup.put(name, "pause", Value::Null).await;
    assert!(code == 403 && why.contains("LivenessProbe"), "{code} {why}");
    probe(Value::Null).await;
    assert_eq!(
        refused("portforward/22").await,
        (400, "no network interfaces are present".to_owned())
    );
    // Whatever somebody writes into a status, nothing but pods is dialled.
    let own = Patch::Merge(json!({"status": {"interfaces": [{"name": "default", "ipAddress": "127.0.0.1"}]}}));
    instances
        .patch_status("vmi", &PatchParams::default(), &own)
        .await
        .unwrap();
    let (code, why) = refused("portforward/8080").await;
    assert!(
        code == 400 && why.contains("no address that is reached"),
        "{code} {why}"
    );
    let (code, agent) = setup
        .ask("GET", &format!("{path}/guestosinfo"), None, Value::Null)
        .await;
    assert_eq!(
        (code, agent["message"].as_str().unwrap()),
        (409, &*format!("{conflict}VMI does not have guest agent connected"))
    );
    // Without an address of its launcher, and without a launcher.
    let (code, why) = setup.put(name, "pause", Value::Null).await;
    assert!(code == 500 && why.contains("has no address yet"), "{code} {why}");
    let (code, _) = setup.ask("GET", &format!("{path}/nothing"), None, Value::Null).await;
    assert_eq!(code, 404);
}

/// An address of this machine that is not the loopback's; nothing is sent to find it.
async fn own_address() -> std::net::IpAddr {
    let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
    socket.connect("192.0.2.1:9").await.unwrap();
    socket.local_addr().unwrap().ip()
}

/// What tells kubernest-api that its patch came too late: 422 without causes.
#[tokio::test]
async fn integration_subresources_a_failed_test_has_no_causes() {
    let setup = Setup::start().await;
    setup.machine("vm", "Halted").await;
    let machines: Api<VirtualMachine> = setup.api();
    let patch = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": "1"},
        {"op": "replace", "path": "/spec/runStrategy", "value": "Always"},
    ]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).unwrap());
    match machines.patch("vm", &PatchParams::default(), &patch).await {
        Err(kube::Error::Api(answer)) => {
            let causes = answer.details.as_ref().map_or(0, |details| details.causes.len());
            assert_eq!((answer.code, causes), (422, 0), "{answer:?}");
        }
        other => panic!("{other:?}"),
    }
}

/// Rights on a machine reach its own instance, and not one that somebody else made under its name.
#[tokio::test]
async fn integration_subresources_of_a_machine_forward_to_its_own_instance() {
    let setup = Setup::start().await;
    let own = own_address().await;
    let tcp = tokio::net::TcpListener::bind((own, 0)).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let runs = json!({"phase": "Running", "interfaces": [{"name": "default", "ipAddress": own}]});
    let forward = async |machine: &str| {
        let path = format!("{BASE}/namespaces/org-acme/virtualmachines/{machine}/portforward/{port}");
        PlainStream::open(&setup.plane.kubeconfig(), &path, None).await
    };
    let refused = async |machine: &str| match forward(machine).await {
        Err(StreamError::Refused { code, body }) => {
            let status: Value = serde_json::from_str(&body).unwrap();
            (code, status["message"].as_str().unwrap().to_owned())
        }
        other => panic!("{:?}", other.err()),
    };
    let missing = "virtualmachine.kubevirt.io \"vm\" not found";
    assert_eq!(refused("vm").await, (404, missing.to_owned()));
    setup.instance("vm", runs.clone()).await;
    assert_eq!(refused("vm").await, (404, missing.to_owned()));
    setup.machine("vm", "Halted").await;
    let stopped = "Operation cannot be fulfilled on virtualmachine.kubevirt.io \"vm\": VMI is not started";
    assert_eq!(refused("vm").await, (409, stopped.to_owned()), "another's instance");
    let instances: Api<VirtualMachineInstance> = setup.api();
    instances
        .delete("vm", &kube::api::DeleteParams::default())
        .await
        .unwrap();
    assert_eq!(refused("vm").await, (409, stopped.to_owned()));
    setup.instance("vm", runs).await;
    let mut stream = forward("vm").await.unwrap();
    let (mut served, _) = tcp.accept().await.unwrap();
    served.write_all(b"welcome").await.unwrap();
    assert!(stream.expect("welcome").await.unwrap());
}

#[tokio::test]
async fn integration_subresources_forward_ports() {
    let setup = Setup::start().await;
    let own = own_address().await;
    let tcp = tokio::net::TcpListener::bind((own, 0)).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let interfaces = json!({"phase": "Running", "interfaces": [{"name": "default", "ipAddress": own}]});
    setup.instance("vmi", interfaces).await;
    let echo = tokio::spawn(async move {
        let (mut stream, _) = tcp.accept().await.unwrap();
        let mut buffer = vec![0; 4096];
        loop {
            let n = stream.read(&mut buffer).await.unwrap();
            if n == 0 || buffer[..n].ends_with(b"bye") {
                return;
            }
            stream.write_all(&buffer[..n]).await.unwrap();
        }
    });
    let base = format!("{BASE}/namespaces/org-acme/virtualmachineinstances/vmi/portforward");
    let path = format!("{base}/{port}");
    let mut stream = PlainStream::open(&setup.plane.kubeconfig(), &path, None).await.unwrap();
    stream.send(b"hello").await.unwrap();
    assert!(stream.expect("hello").await.unwrap());
    let large = "x".repeat(300_000);
    stream.send(large.as_bytes()).await.unwrap();
    assert!(stream.expect(&large).await.unwrap());
    stream.send(b"bye").await.unwrap();
    assert_eq!(stream.receive().await.unwrap(), None, "the end is told as such");
    echo.await.unwrap();

    let udp = tokio::net::UdpSocket::bind((own, 0)).await.unwrap();
    let path = format!("{base}/{}/udp", udp.local_addr().unwrap().port());
    let mut stream = PlainStream::open(&setup.plane.kubeconfig(), &path, None).await.unwrap();
    stream.send(b"question").await.unwrap();
    let mut buffer = [0; 64];
    let (n, from) = udp.recv_from(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..n], b"question");
    udp.send_to(b"answer", from).await.unwrap();
    assert!(stream.expect("answer").await.unwrap());
    let closed = PlainStream::open(&setup.plane.kubeconfig(), &format!("{base}/1"), None).await;
    assert!(
        matches!(closed, Err(StreamError::Refused { code: 500, .. })),
        "nobody listens there"
    );
}

/// The text of a machine may be small and its objects many: they must not cost the webhooks their process.
#[tokio::test]
async fn integration_subresources_expand_many_machines_in_little_memory() {
    let setup = Setup::start().await;
    let path = format!("{BASE}/namespaces/org-acme/expand-vm-spec");
    let machine = |rest: &str, spec: &str| {
        format!(r#"{{"metadata":{{}}{rest},"spec":{{"template":{{"spec":{{"domain":{{"devices":{{}}}}{spec}}}}}}}}}"#)
    };
    let ask = async |body: &str| {
        let body = kube::client::Body::from(body.as_bytes().to_vec());
        let answer = setup.client.send(http::Request::put(&path).body(body).unwrap()).await;
        answer.unwrap().status().as_u16()
    };
    assert_eq!(ask(&machine("", "")).await, 200);
    let before = setup.api.peak_kib().unwrap();
    let many = |item: &str, count: usize| vec![item; count].join(",");
    for (body, code) in [
        (machine(&format!(r#","x":[{}]"#, many(r#"{"":0}"#, 60_000)), ""), 400),
        (
            machine("", &format!(r#","volumes":[{}]"#, many(r#"{"name":""}"#, 40_000))),
            400,
        ),
        (
            machine("", &format!(r#","tolerations":[{}]"#, many("{}", 160_000))),
            400,
        ),
        (
            machine("", &format!(r#","volumes":[{}]"#, many(r#"{"name":""}"#, 8_000))),
            200,
        ),
    ] {
        let codes = futures::future::join_all((0..32).map(|_| ask(&body))).await;
        let (done, busy): (Vec<u16>, Vec<u16>) = codes.into_iter().partition(|of| *of == code);
        assert!(!done.is_empty() && busy.iter().all(|of| *of == 429), "{code} {busy:?}");
    }
    let more = setup.api.peak_kib().unwrap() - before;
    assert!(more < 40 << 10, "{more} KiB");
}

/// Any pod reaches the port, and a guest behind it: connections that say nothing must not take everybody's.
#[tokio::test]
async fn integration_subresources_are_there_whoever_else_connects() {
    let setup = Setup::start().await;
    let connect = async || {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
        socket.connect(([127, 0, 0, 1], setup.port).into()).await.unwrap()
    };
    // One more than one address may have; which of them is refused is chance.
    let mut silent = Vec::new();
    for _ in 0..257 {
        silent.push(connect().await);
    }
    let ends = silent.iter_mut().map(|stream| {
        Box::pin(async {
            let end = stream.read(&mut [0]).await;
            assert!(!matches!(end, Ok(1..)), "{end:?}");
        })
    });
    let (_, _, others) = futures::future::select_all(ends).await;
    assert_eq!(futures::future::select_all(others).now_or_never().map(|_| ()), None);
    let version = http::Request::get(format!("{BASE}/version")).body(Vec::new()).unwrap();
    setup.client.request::<Value>(version).await.unwrap();
    drop(silent);
    let spoken_to = wait_until(LIMIT, || async {
        let (mut stream, mut alert) = (connect().await, [0]);
        let _ = stream.write_all(b"this is no TLS\r\n").await;
        matches!(stream.read(&mut alert).await, Ok(1))
    });
    assert!(spoken_to.await, "places of connections that ended are not free");
}
