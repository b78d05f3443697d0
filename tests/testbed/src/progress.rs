//! Says on standard error what is done now and how long each step took: a spinner on a terminal, lines elsewhere.
//!
//! It deliberately decides nothing; a silent one does the same work.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;

/// Where progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// On standard error.
    Shown,
    /// Nowhere.
    Silent,
}

impl Progress {
    /// Runs a step and says what it is and how long it took.
    pub async fn step<T, E>(self, what: &str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        if self == Self::Silent {
            return work.await;
        }
        let started = Instant::now();
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(format!("{what} …"));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let result = work.await;
        if let Some(bar) = spinner {
            bar.finish_and_clear();
        }
        let mark = if result.is_ok() { "✓" } else { "✗" };
        eprintln!("{mark} {what:<58} {:>6.1} s", started.elapsed().as_secs_f64());
        result
    }
}
