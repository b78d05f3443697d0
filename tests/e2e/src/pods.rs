//! Processes of a pod, seen from the machine: when its qemu started, and what memory it costs beyond the guest's own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

const MIB: f64 = 1024.0 * 1024.0;

/// All processes in the pod's cgroups, those of its pause container as well.
pub fn processes(uid: &str) -> Result<Vec<Process>> {
    // The cgroupfs driver writes a pod's uid as it is, systemd's with underscores.
    let marks = [format!("pod{uid}"), format!("pod{}", uid.replace('-', "_"))];
    let of_pod = |process: &Process| {
        process.cgroups().is_ok_and(|groups| {
            groups
                .into_iter()
                .any(|one| marks.iter().any(|mark| one.pathname.contains(mark)))
        })
    };
    Ok(procfs::process::all_processes()?.flatten().filter(of_pod).collect())
}

fn qemu(uid: &str) -> Result<Process> {
    let qemu = processes(uid)?.into_iter().find(|process| {
        process
            .exe()
            .is_ok_and(|exe| exe.to_string_lossy().contains("qemu-system"))
    });
    qemu.context("the launcher pod runs no qemu")
}

/// Seconds from the machine's start to the start of the pod's qemu.
pub fn qemu_start(uid: &str) -> Result<f64> {
    let stat = qemu(uid)?.stat()?;
    Ok(stat.starttime as f64 / procfs::ticks_per_second() as f64)
}

/// Lets the container that runs qemu have so many bytes more memory than it has now.
///
/// # Errors
/// When there is none, or its cgroup can't be changed.
pub fn limit_memory(uid: &str, more: u64) -> Result<()> {
    let qemu = qemu(uid)?;
    let groups = qemu.cgroups()?.0;
    let mut of_memory = groups
        .iter()
        .filter(|one| one.controllers.iter().any(|name| name == "memory"));
    let (base, file, mark, group) = match (of_memory.next(), groups.iter().find(|one| one.hierarchy == 0)) {
        (Some(group), _) => (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            ["total_rss", "total_shmem"],
            group,
        ),
        (None, Some(group)) => ("/sys/fs/cgroup", "memory.max", ["anon", "shmem"], group),
        (None, None) => bail!("qemu is in no cgroup"),
    };
    let directory = Path::new(base).join(group.pathname.trim_start_matches('/'));
    let stat = std::fs::read_to_string(directory.join("memory.stat"))?;
    // Pages of files are no reason to kill anybody.
    let held: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| mark.contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
        .sum();
    let limit = (held + more).to_string();
    std::fs::write(directory.join(file), &limit).with_context(|| format!("{limit} to {file}"))
}

/// Memory of a pod in MiB, as proportional set size.
pub struct Memory {
    /// By program, without the guest's memory and without translated code.
    pub by_program: BTreeMap<String, f64>,
    /// What of it is in no file: other machines on the node share none of that, and the kernel can't drop it.
    pub in_no_file: f64,
    /// The guest's own, as far as it was ever touched.
    pub guest: f64,
    /// Code that qemu translated for an emulated guest.
    pub translated: f64,
}

impl Memory {
    /// All of it.
    pub fn all(&self) -> f64 {
        self.by_program.values().sum::<f64>() + self.guest + self.translated
    }
}

/// Measures it. The memory of a guest that shares none (with virtiofsd, for its filesystems) is told from qemu's own by its
/// size in bytes.
pub fn memory(uid: &str, unshared_guest: Option<u64>) -> Result<Memory> {
    let mut found = Memory {
        by_program: BTreeMap::new(),
        in_no_file: 0.0,
        guest: 0.0,
        translated: 0.0,
    };
    for process in processes(uid)? {
        let name = process.stat()?.comm;
        for map in process.smaps()? {
            let mib = pss(&map) as f64 / MIB;
            if is_translated(&map) {
                found.translated += mib;
                continue;
            }
            if is_guests(&map) || is_unshared_guests(&map, unshared_guest) {
                found.guest += mib;
                continue;
            }
            *found.by_program.entry(name.clone()).or_insert(0.0) += mib;
            if !matches!(map.pathname, MMapPath::Path(_)) {
                found.in_no_file += mib;
            }
        }
    }
    Ok(found)
}

fn pss(map: &MemoryMap) -> u64 {
    map.extension.map.get("Pss").copied().unwrap_or_default()
}

/// The guest's memory is a memfd, mapped by qemu and virtiofsd.
fn is_guests(map: &MemoryMap) -> bool {
    // The name goes on with " (deleted)", in the same component of the path.
    let memfd = |path: &Path| path.to_string_lossy().starts_with("/memfd:memory-backend-memfd");
    matches!(&map.pathname, MMapPath::Path(path) if memfd(path))
}

/// qemu maps it with a guard page behind it, so the kernel joins no other memory to it.
fn is_unshared_guests(map: &MemoryMap, bytes: Option<u64>) -> bool {
    matches!(map.pathname, MMapPath::Anonymous) && bytes == Some(map.address.1 - map.address.0)
}

/// Translated code is the only memory that is both written and executed.
fn is_translated(map: &MemoryMap) -> bool {
    map.perms.contains(MMPermissions::WRITE | MMPermissions::EXECUTE)
}
