//! Child processes that end with the test, and waiting for conditions.

use std::{
    collections::hash_map::{DefaultHasher, RandomState},
    ffi::OsStr,
    fs::File,
    hash::{BuildHasher, BuildHasherDefault, Hash},
    io,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A process that could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {program}")]
pub struct ProcessError {
    /// What was to be started.
    pub program: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// A running child; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with its output in the file `log`.
    ///
    /// # Errors
    /// When the program cannot be started or the file not be written.
    pub fn start<Arg: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = Arg>,
        environment: &[(&str, &OsStr)],
        log: &Path,
    ) -> Result<Self, ProcessError> {
        let error = |source| ProcessError {
            program: program.to_owned(),
            source,
        };
        let output = File::options().create(true).append(true).open(log).map_err(error)?;
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(error)?)
            .stderr(output)
            .spawn()
            .map_err(error)?;
        Ok(Self {
            child,
            log: log.to_owned(),
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it ever had, in KiB (proc_pid_status(5)); none once it ended.
    pub fn peak_kib(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        peak.trim().trim_end_matches(" kB").parse().ok()
    }

    /// Whether it ended, and how.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        // Only fails when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The last lines that it wrote, for a test's failure message.
    pub fn tail(&self, lines: usize) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Below those that connections get for their own end (ip-sysctl, ip_local_port_range), and NodePorts.
const PORTS: std::ops::Range<u16> = 16384..30000;

/// More than a test takes.
const PORTS_OF_A_TEST: u64 = 256;

/// A TCP port of the loopback interface that is free now, and is taken by no connection until somebody listens there.
///
/// # Errors
/// When the system has none.
pub fn free_port() -> io::Result<u16> {
    // Each test is a process of its own, with a range of its own among those of its nextest run: some ports are used
    // minutes after they were chosen.
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| {
        let slot = std::env::var("NEXTEST_TEST_GLOBAL_SLOT").ok();
        let slot = slot.and_then(|slot| slot.parse::<u64>().ok());
        AtomicU64::new(match (slot, std::env::var("NEXTEST_RUN_ID")) {
            (Some(slot), Ok(run)) => hash(run) + slot * PORTS_OF_A_TEST,
            _ => RandomState::new().hash_one(()) >> 1,
        })
    });
    let count = u64::from(PORTS.end - PORTS.start);
    let ports = PORTS.map(|_| PORTS.start + u16::try_from(NEXT.fetch_add(1, Ordering::Relaxed) % count).unwrap_or(0));
    for port in ports {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound.map(|_| port),
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// The same in each process.
fn hash(text: impl Hash) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(text) >> 1
}

/// Asks again and again until the condition holds; whether it did in time.
pub async fn wait_until<F: Future<Output = bool>>(limit: Duration, mut holds: impl FnMut() -> F) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if holds().await {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
