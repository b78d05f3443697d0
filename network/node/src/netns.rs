//! Network namespaces: entering one, and what is to be said to the kernel there that is not netlink (sysctl, nft).
//!
//! A namespace is entered only by a thread made for it, which ends with its work: no thread of the agent's runtime is
//! ever in a namespace other than its own. Makes no namespace and mounts none.

use std::fs::File;
use std::future::Future;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use crate::links::{LinkError, Links};

/// How often a path is tried that the host's mounts or renames disturb.
const TRIES: u32 = 32;

/// What failed in or on the way into a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The path does not lead to a namespace (any more).
    #[error("open network namespace {path}")]
    Open {
        /// As asked for.
        path: PathBuf,
        #[source]
        #[allow(missing_docs)]
        source: io::Error,
    },
    /// The thread did not get in.
    #[error("enter the network namespace: kubernest-node must run privileged")]
    Enter(#[source] io::Error),
    /// No thread or runtime.
    #[error("start a thread for the network namespace")]
    Thread(#[source] io::Error),
    /// The thread ended early.
    #[error("the thread in the network namespace ended without an answer")]
    Lost,
    /// A kernel parameter.
    #[error("set kernel parameter {name}")]
    Sysctl {
        /// Path below /proc/sys.
        name: String,
        #[source]
        #[allow(missing_docs)]
        source: io::Error,
    },
    /// nft is not there or did not run.
    #[error("run nft: the package nftables must be in the image of kubernest-node")]
    Nft(#[source] io::Error),
    /// nft refused the rules.
    #[error("load nft rules: {0}")]
    Rules(String),
    /// Netlink.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl NetnsError {
    /// Whether there is no such namespace any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Identity of a namespace while it exists: device and inode of its file (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// The identity of the namespace at a path.
    ///
    /// # Errors
    /// When nothing is there.
    pub fn at(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|meta| Self {
            device: meta.dev(),
            inode: meta.ino(),
        })
    }
}

/// An open network namespace; it lives at least as long as this.
#[derive(Debug, Clone)]
pub struct Netns(Arc<File>);

impl Netns {
    /// Opens the namespace at a path such as `/run/netns/x` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// [`NetnsError::Open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| NetnsError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self(Arc::new(file)))
    }

    /// Opens the namespace at an absolute path of a process whose root is `root`, such as `/proc/1/root`: its symbolic
    /// links lead to places below that root as well (`/var/run` is an absolute one on many hosts).
    ///
    /// # Errors
    /// [`NetnsError::Open`].
    pub fn open_in(root: &Path, path: &Path) -> Result<Self, NetnsError> {
        // Links below /proc lead past paths, which openat2 doesn't follow here (openat2(2), RESOLVE_IN_ROOT); the agent
        // has its host's processes in its own /proc.
        if path.starts_with("/proc") {
            return Self::open(path);
        }
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let open = || openat2(File::open(root)?, path, how).map_err(io::Error::from);
        // A rename or mount anywhere on the host meanwhile, and the kernel can't tell where the ".." of a link leads:
        // openat2(2) asks to try again (EAGAIN).
        let mut tries = 1..TRIES;
        let file = loop {
            match open() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries.next().is_some() => {}
                opened => break opened,
            }
        };
        let file = file.map_err(|source| NetnsError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self(Arc::new(file.into())))
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetnsError::Open`].
    pub fn current() -> Result<Self, NetnsError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Its identity.
    ///
    /// # Errors
    /// When the file cannot be read any more.
    pub fn id(&self) -> io::Result<NetnsId> {
        self.0.metadata().map(|meta| NetnsId {
            device: meta.dev(),
            inode: meta.ino(),
        })
    }

    /// Its descriptor's number, for netlink messages sent while `self` lives.
    pub fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Runs `work` in this namespace, on a thread of its own with a netlink connection of its own.
    ///
    /// # Errors
    /// Those of `work`, and [`NetnsError`] when the namespace cannot be entered.
    pub async fn enter<T, E, F, W>(&self, work: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<NetnsError> + Send + 'static,
        F: FnOnce(Inside) -> W + Send + 'static,
        W: Future<Output = Result<T, E>>,
    {
        let netns = self.clone();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let run = move || {
            setns(netns.0.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter(errno.into()))?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(NetnsError::Thread)?.block_on(async {
                let inside = Inside {
                    links: Links::connect().map_err(NetnsError::from)?,
                };
                work(inside).await
            })
        };
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                // The receiver is gone only if the caller gave up; then nobody waits for the answer.
                let _ = answer.send(run());
            })
            .map_err(NetnsError::Thread)?;
        answered.await.map_err(|_| NetnsError::Lost)?
    }
}

/// What can be done by a thread inside a namespace. Cannot leave it: it is neither `Clone` nor handed out elsewhere.
#[derive(Debug)]
pub struct Inside {
    /// Devices.
    pub links: Links,
}

impl Inside {
    /// Sets a kernel parameter, for example `net/ipv4/ip_forward`. /proc/sys/net shows the opening thread's namespace.
    ///
    /// # Errors
    /// [`NetnsError::Sysctl`].
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), NetnsError> {
        let failed = |source| NetnsError::Sysctl {
            name: name.to_owned(),
            source,
        };
        std::fs::write(Path::new("/proc/sys").join(name), value).map_err(failed)
    }

    /// Like [`Inside::sysctl`], for parameters of optional parts of the kernel.
    ///
    /// # Errors
    /// [`NetnsError::Sysctl`], but not when the kernel has no such parameter.
    pub fn sysctl_if_there(&self, name: &str, value: &str) -> Result<(), NetnsError> {
        match self.sysctl(name, value) {
            Err(NetnsError::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Loads an nft script as one transaction.
    ///
    /// # Errors
    /// [`NetnsError::Nft`], or [`NetnsError::Rules`] with what nft said.
    pub fn nft(&self, script: &str) -> Result<(), NetnsError> {
        // A child inherits the namespace of the thread that forks it.
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(NetnsError::Nft)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A broken pipe means that nft ended; its own words say why.
            let _ = stdin.write_all(script.as_bytes());
        }
        let output = child.wait_with_output().map_err(NetnsError::Nft)?;
        if output.status.success() {
            Ok(())
        } else {
            Err(NetnsError::Rules(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            ))
        }
    }

    /// Whether a table of rules is there.
    ///
    /// # Errors
    /// [`NetnsError::Nft`].
    pub fn has_table(&self, family: &str, name: &str) -> Result<bool, NetnsError> {
        let status = Command::new("nft")
            .args(["list", "table", family, name])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.map(|status| status.success()).map_err(NetnsError::Nft)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn unit_netns_below_a_root_is_found_through_that_roots_links() {
        let root = tempfile::tempdir().unwrap();
        let netns = root.path().join("run/netns/x");
        std::fs::create_dir_all(netns.parent().unwrap()).unwrap();
        std::fs::create_dir(root.path().join("var")).unwrap();
        std::fs::write(&netns, "").unwrap();
        symlink("/run", root.path().join("var/run")).unwrap();
        symlink("../../..", root.path().join("var/up")).unwrap();
        for path in ["/run/netns/x", "/var/run/netns/x", "/var/up/run/netns/x"] {
            let opened = Netns::open_in(root.path(), Path::new(path)).unwrap();
            assert_eq!(opened.id().unwrap(), NetnsId::at(&netns).unwrap(), "{path}");
        }
    }

    #[test]
    fn unit_netns_that_only_the_agents_root_has_is_not_opened() {
        let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(other.path().join("x"), "").unwrap();
        symlink(other.path(), root.path().join("netns")).unwrap();
        let refused = Netns::open_in(root.path(), Path::new("/netns/x")).unwrap_err();
        assert_eq!(refused.to_string(), "open network namespace /netns/x");
    }

    #[test]
    fn unit_netns_of_a_process_is_opened() {
        let own = format!("/proc/{}/ns/net", std::process::id());
        let opened = Netns::open_in(Path::new("/proc/self/root"), Path::new(&own)).unwrap();
        assert_eq!(opened.id().unwrap(), Netns::current().unwrap().id().unwrap());
    }
}
