//! A guest that says more than anybody wants to hear, and clients that take nothing: the launcher's memory has a bound.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use std::fs;

use kubernest_domain::control;
use support::client::Authority;
use support::pod::Pod;

/// What is flooded through the launcher, each time.
const FLOOD: u64 = 1 << 20;
/// Less than half of one flood: what is kept of it would be seen.
const GROWTH_KIB: u64 = 512;
/// The kubelet's bound of a termination message.
const TERMINATION: usize = 4096;
/// Requests for all of the screen.
const LOOKS: usize = 20_000;

/// Most memory that the launcher has had.
fn peak_kib(pod: &Pod) -> u64 {
    let pid = pod.process("launcher");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Waits until the log has so much more of the guest.
fn flooded(pod: &mut Pod) {
    let log = pod.folder.path().join("stdout");
    let length = move || fs::metadata(&log).unwrap().len();
    let end = length() + FLOOD;
    pod.until("flood", |_| (length() >= end).then_some(()));
}

#[test]
fn launcher_keeps_little_of_what_a_guest_floods() {
    let authority = Authority::new();
    let mut pod = Pod::start("flood", |launch| {
        launch["vmi"]["spec"]["domain"]["devices"]["autoattachGraphicsDevice"] = true.into();
        launch["vmi"]["spec"]["terminationGracePeriodSeconds"] = 1.into();
    });
    authority.equip(&pod.folder.path().join("run/control"), support::pod::UID);
    pod.says("guest: ready");
    let api = pod.client(&authority, Some(&authority.api()));
    // What a first stream of each kind takes is not the flood's.
    drop((api.open(control::CONSOLE).unwrap(), api.open(control::VNC).unwrap()));
    let before = peak_kib(&pod);

    flooded(&mut pod);
    let alone = peak_kib(&pod);
    let console = api.open(control::CONSOLE).unwrap();
    let mut screen = api.open(control::VNC).unwrap();
    // RFC 6143, sections 7.1 and 7.5.3: no authentication, a shared session, all of the screen again and again.
    screen.until("RFB 003.008\n");
    screen.say("RFB 003.008\n\x01\x01");
    let look = "\x03\0\0\0\0\0\x02\x00\x01\x00";
    for _ in 0..LOOKS {
        if !screen.try_say(look) {
            break;
        }
    }
    flooded(&mut pod);
    let unread = peak_kib(&pod);
    println!("KiB before {before}, flooded {alone}, with clients that read nothing {unread}");
    assert!(alone - before < GROWTH_KIB, "{before} KiB, then {alone}");
    assert!(unread - alone < GROWTH_KIB, "{alone} KiB, then {unread}");

    drop((console, screen));
    nix::sys::signal::kill(pod.init().unwrap(), nix::sys::signal::Signal::SIGTERM).unwrap();
    let (_, termination) = pod.end();
    assert!(
        termination.serial.iter().any(|line| line.starts_with("xxxx")),
        "{termination:?}"
    );
    let written = pod.read("termination").len();
    assert!(written <= TERMINATION, "{written}");
}
