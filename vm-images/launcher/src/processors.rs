//! Which of the node's processors this container may use, and what runs on which of them.
//!
//! What goes where is [`kubernest_domain::processors`]' decision. Reads the kernel's own files, which are the same with
//! cgroups v1 and v2, and needs no privilege: it moves its own processes only, within what the container was given.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kubernest_domain::processors::{CpuSet, ParseCpuSetError, Pinning, Processors};
use nix::errno::Errno;
use nix::sched::sched_setaffinity;
use nix::unistd::Pid;

use crate::daemon;

/// Line of /proc/PID/status with what a process may use: its cgroup's processors, less what it keeps away from itself.
const ALLOWED: &str = "Cpus_allowed_list:";

/// Why the guest's processors are not known, or not its own.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorsError {
    /// The kernel's files.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What was wrong.
        source: io::Error,
    },
    /// A file that says something else.
    #[error("{path} names no processors")]
    Content {
        /// The file.
        path: PathBuf,
    },
    /// A list that is none.
    #[error(transparent)]
    Parse(#[from] ParseCpuSetError),
    /// The kernel refuses.
    #[error("binding thread {thread} to the processors {processors}")]
    Bind {
        /// The thread.
        thread: Pid,
        /// What it should run on.
        processors: CpuSet,
        /// What was wrong.
        source: Errno,
    },
    /// qemu names its threads otherwise.
    #[error("qemu has no thread of virtual CPU {0}")]
    NoThread(usize),
}

fn read(path: impl Into<PathBuf>) -> Result<String, ProcessorsError> {
    let path = path.into();
    fs::read_to_string(&path).map_err(|source| ProcessorsError::Read { path, source })
}

/// The processors that this container may use, by cores.
///
/// # Errors
/// When the kernel does not say.
pub fn own() -> Result<Processors, ProcessorsError> {
    let path = "/proc/self/status";
    let status = read(path)?;
    let list = status.lines().find_map(|line| line.strip_prefix(ALLOWED));
    let list = list.ok_or_else(|| ProcessorsError::Content { path: path.into() })?;
    // Not every machine tells of its cores; each processor is one then.
    let siblings = |number: u32| -> Option<CpuSet> {
        let path = format!("/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list");
        fs::read_to_string(path).ok()?.parse().ok()
    };
    Ok(Processors::new(list.parse()?, siblings))
}

/// Binds this process as far as it runs; what it starts from now on is bound alike.
///
/// # Errors
/// When the kernel refuses.
pub fn keep_to(processors: &CpuSet) -> Result<(), ProcessorsError> {
    for (thread, _) in threads(Path::new("/proc/self"))? {
        bind(thread, processors)?;
    }
    Ok(())
}

/// Binds the threads of an emulated guest's virtual CPUs, which libvirt does under KVM only. qemu's own name of such a
/// thread is `CPU 0/TCG`.
///
/// # Errors
/// When one is missing, or the kernel refuses.
pub fn pin_emulated(domain: &str, pinning: &Pinning) -> Result<(), ProcessorsError> {
    let path = daemon::pid_file(domain);
    let qemu = read(&path)?;
    let qemu: u32 = qemu.trim().parse().map_err(|_| ProcessorsError::Content { path })?;
    let threads = threads(&Path::new("/proc").join(qemu.to_string()))?;
    for (number, processor) in pinning.vcpus.iter().enumerate() {
        let name = format!("CPU {number}/TCG");
        let thread = threads.iter().find(|(_, found)| *found == name);
        let (thread, _) = thread.ok_or(ProcessorsError::NoThread(number))?;
        bind(*thread, &[*processor].into_iter().collect())?;
    }
    Ok(())
}

/// The threads of a process with their names.
fn threads(process: &Path) -> Result<Vec<(Pid, String)>, ProcessorsError> {
    let path = process.join("task");
    let failed = |source| ProcessorsError::Read {
        path: path.clone(),
        source,
    };
    let mut threads = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // One that ends meanwhile has no name any more.
        let name = fs::read_to_string(entry.path().join("comm"));
        if let (Some(number), Ok(name)) = (number, name) {
            threads.push((Pid::from_raw(number), name.trim_end().to_owned()));
        }
    }
    Ok(threads)
}

fn bind(thread: Pid, processors: &CpuSet) -> Result<(), ProcessorsError> {
    let bound = processors
        .iter()
        .try_fold(nix::sched::CpuSet::new(), |mut set, number| {
            // What does not fit a usize is refused as too large.
            set.set(usize::try_from(number).unwrap_or(usize::MAX))?;
            Ok(set)
        });
    match bound.and_then(|set| sched_setaffinity(thread, &set)) {
        // It has ended meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(source) => Err(ProcessorsError::Bind {
            thread,
            processors: processors.clone(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_of_this_process() {
        let here = own().unwrap();
        let said = std::process::Command::new("nproc").output().unwrap().stdout;
        assert_eq!(
            String::from_utf8(said).unwrap().trim(),
            here.allowed().len().to_string()
        );
    }

    #[test]
    fn processors_bind_what_is_started_later() {
        let first: CpuSet = own().unwrap().allowed().iter().take(1).collect();
        // A thread of its own: others of this program stay as they are.
        let said = std::thread::spawn(move || {
            bind(nix::unistd::gettid(), &first).unwrap();
            let nproc = std::process::Command::new("nproc").output().unwrap();
            String::from_utf8(nproc.stdout).unwrap()
        });
        assert_eq!(said.join().unwrap().trim(), "1");
        let none = bind(nix::unistd::gettid(), &"8191".parse().unwrap());
        assert!(matches!(none, Err(ProcessorsError::Bind { .. })), "{none:?}");
    }
}
