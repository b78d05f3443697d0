//! The serial console: qemu connects, each line goes to stdout and the last ones are kept.
//!
//! The launcher is the only reader, so nothing the guest says is stored anywhere but in the container's log, which
//! Kubernetes bounds. If stdout is not read, qemu waits and the guest's serial port with it; no memory grows.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::lines::{Lines, Tail};

/// The last lines of a console that is being read.
#[derive(Clone, Debug, Default)]
pub struct Console {
    tail: Tail,
}

impl Console {
    /// Listens at `path` for qemu and copies until it closes.
    pub fn listen(path: &Path) -> io::Result<(Self, tokio::task::JoinHandle<()>)> {
        let listener = UnixListener::bind(path)?;
        let console = Self::default();
        let task = tokio::spawn({
            let console = console.clone();
            async move {
                let result = match listener.accept().await {
                    Ok((stream, _)) => console.copy(stream).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    tracing::warn!(%error, "reading the serial console");
                }
            }
        });
        Ok((console, task))
    }

    /// Oldest first.
    pub fn tail(&self) -> Vec<String> {
        self.tail.to_vec()
    }

    async fn copy(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut stdout = tokio::io::stdout();
        let mut lines = Lines::default();
        let mut buffer = [0; 8192];
        loop {
            let n = stream.read(&mut buffer).await?;
            let mut out = Vec::with_capacity(n + 1);
            let say = |line: &[u8]| {
                self.tail.push(line);
                out.extend_from_slice(line);
                out.push(b'\n');
            };
            if n == 0 {
                lines.finish(say);
            } else {
                lines.push(&buffer[..n], say);
            }
            stdout.write_all(&out).await?;
            stdout.flush().await?;
            if n == 0 {
                return Ok(());
            }
        }
    }
}
