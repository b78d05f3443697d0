//! Launchers whose process somebody else's code has replaced: they have a genuine certificate, and answer as they like.
//!
//! kubernest-api serves all tenants, so what one of its launchers does may cost that tenant's requests only: the answer is
//! a Status, the others go on, and memory stays within the chart's limit.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test; helpers count as production code for clippy"
)]

mod support;

use std::time::Duration;

use futures::future::{join_all, pending};
use http_body_util::BodyExt;
use kubernest_domain::control;
use kubernest_integration::{PlainStream, StreamError, wait_until};
use serde_json::{Value, json};
use support::launcher::{Asked, Authority, Launcher, flood};
use support::{BASE, LIMIT, Setup};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Streams that nobody reads: most of those that one namespace may have.
const FLOODS: usize = 48;
/// Connections that kubernest-api keeps to a launcher without a client: it waits for news of the guest's agent.
const NEWS: usize = 1;
/// Memory that the chart's `api.resources.limits` gives.
const MEMORY_KIB: u64 = 128 << 10;

/// What a launcher does once it was asked.
#[derive(Clone, Copy, Debug)]
enum Malice {
    /// Headers without end.
    Headers,
    /// One header without end.
    Header,
    /// Interim answers without end.
    Continues,
    /// A body without end, of an answer with this code.
    Body(u16),
    /// A picture that would take all memory.
    Picture,
    /// A picture that never comes to its end.
    HalfAPicture,
    /// The client shall ask somebody else.
    Redirect,
    /// Neither HTTP nor JSON.
    Garbage,
    /// 200, and something that is no answer to anything.
    Json,
    /// A stream, whoever wants none.
    Switch,
    /// Nothing at all.
    Silence,
    /// A byte now and then.
    Drip,
}

const ALL: [Malice; 14] = [
    Malice::Headers,
    Malice::Header,
    Malice::Continues,
    Malice::Body(200),
    Malice::Body(404),
    Malice::Body(409),
    Malice::Body(500),
    Malice::Picture,
    Malice::HalfAPicture,
    Malice::Redirect,
    Malice::Garbage,
    Malice::Json,
    Malice::Silence,
    Malice::Drip,
];

/// Where redirections lead to.
const TRAP: [u8; 4] = [127, 0, 6, 1];

