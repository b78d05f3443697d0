//! Taps that outlive their maker and that the launcher, and nobody else in the pod, may open (tuntap.rst of the kernel's
//! documentation). Only this module and the accelerator probe contain unsafe code.

#![allow(unsafe_code, reason = "tun devices are made by ioctl; each block is justified")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use kubernest_plan::{LAUNCHER_UID, TapName};
use nix::errno::Errno;
use nix::libc::{self, c_int};

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no tun, or the agent may not use it.
    #[error("open {path}: the kernel needs CONFIG_TUN, kubernest-node must run privileged")]
    Open {
        /// The device node.
        path: String,
        #[allow(missing_docs)]
        source: io::Error,
    },
    /// The device was not made.
    #[error("make {0}")]
    Make(TapName, #[source] Errno),
    /// It cannot be given to the launcher.
    #[error("give {0} to the launcher's user")]
    Own(TapName, #[source] Errno),
    /// It would not outlive us.
    #[error("keep {0}")]
    Persist(TapName, #[source] Errno),
}

/// linux/if_tun.h: all are `_IOW('T', n, int)`, whatever they take.
mod ioctl {
    #![allow(missing_docs, reason = "named as in the kernel")]

    use super::{c_int, libc};

    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<c_int>()),
        libc::ifreq
    );
    nix::ioctl_write_int_bad!(tunsetpersist, nix::request_code_write!(b'T', 203, size_of::<c_int>()));
    nix::ioctl_write_int_bad!(tunsetowner, nix::request_code_write!(b'T', 204, size_of::<c_int>()));
    nix::ioctl_write_int_bad!(tunsetgroup, nix::request_code_write!(b'T', 206, size_of::<c_int>()));
}

/// Opens a tap by name through a tun device node, in the network namespace of the calling thread: makes it if it is not
/// there, else attaches to it, which the kernel allows to its owner only.
///
/// # Errors
/// [`TapError::Open`], [`TapError::Make`].
pub fn open(device_node: &Path, name: &TapName) -> Result<File, TapError> {
    let opened = OpenOptions::new().read(true).write(true).open(device_node);
    let tun = opened.map_err(|source| TapError::Open {
        path: device_node.display().to_string(),
        source,
    })?;
    // SAFETY: ifreq is plain data of integers, bytes and a union of such; all zeroes is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
        // A tap's name is ASCII and at most six bytes, so the closing zero stays.
        *to = libc::c_char::from_ne_bytes([from]);
    }
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the flags are 16 bits wide in the kernel's interface"
    )]
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: the descriptor is open and `request` is a whole ifreq that outlives the call.
    unsafe { ioctl::tunsetiff(tun.as_raw_fd(), &raw const request) }
        .map_err(|errno| TapError::Make(name.clone(), errno))?;
    Ok(tun)
}

/// Makes a tap of the launcher's user in the network namespace of the calling thread, or takes over one that is there.
///
/// # Errors
/// See [`TapError`].
pub fn create(name: &TapName) -> Result<(), TapError> {
    let tun = open(Path::new("/dev/net/tun"), name)?;
    let uid = LAUNCHER_UID as c_int;
    let own = |errno| TapError::Own(name.clone(), errno);
    // SAFETY: the descriptor is open and attached to a tap; these take an integer by value and no memory.
    unsafe { ioctl::tunsetowner(tun.as_raw_fd(), uid) }.map_err(own)?;
    // SAFETY: as above.
    unsafe { ioctl::tunsetgroup(tun.as_raw_fd(), uid) }.map_err(own)?;
    // SAFETY: as above.
    unsafe { ioctl::tunsetpersist(tun.as_raw_fd(), 1) }.map_err(|errno| TapError::Persist(name.clone(), errno))?;
    Ok(())
}
