//! Child processes: their output goes to the log line by line, and none outlives the launcher.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::lines::{Lines, Tail};

/// How long a one-shot helper may take.
const ONE_SHOT_LIMIT: Duration = Duration::from_secs(60);
/// Most bytes taken from a one-shot helper's output.
const MAX_OUTPUT: u64 = 64 << 10;

/// Why a one-shot helper gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It did not start.
    #[error("starting {program}")]
    Start {
        /// Path of the program.
        program: String,
        /// What was wrong.
        source: io::Error,
    },
    /// Its output could not be read.
    #[error("reading from {program}")]
    Read {
        /// Path of the program.
        program: String,
        /// What was wrong.
        source: io::Error,
    },
    /// It ran too long.
    #[error("{program} took longer than a minute")]
    Slow {
        /// Path of the program.
        program: String,
    },
    /// It failed.
    #[error("{program} failed: {output}")]
    Failed {
        /// Path of the program.
        program: String,
        /// The last it said.
        output: String,
    },
}

/// Runs a helper to its end and gives its standard output, bounded.
pub async fn output(program: &Path, args: &[&OsStr]) -> Result<Vec<u8>, HelperError> {
    let name = || program.display().to_string();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| HelperError::Start {
            program: name(),
            source,
        })?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let run = async {
        let (out, err) = tokio::try_join!(bounded(stdout), bounded(stderr))?;
        io::Result::Ok((out, err, child.wait().await?))
    };
    let (out, err, status) = tokio::time::timeout(ONE_SHOT_LIMIT, run)
        .await
        .map_err(|_| HelperError::Slow { program: name() })?
        .map_err(|source| HelperError::Read {
            program: name(),
            source,
        })?;
    if status.success() {
        return Ok(out);
    }
    let said = String::from_utf8_lossy(&err);
    let output = said.trim().chars().take(500).collect();
    Err(HelperError::Failed {
        program: name(),
        output,
    })
}

async fn bounded(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(MAX_OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// A helper that runs as long as the machine.
#[derive(Debug)]
pub struct Helper {
    /// What it is, for logs and messages.
    pub name: String,
    /// Its process; killed when dropped.
    pub child: Child,
    /// The last it said.
    pub tail: Tail,
}

/// Starts a helper that runs as long as the machine; what it says is kept, and logged at level `debug`.
pub fn spawn(name: impl Into<String>, mut command: Command) -> io::Result<Helper> {
    let (name, tail) = (name.into(), Tail::default());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(log(name.clone(), tail.clone(), stdout));
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(log(name.clone(), tail.clone(), stderr));
    }
    Ok(Helper { name, child, tail })
}

async fn log(name: String, tail: Tail, mut stream: impl AsyncRead + Unpin) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    let say = |line: &[u8]| {
        tail.push(line);
        tracing::debug!(helper = name, "{}", String::from_utf8_lossy(line));
    };
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        lines.push(&buffer[..n], say);
    }
    lines.finish(say);
}
