//! libvirt's cache of what qemu can do, made when the image is built: asking qemu anew costs most of a start.
//!
//! libvirt believes a cached answer only if programs and modules have the times it has noted. Unpacking an image gives
//! every file new ones, so those numbers are rewritten to what they are here (libvirt's `virQEMUCapsIsValid`). What it
//! checks beyond that (its version, for one) stays checked. Only for emulation: that there is KVM after all libvirt does
//! not notice. Any trouble here means no cache, no more.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Largest cache file looked at; a real one has 130 KiB.
const MAX_FILE: u64 = 4 << 20;
/// Debian's folder of libvirt's drivers: a newer one makes libvirt ask again.
const DRIVERS: &str = "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver";
/// Debian's folder of qemu's modules.
const QEMU_MODULES: &str = "/usr/lib/x86_64-linux-gnu/qemu";

/// Times in seconds since 1970 that libvirt compares.
#[derive(Clone, Copy)]
struct Times {
    /// Change of the emulator.
    emulator: i64,
    /// Modification of the folder of its modules; 0 if there is none.
    modules: i64,
    /// Latest change of libvirtd and its drivers.
    libvirt: i64,
}

/// Copies the cache of the image into a session's cache directory.
pub fn install(from: &Path, cache: &Path, libvirtd: &Path) {
    match copy(from, &cache.join("libvirt/qemu/cache/capabilities"), libvirtd) {
        Ok(files) => tracing::debug!(files, "installed libvirt's capability cache"),
        Err(error) => tracing::info!(%error, "no capability cache: libvirt will ask qemu"),
    }
}

fn copy(from: &Path, to: &Path, libvirtd: &Path) -> io::Result<usize> {
    let mut libvirt = fs::metadata(libvirtd)?.ctime();
    for driver in fs::read_dir(DRIVERS)? {
        libvirt = libvirt.max(driver?.metadata()?.ctime());
    }
    let modules = fs::metadata(QEMU_MODULES).map_or(0, |folder| folder.mtime());
    let mut files = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let mut text = String::new();
        fs::File::open(entry.path())?.take(MAX_FILE).read_to_string(&mut text)?;
        let Some(emulator) = element(&text, "emulator") else {
            continue;
        };
        let emulator = fs::metadata(emulator)?.ctime();
        fs::create_dir_all(to)?;
        fs::write(
            to.join(entry.file_name()),
            rewrite(
                &text,
                Times {
                    emulator,
                    modules,
                    libvirt,
                },
            ),
        )?;
        files += 1;
    }
    Ok(files)
}

/// Content of the first element of that name.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(content, _)| content)
}

/// The same answer for programs with these times.
fn rewrite(text: &str, times: Times) -> String {
    let mut text = text.to_owned();
    for (name, time) in [
        ("qemuctime", times.emulator),
        ("qemumoddirmtime", times.modules),
        ("selfctime", times.libvirt),
    ] {
        if let Some(old) = element(&text, name) {
            text = text.replacen(
                &format!("<{name}>{old}</{name}>"),
                &format!("<{name}>{time}</{name}>"),
                1,
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_get_the_times_of_here() {
        let text = "<qemuCaps><emulator>/usr/bin/qemu</emulator><qemuctime>1</qemuctime>\
                    <qemumoddirmtime>2</qemumoddirmtime><selfctime>3</selfctime></qemuCaps>";
        let times = Times {
            emulator: 77,
            modules: 88,
            libvirt: 99,
        };
        assert_eq!(
            rewrite(text, times),
            "<qemuCaps><emulator>/usr/bin/qemu</emulator><qemuctime>77</qemuctime>\
             <qemumoddirmtime>88</qemumoddirmtime><selfctime>99</selfctime></qemuCaps>"
        );
        assert_eq!(element(text, "emulator"), Some("/usr/bin/qemu"));
        assert_eq!(rewrite("<a/>", times), "<a/>");
    }
}
