//! Gives a node its own /etc, /opt, /run, /sys and /var in the mount namespace that the caller already has for itself.
//!
//! So all paths that Kubernetes fixes (/var/lib/kubelet/device-plugins, /opt/cni/bin, /etc/cni/net.d, /run/netns …) are
//! the node's own, for its processes and for pods with hostPath volumes. /run is memory: a power-off empties it, as on a
//! real machine. It deliberately leaves /dev, /tmp, /usr and the rest shared.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Why the node's file systems could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mount failed.
    #[error("cannot mount {what} at {target}")]
    Mount {
        /// What.
        what: String,
        /// Where.
        target: String,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// A directory could not be made.
    #[error("cannot prepare {path}")]
    Prepare {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a node's /var holds from the start.
const VAR: &[&str] = &[
    "lib/kubelet",
    "lib/containerd",
    "lib/cni",
    "log/pods",
    "log/containers",
    "cache",
    "tmp",
];

/// Sets up the mounts of a node whose files are below `root`; `bed` stays visible wherever it lies.
pub fn prepare(root: &Path, bed: &Path) -> Result<(), Error> {
    let bed_handle = File::open(bed).map_err(io_error(bed))?;
    for dir in VAR
        .iter()
        .map(|d| root.join("var").join(d))
        .chain(["etc", "etc.work", "opt/cni/bin"].map(|d| root.join(d)))
    {
        make(&dir)?;
    }
    for (name, target) in [("run", "/run"), ("lock", "/run/lock")] {
        let link = root.join("var").join(name);
        match std::os::unix::fs::symlink(target, &link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(&link)(e)),
            _ => {}
        }
    }

    mount_at(
        "tmpfs",
        "tmpfs",
        "/run",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )?;
    for dir in ["/run/lock", "/run/netns", "/run/kubernest", "/run/cgroup"] {
        make(Path::new(dir))?;
    }
    // A fresh sysfs shows the node's own links; the cgroups are carried over.
    bind(Path::new("/sys/fs/cgroup"), Path::new("/run/cgroup"))?;
    mount_at(
        "sysfs",
        "sysfs",
        "/sys",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None,
    )?;
    bind(Path::new("/run/cgroup"), Path::new("/sys/fs/cgroup"))?;
    umount2("/run/cgroup", MntFlags::MNT_DETACH).map_err(|source| Error::Mount {
        what: "nothing".into(),
        target: "/run/cgroup".into(),
        source,
    })?;
    fs::remove_dir("/run/cgroup").map_err(io_error(Path::new("/run/cgroup")))?;

    let layers = format!(
        "lowerdir=/etc,upperdir={},workdir={}",
        root.join("etc").display(),
        root.join("etc.work").display()
    );
    mount_at("overlay", "overlay", "/etc", MsFlags::empty(), Some(&layers))?;
    bind(&root.join("opt"), Path::new("/opt"))?;
    bind(&root.join("var"), Path::new("/var"))?;
    if ["/etc", "/opt", "/run", "/var"]
        .iter()
        .any(|hidden| bed.starts_with(hidden))
    {
        make(bed)?;
        bind(&PathBuf::from(format!("/proc/self/fd/{}", bed_handle.as_raw_fd())), bed)?;
    }
    // Last, so that nothing above spreads: mounts made from here on are seen in pods with HostToContainer.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .map_err(|source| Error::Mount {
        what: "shared propagation".into(),
        target: "/".into(),
        source,
    })
}

fn mount_at(what: &str, kind: &str, target: &str, flags: MsFlags, data: Option<&str>) -> Result<(), Error> {
    mount(Some(what), target, Some(kind), flags, data).map_err(|source| Error::Mount {
        what: what.into(),
        target: target.into(),
        source,
    })
}

fn bind(from: &Path, to: &Path) -> Result<(), Error> {
    mount(
        Some(from),
        to,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(|source| Error::Mount {
        what: from.display().to_string(),
        target: to.display().to_string(),
        source,
    })
}

fn make(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(io_error(dir))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Prepare { path, source }
}
