//! The serial console: qemu connects, each line goes to stdout and the last ones are kept; one session may join in.
//!
//! The launcher is the only reader, so nothing the guest says is stored anywhere but in the container's log, which
//! Kubernetes bounds. If stdout is not read, qemu waits and the guest's serial port with it; no memory grows. A session
//! is waited for as well, but not for long: one that takes nothing is cut off.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::lines::{Lines, Tail};
use crate::seat::{Place, Seat};

/// Most bytes read at once, from either side.
const CHUNK: usize = 4096;
/// Chunks on their way to or from a session.
const CHUNKS: usize = 16;
/// How long a session may take for one chunk.
const TAKE_LIMIT: Duration = Duration::from_secs(5);

/// A console that is being read; clones are the same.
#[derive(Clone, Debug)]
pub struct Console {
    tail: Tail,
    seat: Seat,
    /// What the guest says goes there too.
    output: Arc<Mutex<Option<mpsc::Sender<Vec<u8>>>>>,
    /// To the guest.
    input: mpsc::Sender<Vec<u8>>,
}

impl Console {
    /// Listens at `path` for qemu and copies until it closes, and until a session has got the last of it.
    pub fn listen(path: &Path) -> io::Result<(Self, tokio::task::JoinHandle<()>)> {
        let listener = UnixListener::bind(path)?;
        let (input, typed) = mpsc::channel(CHUNKS);
        let console = Self {
            tail: Tail::default(),
            seat: Seat::default(),
            output: Arc::default(),
            input,
        };
        let task = tokio::spawn({
            let console = console.clone();
            async move {
                let result = match listener.accept().await {
                    Ok((stream, _)) => console.copy(stream, typed).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    tracing::warn!(%error, "reading the serial console");
                }
                // The session ends when it has taken what is left.
                *console.output() = None;
                console.seat.free().await;
            }
        });
        Ok((console, task))
    }

    /// Oldest first.
    pub fn tail(&self) -> Vec<String> {
        self.tail.to_vec()
    }

    /// One session: the guest's output goes to `stream`, what comes from there to the guest. Ends an older session; ends
    /// when a newer one comes, the console or the stream ends, or the stream takes nothing for too long.
    pub async fn attach(&self, stream: impl AsyncRead + AsyncWrite) {
        let (place, output) = self.join();
        tracing::info!("a session has joined the console");
        let (read, mut write) = tokio::io::split(stream);
        let why = tokio::select! {
            why = show(output, &mut write) => why,
            why = enter(read, &self.input) => why,
            () = place.lost() => "a newer one has come",
        };
        tracing::info!(why, "a session has left the console");
        let _ = timeout(TAKE_LIMIT, write.shutdown()).await;
    }

    /// Takes the seat and the guest's output, both at once: of two that come together the same one has both.
    fn join(&self) -> (Place, mpsc::Receiver<Vec<u8>>) {
        let (sender, output) = mpsc::channel(CHUNKS);
        let mut current = self.output();
        *current = Some(sender);
        (self.seat.take(), output)
    }

    fn output(&self) -> MutexGuard<'_, Option<mpsc::Sender<Vec<u8>>>> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn copy(&self, stream: UnixStream, mut typed: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
        let (read, mut write) = stream.into_split();
        let typing = async {
            while let Some(chunk) = typed.recv().await {
                // A qemu that takes no more is about to end its output too, which is the news.
                if write.write_all(&chunk).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            result = self.spread(read) => result,
            () = typing => Ok(()),
        }
    }

    /// The guest's output to stdout, to the last lines and to the session.
    async fn spread(&self, mut stream: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut stdout = tokio::io::stdout();
        let mut lines = Lines::default();
        let mut buffer = [0; CHUNK];
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
            self.offer(&buffer[..n]).await;
        }
    }

    /// Waits for a session that is slow: it ends itself when it is too slow, and its end of the channel with it.
    async fn offer(&self, chunk: &[u8]) {
        let session = self.output().clone();
        if let Some(session) = session {
            let _ = session.send(chunk.to_vec()).await;
        }
    }
}

/// The guest's output to a session.
async fn show(mut output: mpsc::Receiver<Vec<u8>>, mut session: impl AsyncWrite + Unpin) -> &'static str {
    while let Some(chunk) = output.recv().await {
        let take = async {
            session.write_all(&chunk).await?;
            session.flush().await
        };
        match timeout(TAKE_LIMIT, take).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return "its connection broke",
            Err(_) => return "it did not take the guest's output",
        }
    }
    "the console has ended"
}

/// What a session types to the guest, no faster than the guest takes it.
async fn enter(mut session: impl AsyncRead + Unpin, input: &mpsc::Sender<Vec<u8>>) -> &'static str {
    let mut buffer = [0; CHUNK];
    loop {
        match session.read(&mut buffer).await {
            Ok(0) => return "it was closed",
            Err(_) => return "its connection broke",
            Ok(n) => {
                if input.send(buffer[..n].to_vec()).await.is_err() {
                    return "the console has ended";
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
