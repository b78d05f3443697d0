//! The ACPI power button, which is how a hypervisor asks a VM to shut down (`virsh shutdown`).
//!
//! Doing this here spares the node logind, D-Bus and udev. It only asks systemd; the order of stopping is the units'.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::command;
use crate::console::Console;

/// Bytes of `struct input_event` on 64-bit Linux (linux/input.h): two of time 8 bytes each, type, code, value.
const EVENT_SIZE: usize = 24;
/// `EV_KEY` and `KEY_POWER` of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// Name that the kernel's ACPI button driver gives the device.
const BUTTON: &str = "Power Button";

/// Starts a thread that powers off when the button is pressed.
pub fn watch(console: Console) {
    let failed = console.clone();
    let thread = std::thread::Builder::new().name("power".to_owned()).spawn(move || {
        if let Err(error) = serve(&console) {
            console.say(
                "power",
                &format!("the power button does not work ({error}); shut down from inside"),
            );
        }
    });
    if let Err(error) = thread {
        failed.complain("power", &error);
    }
}

fn serve(console: &Console) -> io::Result<()> {
    let device = find(Path::new("/sys/class/input"))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the VM has no ACPI power button"))?;
    let mut events = File::open(device)?;
    let mut event = [0; EVENT_SIZE];
    loop {
        events.read_exact(&mut event)?;
        if is_press(&event) {
            console.say("power", "power button pressed, shutting down");
            if let Err(error) = command::run("systemctl", &["--no-block", "poweroff"]) {
                console.complain("power", &error);
            }
        }
    }
}

fn find(sys_input: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(sys_input).ok()?.flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("event"))
        .find(|entry| fs::read_to_string(entry.path().join("device/name")).is_ok_and(|name| name.trim() == BUTTON))
        .map(|entry| Path::new("/dev/input").join(entry.file_name()))
}

fn is_press(event: &[u8; EVENT_SIZE]) -> bool {
    let kind = u16::from_ne_bytes([event[16], event[17]]);
    let code = u16::from_ne_bytes([event[18], event[19]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    kind == EV_KEY && code == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_press_is_told_from_release_and_other_keys() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = [0; EVENT_SIZE];
            bytes[16..18].copy_from_slice(&kind.to_ne_bytes());
            bytes[18..20].copy_from_slice(&code.to_ne_bytes());
            bytes[20..].copy_from_slice(&value.to_ne_bytes());
            bytes
        };
        assert!(is_press(&event(1, 116, 1)));
        assert!(!is_press(&event(1, 116, 0)));
        assert!(!is_press(&event(1, 30, 1)));
        assert!(!is_press(&event(0, 0, 0)));
    }

    #[test]
    fn power_button_is_found_by_name() {
        let sys = tempfile::tempdir().unwrap();
        for (event, name) in [("event0", "AT Keyboard\n"), ("event1", "Power Button\n")] {
            fs::create_dir_all(sys.path().join(event).join("device")).unwrap();
            fs::write(sys.path().join(event).join("device/name"), name).unwrap();
        }
        assert_eq!(find(sys.path()).unwrap(), Path::new("/dev/input/event1"));
    }
}
