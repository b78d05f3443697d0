//! Commands to libvirt take effect in the order in which the owner asks for them: one thread makes them, one by one.
//!
//! The thread is none of tokio's, whose runtime would wait for it at the end: a libvirt that hangs holds up nobody but
//! the commands behind.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread;

type Call<T> = Box<dyn FnOnce(&T) + Send>;

/// Calls that wait for their turn, or for the one that is under way.
pub(crate) struct Queue<T> {
    calls: Sender<Call<T>>,
}

impl<T: Send + 'static> Queue<T> {
    /// Starts the thread; it ends after the last call once the queue is dropped.
    pub(crate) fn start(name: &str, callee: T) -> io::Result<Self> {
        let (sender, calls) = channel::<Call<T>>();
        let run = move || calls.into_iter().for_each(|call| call(&callee));
        thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { calls: sender })
    }

    /// Has a call made after all before it; returns at once.
    pub(crate) fn call(&self, call: impl FnOnce(&T) + Send + 'static) {
        // The thread lives as long as `self`.
        let _ = self.calls.send(Box::new(call));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn queue_keeps_the_order() {
        let (said, heard) = channel();
        let queue = Queue::start("test", said).unwrap();
        for (name, time) in [("suspend", 50), ("resume", 5), ("button", 0)] {
            queue.call(move |said| {
                thread::sleep(Duration::from_millis(time));
                said.send(name).unwrap();
            });
        }
        // What was asked for is done, even if nobody waits for it.
        drop(queue);
        assert_eq!(heard.iter().collect::<Vec<_>>(), ["suspend", "resume", "button"]);
    }
}
