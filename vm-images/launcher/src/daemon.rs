//! libvirt's session daemon, private to the pod: configuration, start, readiness.
//!
//! Session mode because it needs no privilege. Settings that matter (measured): `stdio_handler = "file"`, else libvirtd
//! waits for a virtlogd that is not there; no cgroups, namespaces or ownership changes, which need capabilities.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kubernest_domain::paths;
use tokio::process::Command;

use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::{
    capabilities,
    helper::{self, Helper},
};

const QEMU_CONF: &str = r#"stdio_handler = "file"
cgroup_controllers = []
security_driver = "none"
namespaces = []
dynamic_ownership = 0
remember_owner = 0
max_core = 0
"#;
/// Few threads: there is one client and one domain.
const LIBVIRTD_CONF: &str = r#"log_outputs = "3:stderr"
min_workers = 2
max_workers = 4
prio_workers = 1
admin_min_workers = 1
admin_max_workers = 1
"#;
/// How long libvirtd may take to answer; 0.1 s is usual.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time between attempts to connect; libvirtd can't tell when it listens.
const RETRY: Duration = Duration::from_millis(20);

/// Why there is no libvirtd.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Directories and configuration.
    #[error("writing {path}")]
    Configure {
        /// What could not be written.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// The program.
    #[error("running {path}")]
    Start {
        /// Path of the program.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// It ended at once.
    #[error("libvirtd ended with {status}: {said}")]
    Ended {
        /// How.
        status: std::process::ExitStatus,
        /// The last it said.
        said: String,
    },
    /// It never answered.
    #[error("libvirtd did not answer within 30 s")]
    Silent(#[source] HypervisorError),
}

/// Directories of the session, below [`paths::RUN`].
struct Session {
    home: PathBuf,
}

impl Session {
    fn dir(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    fn socket(&self) -> PathBuf {
        self.dir("runtime").join("libvirt/libvirt-sock")
    }
}

/// qemu's own log of a domain: what it said before it died.
pub fn qemu_log(domain: &str) -> PathBuf {
    Path::new(paths::RUN)
        .join("cache/libvirt/qemu/log")
        .join(format!("{domain}.log"))
}

/// Where libvirt writes the process of a domain's qemu.
pub fn pid_file(domain: &str) -> PathBuf {
    Path::new(paths::RUN)
        .join("runtime/libvirt/qemu/run")
        .join(format!("{domain}.pid"))
}

/// Starts libvirtd and connects to it; the capability cache, if any, must fit the domain's accelerator.
pub async fn start(libvirtd: &Path, capability_cache: Option<&Path>) -> Result<(Helper, Hypervisor), DaemonError> {
    let session = Session {
        home: paths::RUN.into(),
    };
    configure(&session)?;
    if let Some(from) = capability_cache {
        capabilities::install(from, &session.dir("cache"), libvirtd);
    }
    let mut command = Command::new(libvirtd);
    command
        .env("HOME", &session.home)
        .env("XDG_CONFIG_HOME", session.dir("config"))
        .env("XDG_CACHE_HOME", session.dir("cache"))
        .env("XDG_DATA_HOME", session.dir("data"))
        .env("XDG_RUNTIME_DIR", session.dir("runtime"))
        .env("TMPDIR", session.dir("tmp"))
        .env_remove(kubernest_domain::LAUNCH_ENV)
        .stdin(Stdio::null());
    let mut daemon = helper::spawn("libvirtd", command).map_err(|source| DaemonError::Start {
        path: libvirtd.to_owned(),
        source,
    })?;
    let socket = session.socket();
    let deadline = tokio::time::Instant::now() + START_LIMIT;
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = retry.tick() => {}
            status = daemon.child.wait() => match status {
                Ok(status) => return Err(DaemonError::Ended { status, said: daemon.tail.to_vec().join("; ") }),
                Err(source) => return Err(DaemonError::Start { path: libvirtd.to_owned(), source }),
            },
        }
        if !socket.exists() && tokio::time::Instant::now() < deadline {
            continue;
        }
        match connect(&socket).await {
            Ok(hypervisor) => return Ok((daemon, hypervisor)),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(DaemonError::Silent(error)),
            Err(_) => {}
        }
    }
}

async fn connect(socket: &Path) -> Result<Hypervisor, HypervisorError> {
    let socket = socket.to_owned();
    match tokio::task::spawn_blocking(move || Hypervisor::connect(&socket)).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn configure(session: &Session) -> Result<(), DaemonError> {
    let failed = |path: &Path, source| DaemonError::Configure {
        path: path.to_owned(),
        source,
    };
    for name in ["config/libvirt", "cache", "data", "runtime", "tmp"] {
        let path = session.dir(name);
        fs::create_dir_all(&path).map_err(|source| failed(&path, source))?;
    }
    for (name, content) in [
        ("config/libvirt/qemu.conf", QEMU_CONF),
        ("config/libvirt/libvirtd.conf", LIBVIRTD_CONF),
    ] {
        let path = session.dir(name);
        fs::write(&path, content).map_err(|source| failed(&path, source))?;
    }
    Ok(())
}
