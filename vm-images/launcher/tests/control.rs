//! The control port: first alone, with somebody in the place of the domain's owner, then with a real guest behind it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use kubernest_domain::{TerminationReason, control};
use kubernest_launcher::agent::Agent;
use kubernest_launcher::camera::Camera;
use kubernest_launcher::console::Console;
use kubernest_launcher::control::{Backend, Command, Screen, serve};
use kubernest_launcher::seat::Seat;
use kubernest_launcher::state::{Refusal, Request};
use nix::sys::signal::{Signal, kill};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rstest::rstest;
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use support::client::{Authority, Client, Identity, Stream};
use support::pod::{Pod, UID};
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// The port of a launcher without a domain.
struct Port {
    folder: tempfile::TempDir,
    address: SocketAddr,
    authority: Authority,
    runtime: Runtime,
}

impl Port {
    /// Its owner answers each command in another way.
    fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        authority.equip(folder.path(), UID);
        let runtime = Runtime::new().unwrap();
        let address = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (commands, asked) = mpsc::channel(1);
            tokio::spawn(own(asked));
            let backend = Backend {
                agent: Agent::new(watch::channel(false).1),
                console: Some(Console::listen(&folder.path().join("serial.sock")).unwrap().0),
                screen: Some(Screen {
                    socket: folder.path().join("vnc.sock"),
                    seat: Seat::default(),
                    camera: Camera::default(),
                }),
                commands,
            };
            serve(listener, folder.path().into(), backend);
            address
        });
        Self {
            folder,
            address,
            authority,
            runtime,
        }
    }

    fn client(&self, identity: Option<&Identity>) -> Client {
        let address = self.address;
        self.authority
            .client(identity, UID, move || TcpStream::connect(address))
    }

    /// A connection of 127.0.0.`host`, who does not say anything.
    fn silent(&self, host: u8) -> TcpStream {
        let stream = self.runtime.block_on(async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(([127, 0, 0, host], 0).into()).unwrap();
            socket.connect(self.address).await.unwrap().into_std().unwrap()
        });
        stream.set_nonblocking(false).unwrap();
        stream
    }
}

async fn own(mut asked: mpsc::Receiver<Command>) {
    while let Some(Command { request, reply }) = asked.recv().await {
        let answer = match request {
            Request::Pause => Ok(()),
            Request::Unpause => Err(Refusal::NotPaused),
            Request::SoftReboot => Err(Refusal::Failed("resetting the domain: it broke".to_owned())),
            // The domain ends.
            Request::Reset => continue,
        };
        reply.send(answer).unwrap();
    }
}

#[test]
fn control_lets_in_nobody_but_the_api() {
    let port = Port::open();
    let authority = &port.authority;
    assert!(port.client(None).is_refused(), "without a certificate");
    for (identity, whose) in [
        (
            authority.issue("other.launcher.kubernest.io", ClientAuth),
            "another name's",
        ),
        (authority.issue(control::CLIENT_NAME, ServerAuth), "a server's"),
        (
            authority.issue(&control::server_name(UID), ServerAuth),
            "the launcher's own",
        ),
        (Authority::new().api(), "another CA's"),
    ] {
        assert!(port.client(Some(&identity)).is_refused(), "{whose} certificate");
    }
    let answer = port.client(Some(&authority.api())).put(control::PAUSE);
    assert_eq!(answer, (200, String::new()));
}

#[rstest]
#[case(&TLS12)]
#[case(&TLS13)]
fn control_speaks_both_versions_of_tls(#[case] version: &'static SupportedProtocolVersion) {
    let port = Port::open();
    let (address, api) = (port.address, port.authority.api());
    let client = port
        .authority
        .client_of(&[version], Some(&api), UID, move || TcpStream::connect(address));
    assert_eq!(client.put(control::PAUSE), (200, String::new()));
}

#[test]
fn control_reads_its_certificates_at_each_connection() {
    let port = Port::open();
    let client = port.client(Some(&port.authority.api()));
    let key = port.folder.path().join(control::files::KEY);
    let content = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    assert!(client.is_refused());
    assert!(client.is_refused());
    std::fs::write(&key, content).unwrap();
    assert_eq!(client.put(control::PAUSE).0, 200);
    let renewed = Authority::new();
    renewed.equip(port.folder.path(), UID);
    assert!(client.is_refused());
    let address = port.address;
    let client = renewed.client(Some(&renewed.api()), UID, move || TcpStream::connect(address));
    assert_eq!(client.put(control::PAUSE).0, 200);
}

