//! Bytes from a guest or helper → lines of bounded length, and the last of them. No I/O.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Longest line passed on in bytes; longer ones are cut into several. Container runtimes cut at 16 KiB.
pub const MAX_LINE: usize = 4096;

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes bytes, gives the lines that they complete, without line ends.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    line(&self.partial);
                    self.partial.clear();
                }
                b'\r' => {}
                byte => {
                    self.partial.push(byte);
                    if self.partial.len() == MAX_LINE {
                        line(&self.partial);
                        self.partial.clear();
                    }
                }
            }
        }
    }

    /// The line without end that the stream ended in.
    pub fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            line(&self.partial);
            self.partial.clear();
        }
    }
}

/// The last lines of a stream; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Tail {
    /// Lines kept.
    pub const LINES: usize = 40;
    /// Bytes kept of a line.
    pub const WIDTH: usize = 200;

    /// Takes a line; empty ones are not worth keeping.
    pub fn push(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(&line[..line.len().min(Self::WIDTH)]);
        let text = text.replace(|c: char| c.is_control(), "");
        if text.trim().is_empty() {
            return;
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == Self::LINES {
            lines.pop_front();
        }
        lines.push_back(text);
    }

    /// Oldest first.
    pub fn to_vec(&self) -> Vec<String> {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut got) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.push(chunk, |line| got.push(line.to_vec()));
        }
        lines.finish(|line| got.push(line.to_vec()));
        got
    }

    #[test]
    fn lines_are_cut_at_ends_across_reads() {
        assert_eq!(
            lines(&[b"a\r", b"\nb", b"c\n\nrest"]),
            [b"a".to_vec(), b"bc".to_vec(), b"".to_vec(), b"rest".to_vec()]
        );
    }

    #[test]
    fn lines_without_end_are_bounded() {
        let got = lines(&[&vec![b'x'; 3 * MAX_LINE + 1]]);
        assert_eq!(
            got.iter().map(Vec::len).collect::<Vec<_>>(),
            [MAX_LINE, MAX_LINE, MAX_LINE, 1]
        );
    }

    #[test]
    fn tail_keeps_the_last_lines_printable_and_short() {
        let tail = Tail::default();
        for i in 0..100 {
            tail.push(format!("\u{1b}[0m{i}{}", "y".repeat(1000)).as_bytes());
        }
        tail.push(b"  \x07");
        tail.push(b"\xff\xfe end");
        let kept = tail.to_vec();
        assert_eq!(kept.len(), Tail::LINES);
        assert!(
            kept[0].starts_with("[0m61y") && kept[0].len() <= Tail::WIDTH,
            "{}",
            kept[0]
        );
        assert!(kept[39].ends_with(" end"), "{}", kept[39]);
    }
}
