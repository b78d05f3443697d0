//! The chart's own HAProxy configuration under a real HAProxy: routes come and go, connections stay.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kubernest_ingress::haproxy::Haproxy;
use kubernest_ingress::routes::Routes;
use kubernest_integration::free_port;

/// HAProxy with the chart's configuration, its paths and ports changed to this test's.
struct Running {
    child: Child,
    port: u16,
    haproxy: Haproxy,
    _dir: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chart_config() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/kubernest/files/haproxy.cfg");
    std::fs::read_to_string(path).unwrap()
}

async fn start(routes: &Routes) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    let (port, health) = (free_port().unwrap(), free_port().unwrap());
    let config = chart_config()
        .replace("/run/haproxy", dir.path().to_str().unwrap())
        .replace("bind :6443", &format!("bind 127.0.0.1:{port}"))
        .replace("bind :8404", &format!("bind 127.0.0.1:{health}"));
    std::fs::write(path("haproxy.cfg"), config).unwrap();
    let haproxy = Haproxy {
        map: path("routes.map"),
        socket: path("admin.sock"),
    };
    haproxy.write_map(routes).unwrap();
    let child = Command::new("/usr/sbin/haproxy")
        .args(["-W", "-db", "-f", path("haproxy.cfg").to_str().unwrap()])
        .stdout(Stdio::null())
        .spawn()
        .expect("haproxy: install the Debian package haproxy");
    let mut running = Running {
        child,
        port,
        haproxy,
        _dir: dir,
    };
    while TcpStream::connect(("127.0.0.1", running.port)).is_err() {
        if let Some(status) = running.child.try_wait().unwrap() {
            panic!("haproxy ended: {status}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    running
}

/// A backend that says its name and then echoes what comes after the TLS hello.
fn backend(name: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut hello = [0; 4096];
                let _ = stream.read(&mut hello);
                let _ = stream.write_all(name.as_bytes());
                let mut byte = [0];
                while matches!(stream.read(&mut byte), Ok(1)) {
                    let _ = stream.write_all(&byte);
                }
            });
        }
    });
    address
}

/// The first bytes that a TLS client sends for `host`.
fn hello(host: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), host.to_owned().try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Connects with SNI `host`; the stream and the first byte that came back, none if refused.
fn connect(port: u16, host: &str) -> (TcpStream, Option<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(&hello(host)).unwrap();
    let mut byte = [0];
    let got = matches!(stream.read(&mut byte), Ok(1)).then_some(byte[0]);
    (stream, got)
}

fn routes(pairs: &[(&str, &str)]) -> Routes {
    pairs
        .iter()
        .map(|(host, to)| ((*host).to_owned(), (*to).to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ingress_leads_by_sni_and_refuses_unknown_hosts() {
    let (a, b) = (backend("A"), backend("B"));
    let running = start(&routes(&[("a.org.example", &a)])).await;
    assert_eq!(connect(running.port, "a.org.example").1, Some(b'A'));
    assert_eq!(connect(running.port, "A.ORG.example").1, Some(b'A'));
    assert_eq!(connect(running.port, "b.org.example").1, None);

    running
        .haproxy
        .update(&routes(&[("a.org.example", &a), ("b.org.example", &b)]))
        .await
        .unwrap();
    assert_eq!(connect(running.port, "b.org.example").1, Some(b'B'));

    running.haproxy.update(&routes(&[("b.org.example", &a)])).await.unwrap();
    assert_eq!(connect(running.port, "a.org.example").1, None);
    assert_eq!(connect(running.port, "b.org.example").1, Some(b'A'));

    let mut plain = TcpStream::connect(("127.0.0.1", running.port)).unwrap();
    plain
        .write_all(b"GET / HTTP/1.1\r\nHost: a.org.example\r\n\r\n")
        .unwrap();
    assert!(!matches!(plain.read(&mut [0]), Ok(1)), "what isn't TLS must be refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn ingress_keeps_connections_while_routes_come_and_go() {
    let a = backend("A");
    let mut wanted = routes(&[("a.org.example", &a)]);
    let running = start(&wanted).await;
    let (mut stream, first) = connect(running.port, "a.org.example");
    assert_eq!(first, Some(b'A'));
    for round in 0..4 {
        for number in 0..250 {
            wanted.insert(format!("t{round}-{number}.org.example"), a.clone());
        }
        assert_eq!(running.haproxy.update(&wanted).await.unwrap(), 250);
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        assert_eq!(connect(running.port, &format!("t{round}-7.org.example")).1, Some(b'A'));
    }
    let kept = routes(&[("a.org.example", &a)]);
    assert_eq!(running.haproxy.update(&kept).await.unwrap(), 1000);
    assert_eq!(running.haproxy.update(&kept).await.unwrap(), 0);
    stream.write_all(b"y").unwrap();
    stream.read_exact(&mut [0]).unwrap();
}
