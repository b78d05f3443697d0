//! Starts, finds and stops the process groups of a bed.
//!
//! A group lives in its own PID, mount, IPC, UTS and (named) network namespaces and in its own cgroups. Its process 1 is
//! catatonit, so killing that is pulling the plug. It deliberately remembers no process ids: they are read from the
//! group's cgroups each time, so they are right after any crash.

use std::{
    fs::{self, OpenOptions},
    io,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Command;

use crate::{
    cgroup, net,
    plan::{Group, Plan},
    spec::Spec,
    state::{self, Dir},
};

/// Why a group could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its cgroups failed.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// Its files failed.
    #[error(transparent)]
    File(#[from] state::Error),
    /// Its first process could not be started.
    #[error("cannot start {group}")]
    Start {
        /// The group.
        group: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The supervisor did not come up.
    #[error("{group} did not start: see {log}")]
    Silent {
        /// The group.
        group: String,
        /// Its log.
        log: String,
    },
    /// There is no supervisor to tell.
    #[error("{group} is not running")]
    NotRunning {
        /// The group.
        group: String,
    },
    /// The tasks did not end.
    #[error("{tasks:?} of {group} are still running")]
    StillRunning {
        /// The group.
        group: String,
        /// The tasks.
        tasks: Vec<String>,
    },
}

/// The cgroup of the group's own processes; a node's pods have another beside it.
fn system(group: Group) -> String {
    format!("{}/system", group.dir())
}

/// Enters the cgroups given before `--` and becomes the rest.
const ENTER: &str = r#"while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit; shift; done; shift; exec "$@""#;

/// Starts the group unless it runs; answers whether it was started.
pub async fn start(plan: &Plan, dir: &Dir, group: Group, spec: &Spec) -> Result<bool, Error> {
    if supervisor(plan, group).is_some() {
        return Ok(false);
    }
    // What a killed group left behind, if anything.
    cgroup::kill_all(plan.name(), &group.dir()).await?;
    let file = spec_file(dir, group);
    state::write_if_changed(&file, &serde_json::to_vec_pretty(spec).unwrap_or_default())?;
    let cgroups = cgroup::ensure(plan.name(), &system(group))?;
    if let Group::Node(_) = group {
        cgroup::ensure(plan.name(), &format!("{}/pods", group.dir()))?;
    }
    let log = dir.logs().join(format!("{}.log", group.dir()));
    let failed = |source| Error::Start {
        group: group.dir(),
        source,
    };
    let out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(failed)?;
    let netns = net::netns_path(&plan.netns(group));
    // Not awaited: it outlives this process. Tokio reaps it should it end before.
    Command::new("sh")
        .args(["-c", ENTER, "sh"])
        .args(cgroups)
        .args(["--", "setsid", "nsenter"])
        .arg(format!("--net={}", netns.display()))
        .args([
            "unshare",
            "--mount",
            "--ipc",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child=SIGKILL",
            "--mount-proc",
            "--",
        ])
        .args(["catatonit", "--"])
        .arg(dir.program())
        .arg("run-group")
        .arg(file)
        .env("PATH", &spec.path)
        .stdin(Stdio::null())
        .stdout(out.try_clone().map_err(failed)?)
        .stderr(out)
        .spawn()
        .map_err(failed)?;
    for _ in 0..250 {
        if supervisor(plan, group).is_some() {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Error::Silent {
        group: group.dir(),
        log: log.display().to_string(),
    })
}

/// Kills everything of the group at once: the plug is pulled.
pub async fn stop(plan: &Plan, group: Group) -> Result<(), Error> {
    cgroup::kill_all(plan.name(), &group.dir()).await?;
    // A kubelet that finds its old pods' cgroups asks for three seconds what became of each of their containers.
    Ok(cgroup::remove(plan.name(), &group.dir()).await?)
}

/// Kills the group's tasks and holds them; on a node the pods run on.
pub async fn hold(plan: &Plan, dir: &Dir, group: Group) -> Result<(), Error> {
    let pid = supervisor(plan, group).ok_or_else(|| Error::NotRunning { group: group.dir() })?;
    kill(pid, Signal::SIGUSR1).ok();
    for _ in 0..500 {
        if running(plan, dir, group).is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Error::StillRunning {
        group: group.dir(),
        tasks: running(plan, dir, group),
    })
}

/// Lets held tasks run again; no harm when they are not held.
pub fn resume(plan: &Plan, group: Group) -> Result<(), Error> {
    let pid = supervisor(plan, group).ok_or_else(|| Error::NotRunning { group: group.dir() })?;
    kill(pid, Signal::SIGUSR2).ok();
    Ok(())
}

/// The supervisor's process id as the machine counts; its /proc/<pid>/root is the node's view of files.
pub fn supervisor(plan: &Plan, group: Group) -> Option<Pid> {
    cgroup::processes(plan.name(), &system(group))
        .into_iter()
        .find(|p| is_supervisor(*p))
        .map(Pid::from_raw)
}

/// The process has already become the supervisor: neither `unshare` nor catatonit with the same words behind.
fn is_supervisor(pid: i32) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command
        .split(|b| *b == 0)
        .nth(1)
        .is_some_and(|word| word == b"run-group")
}

/// The names of the group's tasks that run.
pub fn running(plan: &Plan, dir: &Dir, group: Group) -> Vec<String> {
    let Ok(text) = fs::read(spec_file(dir, group)) else {
        return Vec::new();
    };
    let Ok(spec) = serde_json::from_slice::<Spec>(&text) else {
        return Vec::new();
    };
    let programs: Vec<Vec<u8>> = cgroup::processes(plan.name(), &system(group))
        .into_iter()
        .filter_map(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok())
        .filter_map(|line| line.split(|b| *b == 0).next().map(<[u8]>::to_vec))
        .collect();
    let runs = |program: &String| programs.iter().any(|p| p == program.as_bytes());
    spec.tasks
        .into_iter()
        .filter(|t| t.argv.first().is_some_and(runs))
        .map(|t| t.name)
        .collect()
}

fn spec_file(dir: &Dir, group: Group) -> PathBuf {
    dir.group(group).join("group.json")
}
