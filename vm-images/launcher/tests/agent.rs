//! Debian's guest agent in a real guest: what it tells, what is run through it, and guests that abuse the channel.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this is a test"
)]

mod support;

use kubernest_domain::control::{self, AgentState};
use kubernest_domain::{TerminationReason, probe};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::client::{Authority, Client, Stream};
use support::pod::{Pod, UID};

/// A pod whose guest has an agent, its launcher's client and its console.
fn start(patch: impl FnOnce(&mut Value)) -> (Pod, Client, Stream) {
    let authority = Authority::new();
    let mut pod = Pod::start("shell", |launch| {
        let domain = &mut launch["vmi"]["spec"]["domain"];
        domain["firmware"]["kernelBoot"]["container"]["initrdPath"] = "/boot/initrd-agent.img".into();
        patch(launch);
    });
    authority.equip(&pod.folder.path().join("run/control"), UID);
    pod.says("guest: ready");
    let api = pod.client(&authority, Some(&authority.api()));
    let console = api.open(control::CONSOLE).unwrap();
    (pod, api, console)
}

/// The agent's state as soon as it is as wanted.
fn until(pod: &mut Pod, api: &Client, what: &str, wanted: impl Fn(&AgentState) -> bool) -> AgentState {
    pod.until(what, |_| {
        let (code, body) = api.get(control::AGENT);
        assert_eq!(code, 200, "{body}");
        let state: AgentState = serde_json::from_str(&body).unwrap();
        wanted(&state).then_some(state)
    })
}