impl Malice {
    async fn act(self, mut stream: Asked) {
        let junk = [b'x'; 16 << 10];
        let start = match self {
            Self::Headers | Self::Header | Self::Drip => "HTTP/1.1 200 OK\r\nx-".to_owned(),
            Self::Continues | Self::Silence => String::new(),
            Self::Body(code) => format!("HTTP/1.1 {code} x\r\ntransfer-encoding: chunked\r\n\r\n"),
            Self::Picture => head(u64::MAX),
            Self::HalfAPicture => head(control::SCREENSHOT_BYTES) + "\x1b[31m",
            Self::Redirect => "HTTP/1.1 302 Found\r\nlocation: http://127.0.6.1:49443/\r\n\r\n".to_owned(),
            Self::Garbage => "\0\x16\x03 no HTTP\r\n\r\n".to_owned(),
            Self::Json => {
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\n{\"a\":".to_owned()
            }
            Self::Switch => format!(
                "HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: {}\r\n\r\n",
                control::STREAM_PROTOCOL
            ),
        };
        if stream.write_all(start.as_bytes()).await.is_err() {
            return;
        }
        match self {
            Self::Headers => flood(&mut stream, b"a: b\r\nx-").await,
            Self::Continues => flood(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\n").await,
            Self::Body(_) => {
                let chunk = [b"4000\r\n", &junk[..], b"\r\n"].concat();
                flood(&mut stream, &chunk).await;
            }
            Self::Header | Self::Picture | Self::Switch => flood(&mut stream, &junk).await,
            Self::Drip => {
                while stream.write_all(b"a").await.is_ok() && stream.flush().await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            Self::HalfAPicture | Self::Redirect | Self::Garbage | Self::Json | Self::Silence => {}
        }
        // It keeps the connection for as long as the other side does.
        while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
    }
}

fn head(length: u64) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {length}\r\n\r\n")
}

/// An instance and its hostile launcher, which is the `number`th.
async fn instance(setup: &Setup, authority: &Authority, number: u8, malice: Malice) -> (String, Launcher) {
    let (name, address) = (format!("hostile-{number}"), [127, 0, 5, number]);
    let uid = running(setup, &name, address).await;
    let act = move |stream, _| malice.act(stream);
    (name, Launcher::start(authority, address, &uid, act).await)
}

async fn running(setup: &Setup, name: &str, address: [u8; 4]) -> String {
    let address = std::net::IpAddr::from(address);
    let status = json!({"phase": "Running", "launcherAddress": address});
    setup.instance(name, status).await
}

/// Asks for a subresource as its clients do: code and answer.
async fn ask(setup: &Setup, name: &str, verb: &str, subresource: &str) -> (u16, Value) {
    let path = format!("{BASE}/namespaces/org-acme/virtualmachineinstances/{name}/{subresource}");
    let status = |body: &str| serde_json::from_str(body).unwrap_or_default();
    match subresource {
        "console" | "vnc" => match PlainStream::open(&setup.plane.kubeconfig(), &path, None).await {
            Err(StreamError::Refused { code, body }) => (code, status(&body)),
            other => panic!("{subresource} of {name}: {:?}", other.err()),
        },
        "portforward" => {
            let path = format!("{path}/22");
            match PlainStream::open(&setup.plane.kubeconfig(), &path, None).await {
                Err(StreamError::Refused { code, body }) => (code, status(&body)),
                other => panic!("{subresource} of {name}: {:?}", other.err()),
            }
        }
        _ => {
            let method = if verb == "update" { "PUT" } else { "GET" };
            setup.ask(method, &path, None, Value::Null).await
        }
    }
}

/// Subresources of an instance with their verbs, whichever there are.
async fn subresources(setup: &Setup) -> Vec<(String, String)> {
    let (_, list) = setup.ask("GET", BASE, None, Value::Null).await;
    let rows = list["resources"].as_array().unwrap();
    let found: Vec<_> = rows
        .iter()
        .filter_map(|row| {
            let name = row["name"].as_str()?.strip_prefix("virtualmachineinstances/")?;
            Some((name.to_owned(), row["verbs"][0].as_str()?.to_owned()))
        })
        .collect();
    assert!(found.len() >= 8, "{list}");
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn integration_hostile_launchers_cost_their_own_requests_only() {
    let setup = Setup::start().await;
    let authority = Authority::install(&setup.client).await;
    let trap = Launcher::start_raw(TRAP, |_| async {}).await;
    let subresources = subresources(&setup).await;
    let mut hostile = Vec::new();
    for (number, malice) in (1..).zip(ALL) {
        hostile.push((malice, instance(&setup, &authority, number, malice).await));
    }
    let (flooding, flooder) = instance(&setup, &authority, 100, Malice::Switch).await;
    // One that does not come as far as TLS, and one that does not even try.
    let junk = Launcher::start_raw([127, 0, 5, 101], async |mut stream| {
        flood(&mut stream, b"\x16\x03\x03\x40\x00x").await
    })
    .await;
    let mute = Launcher::start_raw([127, 0, 5, 102], async |mut stream| {
        while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
    })
    .await;
    running(&setup, "junk", [127, 0, 5, 101]).await;
    running(&setup, "mute", [127, 0, 5, 102]).await;
    let tame_uid = running(&setup, "tame", [127, 0, 5, 103]).await;
    let _tame = Launcher::start(&authority, [127, 0, 5, 103], &tame_uid, async |mut stream, _| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    })
    .await;

    // Clients that take nothing of what launchers have to say; for a minute, then they are taken for gone.
    let path = |name: &str, tail: &str| format!("{BASE}/namespaces/org-acme/virtualmachineinstances/{name}/{tail}");
    let consoles = (0..FLOODS).map(|number| {
        let path = path(&flooding, ["console", "vnc"][number % 2]);
        let kubeconfig = setup.plane.kubeconfig();
        async move { PlainStream::open(&kubeconfig, &path, None).await.unwrap() }
    });
    let consoles = join_all(consoles).await;
    assert!(flooder.open() >= FLOODS, "{}", flooder.open());
    // One that says more at once than anybody types.
    let mut shouting = PlainStream::open(&setup.plane.kubeconfig(), &path(&flooding, "console"), None)
        .await
        .unwrap();
    // The other side may have ended it before all was said.
    let _ = shouting.send(&vec![b'x'; 64 << 20]).await;
    let ends = async { while let Ok(Some(_)) = shouting.receive().await {} };
    tokio::time::timeout(LIMIT, ends).await.unwrap();

    let asked = hostile.iter().flat_map(|(malice, (name, _))| {
        let setup = &setup;
        subresources.iter().map(move |(subresource, verb)| async move {
            // The picture that stalls has begun: there is no other answer than its end.
            if matches!(malice, Malice::HalfAPicture) && subresource == "vnc/screenshot" {
                let request = http::Request::get(format!(
                    "{BASE}/namespaces/org-acme/virtualmachineinstances/{name}/{subresource}"
                ));
                let response = setup
                    .client
                    .send(request.body(kube::client::Body::empty()).unwrap())
                    .await
                    .unwrap();
                assert_eq!(response.status().as_u16(), 200);
                assert!(response.into_body().collect().await.is_err(), "half a picture is none");
                return;
            }
            let (code, answer) = ask(setup, name, verb, subresource).await;
            // A launcher may say that it has done as it was told: it is its own guest that it lies about.
            if code == 200 && verb == "update" {
                return;
            }
            assert!(
                code >= 400 && answer["kind"] == "Status" && answer["code"] == code,
                "{malice:?} {subresource}: {code} {answer}"
            );
            let message = answer["message"].as_str().unwrap();
            assert!(message.len() < 6000 && !message.contains('\x1b'), "{message}");
        })
    });
    let asked = asked.collect::<Vec<_>>();
    let before_tls = ["junk", "mute"].map(|name| {
        let setup = &setup;
        async move {
            let (code, answer) = ask(setup, name, "update", "reset").await;
            assert_eq!((code, &answer["kind"]), (500, &json!("Status")), "{answer}");
        }
    });
    let all = async {
        tokio::join!(join_all(asked), join_all(before_tls));
    };
    // Others are served meanwhile: the silent ones alone are waited for much longer.
    let mut served = 0;
    let others = async {
        for _ in 0..5 {
            let reset = setup.put("virtualmachineinstances/tame", "reset", Value::Null).await;
            assert_eq!(reset, (200, String::new()));
            served += 1;
        }
        pending::<()>().await;
    };
    tokio::select! {
        () = all => {}
        () = others => {}
    }
    assert_eq!(served, 5);

    assert_eq!(trap.seen(), 0, "a redirection was followed");
    let peak = setup.api.peak_kib().unwrap();
    println!("kubernest-api had {} MiB at most", peak >> 10);
    assert!(peak < MEMORY_KIB, "kubernest-api had {peak} KiB");
    // Nothing is held once its client has gone but the one question after news of the guest's agent.
    drop((consoles, shouting));
    let launchers: Vec<_> = hostile
        .iter()
        .map(|(malice, (_, launcher))| (malice, launcher))
        .collect();
    let open = || -> Vec<String> {
        let mut open: Vec<_> = launchers
            .iter()
            .filter(|(_, launcher)| launcher.open() > NEWS)
            .map(|(malice, launcher)| format!("{malice:?}: {}", launcher.open()))
            .collect();
        let others = [("floods", &flooder), ("junk", &junk), ("mute", &mute)];
        let others = others.into_iter().filter(|(_, launcher)| launcher.open() > NEWS);
        open.extend(others.map(|(name, launcher)| format!("{name}: {}", launcher.open())));
        open
    };
    let closed = wait_until(LIMIT, || async { open().is_empty() }).await;
    assert!(closed, "{:?}", open());
    assert_eq!(
        setup.put("virtualmachineinstances/tame", "reset", Value::Null).await.0,
        200
    );
}
