//! A bed's cgroups: the kernel's own list of the processes that belong to it, whatever became of the testbed.
//!
//! Works on cgroup v1 (every hierarchy below /sys/fs/cgroup) and v2. It deliberately sets no limits.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::plan;

/// Why a cgroup could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine has no cgroups mounted.
    #[error("no cgroups are mounted at {ROOT}")]
    None,
    /// A cgroup could not be made.
    #[error("cannot make the cgroup {path}")]
    Make {
        /// Its directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A cgroup could not be removed.
    #[error("cannot remove the cgroup {path}")]
    Remove {
        /// Its directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes outlived SIGKILL.
    #[error("processes {pids:?} of cgroup {group} are still there {seconds} s after SIGKILL")]
    Immortal {
        /// The group.
        group: String,
        /// The processes.
        pids: Vec<i32>,
        /// How long was waited.
        seconds: u64,
    },
}

const ROOT: &str = "/sys/fs/cgroup";
const KILL_SECONDS: u64 = 30;

/// The mounted hierarchies: one with v2, one per controller with v1.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    if root.join("cgroup.controllers").exists() {
        return vec![root.into()];
    }
    let entries = fs::read_dir(root)
        .map(|d| d.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    let mut found: Vec<PathBuf> = entries
        .iter()
        // "cpu,cpuacct" is also reached by the links cpu and cpuacct.
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(std::fs::DirEntry::path)
        .filter(|p| p.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found
}

/// Where membership is read: every process is in every hierarchy, so one does. `pids` is nobody's favourite for limits.
fn tracking() -> Result<PathBuf, Error> {
    let all = hierarchies();
    all.iter()
        .find(|h| h.ends_with("pids"))
        .or(all.first())
        .cloned()
        .ok_or(Error::None)
}

/// Makes `<bed>/<sub>` in every hierarchy that takes processes and returns the directories.
pub fn ensure(bed: &str, sub: &str) -> Result<Vec<PathBuf>, Error> {
    let path = PathBuf::from(plan::cgroup(bed)).join(sub);
    let mut made = Vec::new();
    for hierarchy in hierarchies() {
        let mut dir = hierarchy;
        for part in &path {
            delegate(&dir);
            dir.push(part);
            if let Err(source) = fs::create_dir(&dir)
                && source.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(Error::Make {
                    path: dir.display().to_string(),
                    source,
                });
            }
            inherit_cpuset(&dir);
        }
        made.push(dir);
    }
    if made.is_empty() { Err(Error::None) } else { Ok(made) }
}

/// v2: passes all controllers on to children. A controller that cannot be passed on is not one a kubelet could use.
fn delegate(dir: &Path) {
    let Ok(controllers) = fs::read_to_string(dir.join("cgroup.controllers")) else {
        return;
    };
    for controller in controllers.split_whitespace() {
        fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).ok();
    }
}

/// v1: a new cpuset is empty and takes no process until it has what its parent has.
fn inherit_cpuset(dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = fs::read_to_string(dir.join(file)).unwrap_or_else(|_| "none".into());
        if own.trim().is_empty()
            && let Some(parent) = dir.parent().and_then(|p| fs::read_to_string(p.join(file)).ok())
        {
            fs::write(dir.join(file), parent.trim()).ok();
        }
    }
}

/// The processes in `<bed>/<sub>` and below; `sub` may be empty.
pub fn processes(bed: &str, sub: &str) -> Vec<i32> {
    let Ok(root) = tracking() else { return Vec::new() };
    let mut pids = Vec::new();
    for dir in tree(&root.join(plan::cgroup(bed)).join(sub)) {
        let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
    }
    pids
}

/// The existing cgroups `<bed>/<sub>` and below, children before parents; `sub` may be empty.
pub fn all(bed: &str, sub: &str) -> Vec<PathBuf> {
    hierarchies()
        .iter()
        .flat_map(|h| tree(&h.join(plan::cgroup(bed)).join(sub)))
        .collect()
}

/// The beds that have cgroups, also those without a directory of their own.
pub fn beds() -> Vec<String> {
    let Ok(root) = tracking() else { return Vec::new() };
    let entries = fs::read_dir(root)
        .map(|d| d.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    entries
        .iter()
        .filter_map(|e| e.file_name().to_str()?.strip_prefix("kntb.").map(str::to_owned))
        .collect()
}

/// A directory and all below it, children first; empty when there is none.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .flat_map(|e| tree(&e.path()))
        .collect();
    found.push(dir.into());
    found
}

/// Kills everything in `<bed>/<sub>` and below, also what is born meanwhile, and returns when all are gone.
pub async fn kill_all(bed: &str, sub: &str) -> Result<(), Error> {
    let poll = Duration::from_millis(20);
    let tries = Duration::from_secs(KILL_SECONDS).as_millis() / poll.as_millis();
    for _ in 0..tries {
        let pids = processes(bed, sub);
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        tokio::time::sleep(poll).await;
    }
    Err(Error::Immortal {
        group: format!("{bed}/{sub}"),
        pids: processes(bed, sub),
        seconds: KILL_SECONDS,
    })
}

/// Removes the cgroups `<bed>/<sub>` and below. The kernel lets go of a dead process's cgroup a moment after the process.
pub async fn remove(bed: &str, sub: &str) -> Result<(), Error> {
    for last in (0..50).map(|n| n == 49) {
        let failed = all(bed, sub).into_iter().find_map(|dir| match fs::remove_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Some((dir, source)),
            _ => None,
        });
        match failed {
            None => return Ok(()),
            Some((dir, source)) if last => {
                return Err(Error::Remove {
                    path: dir.display().to_string(),
                    source,
                });
            }
            Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    Ok(())
}
