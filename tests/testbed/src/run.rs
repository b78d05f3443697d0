//! Runs the machine's commands (`ip`, `nsenter`, `ctr` …) and turns failures into errors that carry what they said.
//!
//! It deliberately keeps no knowledge of beds.

use std::{
    ffi::OsStr,
    process::{Output, Stdio},
};

use tokio::{io::AsyncWriteExt, process::Command};

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started.
    #[error("cannot start {program}{}", package(.program))]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Its standard input could not be written.
    #[error("cannot write to {program}")]
    Feed {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended with a failure.
    #[error("{command} failed ({status}): {said}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The last of what it wrote to standard error.
        said: String,
    },
}

/// Names the Debian package of a program that is missing.
fn package(program: &str) -> String {
    let name = program.rsplit('/').next().unwrap_or(program);
    let package = match name {
        "ip" | "bridge" => "iproute2",
        "nft" => "nftables",
        "nsenter" | "unshare" | "setsid" => "util-linux",
        "tar" => "tar",
        "mount" | "umount" => "mount",
        "ldd" => "libc-bin",
        "conntrack" | "runc" | "catatonit" | "iptables" => name,
        _ => return String::new(),
    };
    format!(" (Debian package {package})")
}

/// Runs a command to its end and returns what it wrote to standard output.
pub async fn run<S: AsRef<OsStr>>(argv: &[S]) -> Result<String, Error> {
    run_fed(argv, &[]).await
}

/// Like [`run`], with `input` on standard input.
pub async fn run_fed<S: AsRef<OsStr>>(argv: &[S], input: &[u8]) -> Result<String, Error> {
    let output = output_fed(argv, input).await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
    Err(Error::Failed {
        command: argv
            .iter()
            .take(12)
            .map(|a| a.as_ref().to_string_lossy())
            .collect::<Vec<_>>()
            .join(" "),
        status: output.status.to_string(),
        said: lines[lines.len().saturating_sub(5)..].join("; "),
    })
}

/// Splits `line` at spaces and runs it; for commands whose words hold no spaces.
pub async fn sh(line: &str) -> Result<String, Error> {
    run(&line.split_whitespace().collect::<Vec<_>>()).await
}

async fn output_fed<S: AsRef<OsStr>>(argv: &[S], input: &[u8]) -> Result<Output, Error> {
    let (program, args) = argv.split_first().map_or((String::new(), argv), |(p, a)| {
        (p.as_ref().to_string_lossy().into_owned(), a)
    });
    let mut child = Command::new(&program)
        .args(args)
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| Error::Start {
            program: program.clone(),
            source,
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input).await.map_err(|source| Error::Feed {
            program: program.clone(),
            source,
        })?;
    }
    child
        .wait_with_output()
        .await
        .map_err(|source| Error::Start { program, source })
}
