//! The serial console: one line a step, so that whoever looks at the VM from outside sees how far its node is.
//!
//! It writes only; the console is no way in.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use kubernest_bootstrap::CONSOLE_PREFIX;
use nix::fcntl::OFlag;

/// Longest line in bytes; the rest is cut, so that a unit's log cannot flood a slow line.
const LINE_MAX: usize = 400;

/// Where progress is told. Clones share one line, so lines never mix.
#[derive(Clone)]
pub struct Console {
    out: Arc<Mutex<Option<File>>>,
}

impl Console {
    /// Opens the terminal at `path`. Without one (a VM without serial port) lines go to the journal only.
    pub fn open(path: &Path) -> Self {
        // A service leads its session: without O_NOCTTY the line would become its terminal, and a hangup its end.
        let out = OpenOptions::new()
            .write(true)
            .custom_flags(OFlag::O_NOCTTY.bits())
            .open(path)
            .ok();
        Self {
            out: Arc::new(Mutex::new(out)),
        }
    }

    /// Says `kubernest-guest: <step>: <what>`.
    pub fn say(&self, step: &str, what: &str) {
        let line = line(step, what);
        eprintln!("{step}: {what}");
        if let Ok(mut out) = self.out.lock()
            && let Some(file) = out.as_mut()
        {
            // Nobody is left to be told when the console itself fails.
            let _ = file.write_all(line.as_bytes());
        }
    }

    /// Says that `step` failed, with the chain of causes.
    pub fn complain(&self, step: &str, error: &dyn std::error::Error) {
        self.say(step, &format!("FAILED: {}", chain(error)));
    }
}

/// An error and its causes in one line, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// One line for the terminal: printable, bounded, ended.
fn line(step: &str, what: &str) -> String {
    let mut text: String = format!("{CONSOLE_PREFIX}{step}: {what}")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.len() > LINE_MAX {
        let cut = (0..=LINE_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(cut);
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_line_is_one_bounded_printable_line() {
        let text = line("etcd", &format!("a\nb\x1b[2J{}", "é".repeat(500)));
        assert!(text.starts_with("kubernest-guest: etcd: a b [2J"));
        assert!(text.len() <= LINE_MAX + 1);
        assert_eq!(text.matches('\n').count(), 1);
    }
}
