//! Runs inside a group's namespaces (`kubernest-testbed run-group`): mounts, host name, then keeps the tasks running.
//!
//! SIGUSR1 kills the tasks and holds them ("kill"), SIGUSR2 lets them run again ("restore"). It deliberately reaps no
//! orphans (catatonit, process 1 of the namespace, does) and knows nothing of Kubernetes but the volume recycler.

use std::{
    fs::{self, OpenOptions},
    io,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpStream, UnixStream},
    process::Command,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    mounts, recycle,
    spec::{After, Spec, Task},
};

/// Why a group could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The document could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The document is not a group.
    #[error("{path} does not describe a group")]
    Parse {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The host name could not be set.
    #[error("cannot set the host name")]
    Hostname(#[source] io::Error),
    /// The node's file systems could not be set up.
    #[error("cannot set up the node's file systems")]
    Mounts(#[from] mounts::Error),
    /// Signals could not be watched.
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
}

/// A program that ends sooner than this after its start is started again only after this time.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How often a port or socket that a task needs is tried.
const GATE_POLL: Duration = Duration::from_millis(50);

/// Reads the group's document and runs it until killed.
pub async fn run(path: &Path) -> Result<(), Error> {
    let name = || path.display().to_string();
    let text = fs::read(path).map_err(|source| Error::Read { path: name(), source })?;
    let spec: Spec = serde_json::from_slice(&text).map_err(|source| Error::Parse { path: name(), source })?;
    let mut hold = signal(SignalKind::user_defined1()).map_err(Error::Signals)?;
    let mut resume = signal(SignalKind::user_defined2()).map_err(Error::Signals)?;
    fs::write("/proc/sys/kernel/hostname", &spec.hostname).map_err(Error::Hostname)?;
    if let Some(root) = &spec.root {
        mounts::prepare(root, &spec.bed)?;
    }

    let (wanted, watching) = watch::channel(true);
    for task in spec.tasks {
        tokio::spawn(keep(task, spec.path.clone(), watching.clone()));
    }
    if let Some(kubeconfig) = spec.recycler {
        tokio::spawn(recycle::run(kubeconfig, spec.bed));
    }
    loop {
        let on = tokio::select! {
            Some(()) = hold.recv() => false,
            Some(()) = resume.recv() => true,
        };
        wanted.send_replace(on);
    }
}

/// Keeps one task running while it is wanted.
async fn keep(task: Task, path: String, mut wanted: watch::Receiver<bool>) {
    while wanted.wait_for(|on| *on).await.is_ok() {
        let started = Instant::now();
        tokio::select! {
            // Dropping the other branch kills the program (SIGKILL), as a crash would.
            _ = wanted.wait_for(|on| !*on) => continue,
            ended = once(&task, &path) => eprintln!("{}: {ended}", task.name),
        }
        tokio::time::sleep(RESTART_PAUSE.saturating_sub(started.elapsed())).await;
    }
}

/// Runs a task to its end and says how it ended.
async fn once(task: &Task, path: &str) -> String {
    if let Some(after) = &task.after {
        while !answers(after).await {
            tokio::time::sleep(GATE_POLL).await;
        }
    }
    let Some((program, args)) = task.argv.split_first() else {
        return "has no command line".into();
    };
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&task.log)
        .and_then(|log| Ok((log.try_clone()?, log)));
    let (out, err) = match log {
        Ok(both) => both,
        Err(e) => return format!("cannot open {}: {e}", task.log.display()),
    };
    let child = Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", path)
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .kill_on_drop(true)
        .spawn();
    match child {
        Ok(mut child) => match child.wait().await {
            Ok(status) => format!("ended: {status}"),
            Err(e) => format!("cannot be waited for: {e}"),
        },
        Err(e) => format!("cannot start {program}: {e}"),
    }
}

async fn answers(after: &After) -> bool {
    match after {
        After::Tcp(address) => TcpStream::connect(address).await.is_ok(),
        After::Unix(path) => UnixStream::connect(path).await.is_ok(),
    }
}