#[test]
fn control_answers_in_sentences() {
    let port = Port::open();
    let client = port.client(Some(&port.authority.api()));
    let sentence = |code: u16, sentence: &str| (code, sentence.to_owned());
    assert_eq!(client.put(control::PAUSE), sentence(200, ""));
    assert_eq!(client.put(control::UNPAUSE), sentence(409, control::NOT_PAUSED));
    assert_eq!(
        client.put(control::SOFT_REBOOT),
        sentence(500, "resetting the domain: it broke")
    );
    assert_eq!(client.put(control::RESET), sentence(409, control::NOT_RUNNING));
    assert_eq!(client.get(control::PAUSE).0, 405);
    assert_eq!(client.get("/v1/else").0, 404);
    assert_eq!(client.get(control::CONSOLE).0, 426);
    assert_eq!(client.get(control::VNC).0, 426);
    assert_eq!(client.get(control::SCREENSHOT), sentence(409, control::NOT_RUNNING));
    // There is no guest whose agent could be asked.
    let unasked = r#"{"revision":0,"connected":false}"#;
    assert_eq!(client.get(control::AGENT), sentence(200, unasked));
    for question in [control::GUEST_INFO, control::GUEST_USERS, control::GUEST_FILE_SYSTEMS] {
        assert_eq!(client.get(question), sentence(409, control::NO_AGENT));
    }
    // qemu has no screen yet.
    assert_eq!(
        client.open(control::VNC).err(),
        Some(sentence(409, control::NOT_RUNNING))
    );
}

#[test]
fn control_peers_that_say_nothing_lock_nobody_out() {
    let port = Port::open();
    let client = port.client(Some(&port.authority.api()));
    // More than may shake hands at once: the client comes when their time is over.
    let silent: Vec<_> = (0..40).map(|n| port.silent(2 + n / 4)).collect();
    assert_eq!(client.put(control::PAUSE).0, 200);
    drop(silent);
}

#[test]
fn control_a_peer_has_four_handshakes() {
    let port = Port::open();
    let client = port.client(Some(&port.authority.api()));
    let begin = Instant::now();
    // More than may shake hands at once, of one peer: they cost the client nothing.
    let silent: Vec<_> = (0..40).map(|_| port.silent(2)).collect();
    assert_eq!(client.put(control::PAUSE).0, 200);
    let is_closed = |stream: &mut TcpStream, limit| {
        stream.set_read_timeout(Some(limit)).unwrap();
        matches!(stream.read(&mut [0]), Ok(0))
    };
    let mut open: Vec<_> = silent
        .into_iter()
        .filter_map(|mut stream| (!is_closed(&mut stream, Duration::from_millis(200))).then_some(stream))
        .collect();
    assert_eq!(open.len(), 4);
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    // Until their time is over; then the peer has its share again.
    for stream in &mut open {
        assert!(is_closed(stream, Duration::from_secs(10)));
    }
    assert!(begin.elapsed() > Duration::from_secs(4), "{:?}", begin.elapsed());
    let mut next = port.silent(2);
    assert!(!is_closed(&mut next, Duration::from_millis(200)));
}

#[test]
fn control_asks_whether_a_silent_session_is_there() {
    let port = Port::open();
    let _console = port.client(Some(&port.authority.api())).open(control::CONSOLE).unwrap();
    // proc(5): the port's side, its timer of keepalive (02) and what is left of it in hundredths of a second.
    let local = format!("0100007F:{:04X}", port.address.port());
    let end = Instant::now() + Duration::from_secs(5);
    let left = loop {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let timer = sockets
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|fields| fields[1] == local && fields[3] == "01")
            .and_then(|fields| Some(u32::from_str_radix(fields[5].strip_prefix("02:")?, 16).unwrap()));
        match timer {
            Some(left) => break left,
            None => assert!(Instant::now() < end, "no timer:\n{sockets}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(left <= 1500, "{left}");
}

#[test]
fn control_reaches_a_real_guest() {
    let authority = Authority::new();
    let mut pod = Pod::start("shell", |launch| {
        launch["vmi"]["spec"]["domain"]["devices"]["autoattachGraphicsDevice"] = true.into();
    });
    pod.says("guest: ready");
    let api = pod.client(&authority, Some(&authority.api()));
    // Without its folder the launcher says so, once, and lives on.
    assert!(api.is_refused() && api.is_refused());
    assert_eq!(pod.read("stderr").matches("nobody can use the control port").count(), 1);
    authority.equip(&pod.folder.path().join("run/control"), UID);
    let other = authority.issue("other.launcher.kubernest.io", ClientAuth);
    let server = authority.issue(control::CLIENT_NAME, ServerAuth);
    for identity in [None, Some(&other), Some(&server)] {
        assert!(pod.client(&authority, identity).is_refused());
    }

    let mut first = api.open(control::CONSOLE).unwrap();
    first.say("hello\n");
    first.until("guest: heard hello");
    let mut console = api.open(control::CONSOLE).unwrap();
    first.ends();
    console.say("again\n");
    // To the line's end: nothing is under way when it is paused.
    console.until("guest: heard again\r\n");
    // The log has all of it.
    pod.says("guest: heard hello");
    pod.says("guest: heard again");

    pauses(&mut pod, &api, &mut console);
    reboots(&mut pod, &api, &mut console);
    shows_its_screen(&api);
    gives_pictures_of_it(&api);

    // A paused guest can't hear the power button: it goes on first.
    assert_eq!(api.put(control::PAUSE).0, 200);
    kill(pod.init().unwrap(), Signal::SIGTERM).unwrap();
    console.until("guest: button");
    console.ends();
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason, termination.message.as_str()),
        (0, TerminationReason::Stopped, "the guest shut down as asked")
    );
}

