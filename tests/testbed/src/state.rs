//! A bed's directory: what it is (`bed.json`), its keys, logs and data; and who holds which slot.
//!
//! Below `<cache>/testbed/<name>/`. It deliberately holds nothing that the kernel knows better (processes, links):
//! those are looked up by the names that [`crate::plan`] gives them, so that a crash leaves nothing unknown.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;

use crate::{
    components,
    plan::{self, Group, Plan},
};

/// Room for a bed's images, data, logs and what its machines write; the end-to-end stories were seen to need 5 GiB.
const ROOM_MIB: u64 = 6 * 1024;

/// Why a bed's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for it.
    #[error(transparent)]
    Cache(#[from] components::Error),
    /// The plan is not one.
    #[error(transparent)]
    Plan(#[from] plan::Error),
    /// A file or directory could not be read or written.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `bed.json` does not hold a plan.
    #[error("{path} is not a bed's description: remove the directory with `kubernest-testbed down`")]
    Parse {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// No such bed.
    #[error("there is no bed {0}: raise it with `kubernest-testbed up --name {0}`")]
    NoBed(String),
    /// The disk is nearly full, which would show itself late and far off: nodes under DiskPressure take no pods.
    #[error(
        "{path} has {free} MiB free and a bed takes {ROOM_MIB} MiB: free some, or let KUBERNEST_CACHE name a folder on another disk"
    )]
    Full {
        /// The folder of all beds.
        path: String,
        /// What is there, in MiB.
        free: u64,
    },
    /// All networks are taken.
    #[error(
        "all {} networks for beds are taken: end one with `kubernest-testbed down --name <name>`",
        plan::SLOTS
    )]
    NoSlot,
    /// The bed is there with more nodes or other volumes.
    #[error(
        "bed {name} has {nodes} nodes: a bed can grow, but to shrink it needs `kubernest-testbed down --name {name}` first"
    )]
    Shrink {
        /// The bed.
        name: String,
        /// Its nodes.
        nodes: usize,
    },
}

/// Names the path and the act in an I/O error.
pub fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Io { what, path, source }
}

/// The directory of one bed.
#[derive(Debug, Clone)]
pub struct Dir(PathBuf);

impl Dir {
    /// The directory that the bed `name` has or would have.
    pub fn of(name: &str) -> Result<Self, Error> {
        plan::check_name(name)?;
        Ok(Self(beds()?.join(name)))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Certificates and keys.
    pub fn pki(&self) -> PathBuf {
        self.0.join("pki")
    }

    /// Logs of all processes.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// What the API server is to note of its requests.
    pub fn audit_policy(&self) -> PathBuf {
        self.0.join("audit-policy.json")
    }

    /// Where it notes them.
    pub fn audit_log(&self) -> PathBuf {
        self.logs().join("audit.jsonl")
    }

    /// What belongs to one group.
    pub fn group(&self, group: Group) -> PathBuf {
        self.0.join(group.dir())
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.join("kubeconfig")
    }

    /// The directories that are a node's local PersistentVolumes.
    pub fn volumes(&self, node: usize) -> PathBuf {
        self.group(Group::Node(node)).join("volumes")
    }

    /// The supervisor's own copy of the program, so that rebuilding it does not pull it away under a running bed.
    pub fn program(&self) -> PathBuf {
        self.0.join("bin/kubernest-testbed")
    }

    /// The plan of a bed that is there.
    pub fn load(&self) -> Result<Plan, Error> {
        let path = self.0.join("bed.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoBed(
                    self.0.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                ));
            }
            Err(e) => return Err(io_error("read", &path)(e)),
        };
        serde_json::from_slice(&text).map_err(|source| Error::Parse {
            path: path.display().to_string(),
            source,
        })
    }

    /// Finds the plan of a bed, grows it, or makes one in the lowest slot for which `free` holds; `static_cpus` is the node
    /// of a new bed that gives processors away.
    pub fn claim(
        &self,
        name: &str,
        nodes: usize,
        volumes: usize,
        static_cpus: Option<usize>,
        free: impl Fn(&Plan) -> bool,
    ) -> Result<Plan, Error> {
        match self.load() {
            Ok(there) if there.nodes() > nodes => Err(Error::Shrink {
                name: name.into(),
                nodes: there.nodes(),
            }),
            Ok(there) => self.store(there.grown(nodes, volumes)?),
            Err(Error::NoBed(_)) => {
                has_room(&beds()?)?;
                let taken: Vec<u8> = all()?.iter().map(Plan::slot).collect();
                for slot in (0..plan::SLOTS).filter(|s| !taken.contains(s)) {
                    let plan = Plan::new(name, slot, nodes, volumes)?.with_static_cpus(static_cpus);
                    if free(&plan) {
                        return self.store(plan);
                    }
                }
                Err(Error::NoSlot)
            }
            Err(e) => Err(e),
        }
    }

    fn store(&self, plan: Plan) -> Result<Plan, Error> {
        use std::os::unix::fs::PermissionsExt;
        for dir in [self.0.clone(), self.pki(), self.logs()] {
            fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
        }
        // Pods reach into a node's volumes and logs, so only the keys are closed to others.
        fs::set_permissions(self.pki(), fs::Permissions::from_mode(0o700)).map_err(io_error("close", &self.pki()))?;
        let text = serde_json::to_vec_pretty(&plan).unwrap_or_default();
        write_if_changed(&self.0.join("bed.json"), &text)?;
        Ok(plan)
    }
}

/// Holds the lock on all beds until dropped; the kernel frees it when the process dies.
pub fn lock() -> Result<File, Error> {
    let dir = beds()?;
    fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(io_error("open", &path))?;
    file.lock().map_err(io_error("lock", &path))?;
    Ok(file)
}

impl Dir {
    /// Holds the lock on this bed until dropped, so that two commands do not raise or hurt it at the same time.
    pub fn lock(&self) -> Result<File, Error> {
        let path = self.0.join("lock");
        let file = File::create(&path).map_err(io_error("open", &path))?;
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }
}

/// The plans of all beds that have a directory; unreadable ones are left out.
pub fn all() -> Result<Vec<Plan>, Error> {
    let dir = beds()?;
    let Ok(entries) = fs::read_dir(&dir) else {
        return Ok(Vec::new());
    };
    Ok(entries.flatten().filter_map(|e| Dir(e.path()).load().ok()).collect())
}

/// Writes a file, and only if it would change; answers whether it did.
pub fn write_if_changed(path: &Path, content: &[u8]) -> Result<bool, Error> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error("make", parent))?;
    }
    let new = path.with_added_extension("new");
    fs::write(&new, content).map_err(io_error("write", &new))?;
    fs::rename(&new, path).map_err(io_error("write", path))?;
    Ok(true)
}

fn has_room(path: &Path) -> Result<(), Error> {
    let disk = statvfs(path).map_err(|errno| io_error("look at the disk of", path)(errno.into()))?;
    let free = (disk.blocks_available() * disk.fragment_size()) >> 20;
    if free >= ROOM_MIB {
        return Ok(());
    }
    let path = path.display().to_string();
    Err(Error::Full { path, free })
}

fn beds() -> Result<PathBuf, Error> {
    Ok(components::cache_dir()?.join("testbed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_a_bed_needs_room() {
        // A file system of no size at all.
        let refused = has_room(Path::new("/proc")).unwrap_err().to_string();
        assert!(
            refused.starts_with("/proc has 0 MiB free and a bed takes 6144 MiB: "),
            "{refused}"
        );
    }
}
