//! One virtiofsd per shared directory, read-only.
//!
//! Each gets its listening socket as standard input, so qemu can connect the moment the socket exists; there is nothing
//! to wait for. virtiofsd needs no sandbox of its own here: the pod is one, without any capability.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use kubernest_domain::machine::Share;
use tokio::process::Command;

use crate::helper::{self, Helper};

/// Why a share is not there.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Its directory is not mounted.
    #[error("share {tag}: looking at its directory")]
    Directory {
        /// The guest's mount tag.
        tag: String,
        /// What was wrong.
        source: io::Error,
    },
    /// Its socket.
    #[error("share {tag}: binding its socket")]
    Socket {
        /// The guest's mount tag.
        tag: String,
        /// What was wrong.
        source: io::Error,
    },
    /// Its virtiofsd.
    #[error("share {tag}: starting virtiofsd")]
    Start {
        /// The guest's mount tag.
        tag: String,
        /// What was wrong.
        source: io::Error,
    },
}

/// Starts the daemon of one share.
pub fn serve(virtiofsd: &Path, share: &Share) -> Result<Helper, ShareError> {
    let tag = || share.tag.clone();
    std::fs::read_dir(&share.directory).map_err(|source| ShareError::Directory { tag: tag(), source })?;
    let listener = UnixListener::bind(&share.socket).map_err(|source| ShareError::Socket { tag: tag(), source })?;
    let mut command = Command::new(virtiofsd);
    command
        .args([
            "--fd=0",
            "--sandbox=none",
            "--seccomp=kill",
            "--readonly",
            "--rlimit-nofile=0",
            "--log-level=warn",
        ])
        .arg("--shared-dir")
        .arg(&share.directory)
        .stdin(Stdio::from(OwnedFd::from(listener)));
    helper::spawn(format!("virtiofsd of share {}", share.tag), command)
        .map_err(|source| ShareError::Start { tag: tag(), source })
}