fn pauses(pod: &mut Pod, api: &Client, console: &mut Stream) {
    let conflict = |sentence: &str| (409, sentence.to_owned());
    assert_eq!(api.put(control::PAUSE), (200, String::new()));
    assert_eq!(pod.virsh(&["domstate", "--reason"]), "paused (user)");
    console.say("still there\n");
    assert!(console.is_silent_for(Duration::from_secs(1)));
    assert_eq!(api.put(control::PAUSE), conflict(control::ALREADY_PAUSED));
    assert_eq!(api.put(control::SOFT_REBOOT), conflict(control::PAUSED));
    assert!(pod.health("/readyz").contains("200"), "{}", pod.health("/readyz"));
    assert!(console.is_silent_for(Duration::from_secs(1)));
    assert_eq!(api.put(control::UNPAUSE), (200, String::new()));
    console.until("guest: heard still there\r\n");
    assert_eq!(api.put(control::UNPAUSE), conflict(control::NOT_PAUSED));

    // A reset does not end a pause; the guest boots once it goes on.
    assert_eq!(api.put(control::PAUSE), (200, String::new()));
    assert_eq!(api.put(control::RESET), (200, String::new()));
    assert_eq!(api.put(control::PAUSE), conflict(control::ALREADY_PAUSED));
    assert!(console.is_silent_for(Duration::from_secs(1)));
    assert_eq!(api.put(control::UNPAUSE), (200, String::new()));
    console.until("guest: up");
    console.until("guest: ready");
}

fn reboots(pod: &mut Pod, api: &Client, console: &mut Stream) {
    for (path, ask) in [(control::SOFT_REBOOT, Some("guest: button")), (control::RESET, None)] {
        assert_eq!(api.put(path), (200, String::new()));
        for line in ask.into_iter().chain([
            "guest: up",
            // Its helpers have survived.
            r#"guest: share says {"hello":"guest"}"#,
            "guest: dhcp ip=10.0.2.2",
            "guest: ready",
        ]) {
            console.until(line);
        }
        assert!(pod.health("/readyz").contains("200"), "{}", pod.health("/readyz"));
        console.say("and now\n");
        console.until("guest: heard and now");
    }
}

fn shows_its_screen(api: &Client) {
    let mut first = api.open(control::VNC).unwrap();
    first.until("RFB 003.");
    let preserving = format!("{}?{}=true", control::VNC, control::PRESERVE_SESSION);
    assert_eq!(
        api.open(&preserving).err(),
        Some((409, control::SESSION_OPEN.to_owned()))
    );
    let mut second = api.open(control::VNC).unwrap();
    first.ends();
    second.until("RFB 003.");
}

/// qemu's VGA in text mode: 80 × 25 characters of 9 × 16 pixels.
fn gives_pictures_of_it(api: &Client) {
    for _ in 0..3 {
        let (head, picture) = api.download(control::SCREENSHOT);
        assert!(head.contains("content-type: image/png"), "{head}");
        let mut reader = png::Decoder::new(std::io::Cursor::new(picture)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (720, 400));
        assert!(pixels.iter().any(|byte| *byte != 0), "it is black");
    }
}

#[test]
fn control_a_guest_that_starts_paused_waits_to_be_told() {
    let authority = Authority::new();
    let mut pod = Pod::start("poweroff", |launch| {
        launch["vmi"]["spec"]["startStrategy"] = "Paused".into();
    });
    authority.equip(&pod.folder.path().join("run/control"), UID);
    pod.until("readiness", |pod| pod.health("/readyz").contains("200").then_some(()));
    let api = pod.client(&authority, Some(&authority.api()));
    assert_eq!(pod.virsh(&["domstate"]), "paused");
    assert_eq!(api.put(control::PAUSE), (409, control::ALREADY_PAUSED.to_owned()));
    assert_eq!(pod.read("stdout"), "");
    assert_eq!(api.open(control::VNC).err().unwrap().0, 404);
    assert_eq!(api.get(control::SCREENSHOT).0, 404);
    // It is reset as one that moves is, and does not move for that.
    assert_eq!(api.put(control::RESET), (200, String::new()));
    assert_eq!(api.put(control::PAUSE), (409, control::ALREADY_PAUSED.to_owned()));
    assert_eq!(pod.virsh(&["domstate"]), "paused");
    assert_eq!(api.put(control::UNPAUSE), (200, String::new()));
    let (_, said) = pod.shut_down();
    assert!(said.contains("guest: up"), "{said}");
}
