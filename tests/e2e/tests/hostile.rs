//! A tenant that owns its launcher, or copies its pod: no credential, nothing of another machine, no way to the node.
//!
//! What runs there is a shell, in place of whatever else somebody may bring; TLS is spoken by this test, through a pipe
//! that begins inside the container.

use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};
use kubernest_e2e::leftovers::{inventory, nothing_since};
use kubernest_e2e::machine::{self, Machine, USER, template};
use kubernest_e2e::{Outer, wait};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, join};
use tokio_rustls::TlsConnector;

const SPACE: &str = "org-hostile";
/// What only the other machine may know.
const MARKER: &str = "for-the-other-machine-only";
/// The control port (`kubernest_domain::paths`).
const CONTROL_PORT: u16 = 49443;
/// Where TLS failed.
const HANDSHAKE: &str = "shaking hands";

#[tokio::test(flavor = "multi_thread")]
async fn e2e_a_hostile_launcher_finds_nothing() -> Result<()> {
    let outer = Outer::open().await?;
    machine::namespace(&outer, SPACE)?;
    let before = inventory(&outer, SPACE).await?;
    let secrets = Api::<Secret>::namespaced(outer.client.clone(), SPACE);
    let secret = json!({"metadata": {"name": "private"}, "stringData": {"node.json": MARKER}});
    secrets
        .create(&PostParams::default(), &serde_json::from_value(secret)?)
        .await?;

    let hostile = Machine::create(&outer, SPACE, "hostile", "Always", template("shell", None)?).await?;
    hostile.instance_in("Running", None).await?;
    let node = hostile.node().await?;
    // Beside it, on the same node.
    let mut spec = template("shell", None)?;
    spec["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    spec["spec"]["domain"]["devices"]["filesystems"] = json!([{"name": "bootstrap", "virtiofs": {}}]);
    let volumes = spec["spec"]["volumes"].as_array_mut().context("volumes")?;
    volumes.push(json!({"name": "bootstrap", "secret": {"secretName": "private"}}));
    let victim = Machine::create(&outer, SPACE, "victim", "Always", spec).await?;
    let uid = victim.instance_in("Running", None).await?;
    victim.says(&format!("share says {MARKER}")).await?;
    let launcher = launcher(&outer, "victim").await?;
    ensure!(
        searched(&outer, &launcher.name_any())?.contains("node.json"),
        "the search finds nothing where there is something"
    );
    let other = Other {
        uid,
        address: launcher
            .status
            .as_ref()
            .and_then(|status| status.pod_ip.clone())
            .context("address")?,
    };

    println!("-- as the launcher of a machine of one's own");
    let own = self::launcher(&outer, "hostile").await?.name_any();
    is_contained(&outer, &own, &other).await?;
    println!("-- as a copy of it, with all that says that it is the victim's");
    let copy = copied(&outer, &own, &launcher).await?;
    is_contained(&outer, &copy, &other).await?;
    // Nobody has taken the copy for the launcher.
    victim.ask("virtualmachineinstances", "pause").await?;
    victim.shows("Paused").await?;
    victim.ask("virtualmachineinstances", "unpause").await?;
    let status = victim.instances().get("victim").await?.status.context("status")?;
    ensure!(
        status.launcher_address.as_deref() == Some(other.address.as_str()),
        "{:?} instead of {}",
        status.launcher_address,
        other.address
    );

    let pods = Api::<Pod>::namespaced(outer.client.clone(), SPACE);
    pods.delete(&copy, &DeleteParams::default().grace_period(0)).await?;
    hostile.delete().await?;
    victim.delete().await?;
    secrets.delete("private", &DeleteParams::default()).await?;
    nothing_since(&outer, SPACE, &before).await?;
    outer.kubectl(&["delete", "namespace", SPACE])?;
    Ok(())
}

/// The machine that is attacked.
struct Other {
    uid: String,
    address: String,
}

async fn launcher(outer: &Outer, machine: &str) -> Result<Pod> {
    let mut launchers = outer.launchers(SPACE, machine).await?;
    ensure!(launchers.len() == 1, "one launcher, found {}", launchers.len());
    launchers.pop().context("a launcher")
}

/// A pod of the launcher's own spec that runs a shell; its labels, annotations and owner are the victim's launcher's.
async fn copied(outer: &Outer, own: &str, victim: &Pod) -> Result<String> {
    let pods = Api::<Pod>::namespaced(outer.client.clone(), SPACE);
    let mut spec = pods.get(own).await?.spec.context("spec")?;
    let container = spec.containers.first_mut().context("container")?;
    container.command = Some(["sleep", "infinity"].map(str::to_owned).into());
    (
        container.startup_probe,
        container.readiness_probe,
        container.liveness_probe,
    ) = (None, None, None);
    let pod = Pod {
        metadata: ObjectMeta {
            name: Some("copy".to_owned()),
            labels: victim.metadata.labels.clone(),
            annotations: victim.metadata.annotations.clone(),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    };
    pods.create(&PostParams::default(), &pod).await?;
    let runs = kube::runtime::conditions::is_pod_running();
    wait::until(&pods, "copy", "running", runs).await?;
    Ok("copy".to_owned())
}

async fn is_contained(outer: &Outer, pod: &str, other: &Other) -> Result<()> {
    holds_nothing(outer, pod)?;
    reaches_nobody(outer, pod, other).await
}

/// What a process finds in the container.
fn holds_nothing(outer: &Outer, pod: &str) -> Result<()> {
    let found = searched(outer, pod)?;
    ensure!(found.is_empty(), "the other machine's Secret is at {found}");
    for (what, script) in [
        (
            "a token of a service account",
            "find / -path /proc -prune -o -path '*serviceaccount*' -name token -print",
        ),
        (
            "the kubelet's folders",
            "ls -d /var/lib/kubelet /var/lib/containerd /etc/kubernetes",
        ),
        (
            "sockets of the node",
            "find / -path /proc -prune -o -type s -print | grep -v ^/run/kubernest/",
        ),
        ("the node agent's socket", "ls /run/kubernest/cni.sock"),
        ("disks of the node", "find /dev -type b"),
        (
            "capabilities",
            "grep -E '^Cap(Eff|Prm|Bnd)' /proc/self/status | grep -v '0000000000000000$'",
        ),
        ("another user's rights", "id -u | grep -v '^107$'"),
        ("a way to new privileges", "grep '^NoNewPrivs:.*0$' /proc/self/status"),
        ("a user namespace of one's own", "unshare --user true && echo made"),
        (
            "a mount of one's own",
            "mount -t tmpfs x /run/kubernest && echo mounted",
        ),
        ("a root file system to write to", "touch /usr/bin/x && echo written"),
    ] {
        // Nothing to print is what each of them shall come to, whatever its exit code.
        let found = shell(outer, pod, &format!("{{ {script}; }} 2>/dev/null; true"))?;
        ensure!(found.trim().is_empty(), "{pod} has {what}: {found}");
    }
    Ok(())
}

/// Files with the other machine's secret, of all that the container can open.
fn searched(outer: &Outer, pod: &str) -> Result<String> {
    let script = format!("grep -rsl -D skip {MARKER} /run /var /etc /tmp /home /mnt /srv /opt /root; true");
    shell(outer, pod, &script)
}

fn shell(outer: &Outer, pod: &str, script: &str) -> Result<String> {
    outer.kubectl(&["exec", "-n", SPACE, pod, "-c", "compute", "--", "bash", "-c", script])
}

/// What a process in the container is answered by the API server and by the other machine's launcher, with all that it has.
async fn reaches_nobody(outer: &Outer, pod: &str, other: &Other) -> Result<()> {
    let file = |name: &str| shell(outer, pod, &format!("cat /run/control/{name}"));
    let identity = (file("tls.crt")?, file("tls.key")?);
    let env = |name: &str| Ok::<_, anyhow::Error>(shell(outer, pod, &format!("echo ${name}"))?.trim().to_owned());
    let api = format!(
        "{}/{}",
        env("KUBERNETES_SERVICE_HOST")?,
        env("KUBERNETES_SERVICE_PORT")?
    );
    let ca = outer.kubectl(&[
        "get",
        "-n",
        SPACE,
        "configmap/kube-root-ca.crt",
        "-o",
        r"jsonpath={.data.ca\.crt}",
    ])?;
    for who in [None, Some(&identity)] {
        for path in [
            format!("/api/v1/namespaces/{SPACE}/secrets"),
            "/api/v1/namespaces/kubernest-system/secrets".to_owned(),
            format!("/apis/kubevirt.io/v1/namespaces/{SPACE}/virtualmachines"),
        ] {
            let name = "kubernetes.default.svc";
            match asked(outer, pod, &api, (&ca, name, who), &path).await {
                Ok(answer) => {
                    let refused = ["HTTP/1.1 401 ", "HTTP/1.1 403 "]
                        .iter()
                        .any(|code| answer.starts_with(code));
                    ensure!(refused && !answer.contains(MARKER), "{path}: {answer}");
                }
                Err(error) => {
                    println!("-- the API server: {error:#}");
                    break;
                }
            }
        }
    }
    let name = format!("{}.launcher.kubernest.io", other.uid);
    let address = format!("{}/{CONTROL_PORT}", other.address);
    let ca = file("ca.crt")?;
    for who in [None, Some(&identity)] {
        match asked(outer, pod, &address, (&ca, &name, who), "/v1/console").await {
            Ok(answer) => ensure!(answer.is_empty(), "the other machine's launcher answers: {answer}"),
            // In TLS 1.3 the client's certificate is looked at once the client takes the handshake for done.
            Err(error) => ensure!(
                error.to_string() != HANDSHAKE,
                "the pipe from {pod} does not work: {error:#}"
            ),
        }
    }
    // The same port is open to kubernest-api: it is the certificate that is refused.
    let (code, message) = put_reset(outer).await?;
    ensure!(code == 200, "{code} {message}");
    Ok(())
}

async fn put_reset(outer: &Outer) -> Result<(u16, String)> {
    let path = format!("/apis/subresources.kubevirt.io/v1/namespaces/{SPACE}/virtualmachineinstances/victim/reset");
    let request = http::Request::put(path)
        .header("impersonate-user", USER)
        .body(kube::client::Body::empty())?;
    let response = outer.client.send(request).await?;
    let code = response.status().as_u16();
    let body = response.into_body().collect_bytes().await?;
    Ok((code, String::from_utf8_lossy(&body).into_owned()))
}

/// CA in PEM, the name that the server must prove, and what the client shows, if anything: certificate and key in PEM.
type Tls<'a> = (&'a str, &'a str, Option<&'a (String, String)>);

/// All that `address` (`host/port`) answers to a GET that comes from inside the container.
async fn asked(outer: &Outer, pod: &str, address: &str, tls: Tls<'_>, path: &str) -> Result<String> {
    let (ca, name, identity) = tls;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<_, _>>()?;
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes())?)?
        }
    };
    // Who is kept out gets no answer at all, and the kernel would try for minutes. Ends with the connection, whichever side
    // ends it.
    let connect = format!("exec 3<>/dev/tcp/{address}");
    let script =
        format!("timeout 5 bash -c '{connect}' || exit 1; {connect} || exit 1; cat <&0 >&3 & cat <&3; kill $!");
    let mut pipe = tokio::process::Command::new(outer.bed.kubectl())
        .arg("--kubeconfig")
        .arg(outer.bed.kubeconfig())
        .args([
            "exec", "-i", "-n", SPACE, pod, "-c", "compute", "--", "bash", "-c", &script,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(input), Some(output)) = (pipe.stdin.take(), pipe.stdout.take()) else {
        bail!("kubectl has no pipes")
    };
    let name = ServerName::try_from(name.to_owned())?;
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, join(output, input))
        .await
        .context(HANDSHAKE)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("asking")?;
    stream.flush().await.context("asking")?;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer).await;
    match read {
        Err(error) if answer.is_empty() => Err(error).context("reading the answer"),
        // What there is tells enough; a server may end without a goodbye.
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}
