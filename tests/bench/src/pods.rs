//! Processes of a pod, seen from the machine: when its qemu started, and what memory it costs beyond the guest's own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
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

/// Seconds from the machine's start to the start of the pod's qemu.
pub fn qemu_start(uid: &str) -> Result<f64> {
    let qemu = processes(uid)?.into_iter().find(|process| {
        process
            .exe()
            .is_ok_and(|exe| exe.to_string_lossy().contains("qemu-system"))
    });
    let stat = qemu.context("the launcher pod runs no qemu")?.stat()?;
    Ok(stat.starttime as f64 / procfs::ticks_per_second() as f64)
}

/// Proportional set size of the pod by program, in MiB, without the guest's memory and qemu's translated code.
pub fn overhead(uid: &str) -> Result<BTreeMap<String, f64>> {
    let mut by_program = BTreeMap::new();
    for process in processes(uid)? {
        let name = process.stat()?.comm;
        let maps = process.smaps()?;
        let own: u64 = maps.iter().filter(|map| !is_guests(map)).map(pss).sum();
        *by_program.entry(name).or_insert(0.0) += own as f64 / MIB;
    }
    Ok(by_program)
}

fn pss(map: &MemoryMap) -> u64 {
    map.extension.map.get("Pss").copied().unwrap_or_default()
}

/// The guest's memory is a memfd, mapped by qemu and virtiofsd; translated code is the only memory that is both written
/// and executed.
fn is_guests(map: &MemoryMap) -> bool {
    // The name goes on with " (deleted)", in the same component of the path.
    let memfd = |path: &Path| path.to_string_lossy().starts_with("/memfd:memory-backend-memfd");
    let memory = matches!(&map.pathname, MMapPath::Path(path) if memfd(path));
    memory || map.perms.contains(MMPermissions::WRITE | MMPermissions::EXECUTE)
}
