//! libvirt's cache of what qemu can do, made when the image is built: asking qemu anew costs most of a start.
//!
//! libvirt believes a cached answer only if the programs' change times are those it has noted. Unpacking an image gives
//! every file a new one, so the two numbers are rewritten to the programs as they are here. What libvirt checks beyond
//! that (its version, access to /dev/kvm, the host's processor) stays checked. Any trouble here means no cache, no more.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Largest cache file looked at; a real one has 130 KiB.
const MAX_FILE: u64 = 4 << 20;

/// Copies the cache of the image into a session's cache directory.
pub fn install(from: &Path, cache: &Path, libvirtd: &Path) {
    match copy(from, &cache.join("libvirt/qemu/capabilities"), libvirtd) {
        Ok(files) => tracing::debug!(files, "installed libvirt's capability cache"),
        Err(error) => tracing::info!(%error, "no capability cache: libvirt will ask qemu"),
    }
}

fn copy(from: &Path, to: &Path, libvirtd: &Path) -> io::Result<usize> {
    let library = fs::metadata(libvirtd)?.ctime();
    let mut files = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let mut text = String::new();
        fs::File::open(entry.path())?.take(MAX_FILE).read_to_string(&mut text)?;
        let Some(emulator) = element(&text, "emulator").map(str::to_owned) else {
            continue;
        };
        let emulator = fs::metadata(emulator)?.ctime();
        fs::create_dir_all(to)?;
        fs::write(to.join(entry.file_name()), rewrite(&text, emulator, library))?;
        files += 1;
    }
    Ok(files)
}

/// Content of the first element of that name.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(content, _)| content)
}

/// The same answer for programs with these change times, in seconds since 1970.
fn rewrite(text: &str, emulator: i64, library: i64) -> String {
    let mut text = text.to_owned();
    for (name, time) in [("qemuctime", emulator), ("selfctime", library)] {
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
    #[test]
    fn capabilities_get_the_times_of_here() {
        let text = "<qemuCaps>\n  <emulator>/usr/bin/qemu</emulator>\n  <qemuctime>1</qemuctime>\n  <selfctime>2</selfctime>\n</qemuCaps>";
        let rewritten = super::rewrite(text, 77, 88);
        assert!(rewritten.contains("<qemuctime>77</qemuctime>") && rewritten.contains("<selfctime>88</selfctime>"));
        assert_eq!(super::element(text, "emulator"), Some("/usr/bin/qemu"));
        assert_eq!(super::rewrite("<a/>", 1, 2), "<a/>");
    }
}
