//! The data disk: found by its serial, formatted when blank, checked, mounted, and bound to where its users look.
//!
//! It never formats a disk on which blkid finds anything at all.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kubernest_bootstrap::DATA_DISK_SERIAL;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::command::{self, CommandError};

/// Label of the data file system, so that a disk can be told from others on its own.
const LABEL: &str = "kubernest-data";

/// Folders of the data disk and where their users expect them; `None` for those that are used in place.
/// etcd's is 0700 as CIS benchmark 1.1.11 asks.
const FOLDERS: [(&str, u32, Option<&str>); 4] = [
    ("etcd", 0o700, None),
    ("kubelet", 0o750, Some("/var/lib/kubelet")),
    ("containerd", 0o711, Some("/var/lib/containerd")),
    ("log", 0o755, Some("/var/log")),
];

/// Why there is no usable data disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel's list of disks cannot be read.
    #[error("cannot list the disks")]
    List(#[source] std::io::Error),
    /// None has the serial.
    #[error("the VM has no disk with serial {DATA_DISK_SERIAL:?}; give its VirtualMachineInstance one")]
    Missing,
    /// Something other than ext4 lies there.
    #[error("the data disk {device} holds {found}, not ext4, and is left alone; attach a blank one")]
    Foreign {
        /// Which device.
        device: String,
        /// What blkid says.
        found: String,
    },
    /// blkid, mkfs or fsck failed.
    #[error("cannot prepare the data disk")]
    Prepare(#[source] CommandError),
    /// fsck found what it must not mend alone.
    #[error("the data disk {device} is damaged (e2fsck: {said}); repair it from outside or restore a backup")]
    Damaged {
        /// Which device.
        device: String,
        /// The end of what e2fsck said.
        said: String,
    },
    /// A folder could not be made.
    #[error("cannot make {}", .path.display())]
    Folder {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// mount(2) failed.
    #[error("cannot mount {}", .path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
}

/// What a disk holds, as far as formatting is concerned.
#[derive(Debug, PartialEq, Eq)]
enum Holds {
    Nothing,
    Ext4,
    Other(String),
}

/// Makes the data disk available at `data`; true if it was blank. Doing so twice changes nothing.
pub fn prepare(data: &Path) -> Result<bool, DiskError> {
    let mut blank = false;
    if !is_mounted(data) {
        let device = find(Path::new("/sys/block"))?;
        match probe(&device)? {
            Holds::Nothing => {
                format(&device)?;
                blank = true;
            }
            Holds::Ext4 => check(&device)?,
            Holds::Other(found) => return Err(DiskError::Foreign { device, found }),
        }
        make(data, 0o755)?;
        let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
        mount(Some(device.as_str()), data, Some("ext4"), flags, Some("commit=15")).map_err(|source| {
            DiskError::Mount {
                path: data.to_owned(),
                source,
            }
        })?;
    }
    for (name, mode, target) in FOLDERS {
        let folder = data.join(name);
        make(&folder, mode)?;
        if let Some(target) = target.map(Path::new).filter(|target| !is_mounted(target)) {
            make(target, mode)?;
            mount(Some(&folder), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|source| {
                DiskError::Mount {
                    path: target.to_owned(),
                    source,
                }
            })?;
        }
    }
    Ok(blank)
}

fn make(path: &Path, mode: u32) -> Result<(), DiskError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| DiskError::Folder {
            path: path.to_owned(),
            source,
        })
}

/// Whether something is mounted at exactly `path`.
pub fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1).map(Path::new) == Some(path))
}

/// The device whose virtio serial is [`DATA_DISK_SERIAL`], read from sysfs: there is no udev to make links.
fn find(sys_block: &Path) -> Result<String, DiskError> {
    for entry in fs::read_dir(sys_block).map_err(DiskError::List)?.flatten() {
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|serial| serial.trim() == DATA_DISK_SERIAL) {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(DiskError::Missing)
}

fn probe(device: &str) -> Result<Holds, DiskError> {
    // Low-level probing reads the disk itself and no cache; it ends with 2 when it finds nothing (blkid(8)).
    let output = command::output("blkid", &["-p", "-o", "export", device]).map_err(DiskError::Prepare)?;
    Ok(judge(output.status.code(), &String::from_utf8_lossy(&output.stdout)))
}

fn judge(status: Option<i32>, said: &str) -> Holds {
    match status {
        Some(2) if said.trim().is_empty() => Holds::Nothing,
        Some(0) if said.lines().any(|line| line == "TYPE=ext4") => Holds::Ext4,
        _ => {
            let found = said
                .lines()
                .find_map(|line| line.strip_prefix("TYPE=").or_else(|| line.strip_prefix("PTTYPE=")))
                .unwrap_or("something that blkid cannot name");
            Holds::Other(found.to_owned())
        }
    }
}

fn format(device: &str) -> Result<(), DiskError> {
    // Discarding is useless on a new sparse disk, and lazily initialised tables keep it sparse.
    let extended = "nodiscard,lazy_itable_init=1,lazy_journal_init=1";
    command::run(
        "mkfs.ext4",
        &["-q", "-F", "-m", "1", "-L", LABEL, "-E", extended, device],
    )
    .map(drop)
    .map_err(DiskError::Prepare)
}

fn check(device: &str) -> Result<(), DiskError> {
    let output = command::output("e2fsck", &["-p", device]).map_err(DiskError::Prepare)?;
    // 1: errors were corrected. 4 and up: errors are left (e2fsck(8)).
    if output.status.code().is_some_and(|code| code & !1 == 0) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let said = said.lines().last().unwrap_or_default().to_owned();
    Err(DiskError::Damaged {
        device: device.to_owned(),
        said,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_formatted_only_when_blkid_finds_nothing() {
        assert_eq!(judge(Some(2), ""), Holds::Nothing);
        assert_eq!(judge(Some(0), "DEVNAME=/dev/vdb\nTYPE=ext4\n"), Holds::Ext4);
        assert_eq!(judge(Some(0), "TYPE=xfs\n"), Holds::Other("xfs".to_owned()));
        assert_eq!(judge(Some(0), "PTTYPE=gpt\n"), Holds::Other("gpt".to_owned()));
        assert!(matches!(judge(Some(8), ""), Holds::Other(_)));
        assert!(matches!(judge(Some(4), ""), Holds::Other(_)));
        assert!(matches!(judge(None, ""), Holds::Other(_)));
    }

    #[test]
    fn disk_is_found_by_its_serial() {
        let sys = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root\n"), ("vdb", "data"), ("vdc", "")] {
            fs::create_dir(sys.path().join(name)).unwrap();
            fs::write(sys.path().join(name).join("serial"), serial).unwrap();
        }
        assert_eq!(find(sys.path()).unwrap(), "/dev/vdb");
        fs::remove_dir_all(sys.path().join("vdb")).unwrap();
        assert!(matches!(find(sys.path()), Err(DiskError::Missing)));
    }

    #[test]
    fn disk_probe_agrees_with_the_real_tools() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let device = path.to_str().unwrap();
        assert_eq!(probe(device).unwrap(), Holds::Nothing);
        format(device).unwrap();
        assert_eq!(probe(device).unwrap(), Holds::Ext4);
        check(device).unwrap();
    }
}