fn json_of(api: &Client, path: &str) -> Value {
    let (code, body) = api.get(path);
    assert_eq!(code, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[test]
fn agent_tells_of_the_guest_and_runs_probes() {
    let (mut pod, api, mut console) = start(|launch| {
        let domain = &mut launch["vmi"]["spec"]["domain"];
        domain["memory"]["guest"] = "96Mi".into();
        let arguments = &mut domain["firmware"]["kernelBoot"]["kernelArgs"];
        *arguments = format!("{} button=no", arguments.as_str().unwrap()).into();
    });
    let addressed = |state: &AgentState| state.interfaces.iter().any(|one| !one.addresses.is_empty());
    let state = until(&mut pod, &api, "connected, with an address", addressed);
    assert_eq!(state.os.unwrap().pretty_name, "Tiny Guest 1");
    let nic = json!([{"name": "eth0", "mac": "02:00:00:00:00:01", "addresses": ["10.0.2.2"]}]);
    assert_eq!(serde_json::to_value(&state.interfaces).unwrap(), nic);
    let before = format!("{}?{}={}", control::AGENT, control::AGENT_SEEN, state.revision - 1);
    assert_eq!(json_of(&api, &before)["revision"], state.revision);
    let info = json_of(&api, control::GUEST_INFO);
    assert_eq!(
        (&info["hostname"], &info["os"]["id"], &info["fsFreezeStatus"]),
        (&json!("tiny"), &json!("tiny"), &json!("thawed")),
        "{info}"
    );
    assert!(info["timezone"].as_str().unwrap().ends_with(", 0"), "{info}");
    let commands = info["supportedCommands"].as_array().unwrap();
    assert!(commands.contains(&json!({"name": "guest-exec", "enabled": true})));
    assert_eq!(info["fsInfo"]["disks"][0]["mountPoint"], "/seed", "{info}");
    let mounted = json_of(&api, control::GUEST_FILE_SYSTEMS);
    assert_eq!(mounted["items"][0]["disk"][0]["busType"], "virtio", "{mounted}");
    let users = json_of(&api, control::GUEST_USERS);
    assert_eq!(users, json!({"metadata": {}, "items": []}));

    probes_are_answered(&pod);
    // A guest that stands still because somebody wants it is not taken for dead; nothing can be run in it.
    assert_eq!(api.put(control::PAUSE).0, 200);
    assert_eq!(pod.probe(&["--timeout-seconds", "10"]), (0, String::new()));
    assert_eq!(pod.probe(&["--", "true"]).0, 1);
    assert_eq!(api.put(control::UNPAUSE).0, 200);

    assert_eq!(api.put(control::SOFT_REBOOT), (200, String::new()));
    console.until("guest: agent runs shutdown -h -r");
    until(&mut pod, &api, "gone", |state| !state.connected);
    console.until("guest: ready");
    until(&mut pod, &api, "connected again", |state| state.os.is_some());
    // Deaf to the power button, it hears its agent.
    kill(pod.init().unwrap(), Signal::SIGTERM).unwrap();
    console.until("guest: agent runs shutdown -h -P");
    let (code, termination) = pod.end();
    assert_eq!(
        (code, termination.reason, termination.message.as_str()),
        (0, TerminationReason::Stopped, "the guest shut down as asked")
    );
}

fn probes_are_answered(pod: &Pod) {
    let run = |script: &str| pod.probe(&["--timeout-seconds", "20", "--", "/bin/sh", "-c", script]);
    assert_eq!(pod.probe(&["--timeout-seconds", "10"]), (0, String::new()));
    assert_eq!(run("echo hello"), (0, "hello".to_owned()));
    assert_eq!(run("echo no; exit 3"), (3, "no".to_owned()));
    assert_eq!(run("kill -9 $$"), (1, "the command was ended by signal 9".to_owned()));
    let (code, said) = run("head -c 100000 /dev/zero | tr '\\0' x");
    assert_eq!((code, said.len()), (0, probe::OUTPUT_BYTES));
    let (code, said) = run("head -c 1000000 /dev/zero | tr '\\0' x");
    assert!(code == 1 && said.contains("more than 256 KiB"), "{code} {said}");
    let (code, said) = pod.probe(&["--timeout-seconds", "2", "--", "/bin/sleep", "600"]);
    assert_eq!((code, said.as_str()), (1, "the command did not end within 2 s"));
    let (code, said) = run("no-such-program");
    assert_eq!(code, 127, "{said}");
    let (code, said) = pod.probe(&["--timeout-seconds", "10", "--", "/no/such/program"]);
    assert!(code == 1 && said.contains("asking the guest agent"), "{code} {said}");
}

#[test]
fn agent_that_is_gone_or_abuses_its_channel_holds_nothing_up() {
    let (mut pod, api, mut console) = start(|_| {});
    until(&mut pod, &api, "connected", |state| state.os.is_some());
    console.say("agent stop\n");
    until(&mut pod, &api, "gone", |state| !state.connected);
    assert_eq!(api.get(control::GUEST_INFO), (409, control::NO_AGENT.to_owned()));
    assert_eq!(pod.probe(&[]), (1, "the guest has no agent connected".to_owned()));

    // One that never answers, then one that never stops talking.
    for abuse in ["mute", "flood"] {
        console.say(&format!("agent {abuse}\n"));
        until(&mut pod, &api, abuse, |state| state.connected);
        let (code, said) = api.get(control::GUEST_INFO);
        assert_eq!(code, 500, "{said}");
        assert_eq!(pod.probe(&["--timeout-seconds", "2"]).0, 1);
        // All else goes on meanwhile.
        assert_eq!(api.put(control::PAUSE).0, 200);
        assert_eq!(api.put(control::UNPAUSE).0, 200);
        assert!(pod.health("/readyz").contains("200"));
        console.say("agent stop\n");
        until(&mut pod, &api, "gone", |state| !state.connected);
    }
    console.say("agent start\n");
    until(&mut pod, &api, "connected again", |state| state.os.is_some());
    console.say("agent stop\n");
    until(&mut pod, &api, "gone", |state| !state.connected);
    console.say("agent mute\n");
    until(&mut pod, &api, "mute", |state| state.connected);
    // The power button is heard though the agent is not.
    kill(pod.init().unwrap(), Signal::SIGTERM).unwrap();
    console.until("guest: button");
    let (code, termination) = pod.end();
    assert_eq!((code, termination.reason), (0, TerminationReason::Stopped));
}
