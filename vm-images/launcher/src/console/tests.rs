//! A socket in the place of qemu, pipes in that of sessions.

use tokio::io::DuplexStream;

use super::*;

/// A console, its task, qemu's end of the serial port.
async fn console() -> (Console, tokio::task::JoinHandle<()>, UnixStream, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let (console, task) = Console::listen(&path).unwrap();
    let qemu = UnixStream::connect(&path).await.unwrap();
    (console, task, qemu, folder)
}

/// The client's end of a new session, which is attached when this returns.
async fn session(console: &Console) -> DuplexStream {
    let (client, server) = tokio::io::duplex(CHUNK);
    let before = console.output().clone();
    let attached = console.clone();
    tokio::spawn(async move { attached.attach(server).await });
    let is_new = |now: &mpsc::Sender<_>| before.as_ref().is_none_or(|before| !now.same_channel(before));
    while !console.output().as_ref().is_some_and(is_new) {
        tokio::task::yield_now().await;
    }
    client
}

async fn read(stream: &mut (impl AsyncRead + Unpin), expected: &str) {
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&got), expected);
}

async fn read_end(stream: &mut (impl AsyncRead + Unpin)) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&rest), "");
}

#[tokio::test]
async fn console_joins_the_newest_session_and_the_guest() {
    let (console, task, mut qemu, _folder) = console().await;
    let mut first = session(&console).await;
    qemu.write_all(b"login: ").await.unwrap();
    read(&mut first, "login: ").await;
    first.write_all(b"root\r").await.unwrap();
    read(&mut qemu, "root\r").await;

    let mut second = session(&console).await;
    read_end(&mut first).await;
    qemu.write_all(b"# ").await.unwrap();
    read(&mut second, "# ").await;
    drop(second);

    // Without a session as with one: the lines are kept, and a later session hears what follows.
    qemu.write_all(b"up\n").await.unwrap();
    let mut third = session(&console).await;
    qemu.write_all(b"down\n").await.unwrap();
    drop(qemu);
    let mut rest = String::new();
    third.read_to_string(&mut rest).await.unwrap();
    assert!(rest.ends_with("down\n"), "{rest}");
    task.await.unwrap();
    assert_eq!(console.tail(), ["login: # up", "down"]);
}

#[tokio::test]
async fn console_cuts_off_a_session_that_takes_nothing() {
    let (console, task, mut qemu, _folder) = console().await;
    let mut stuck = session(&console).await;
    // Far more than everything between holds: the guest gets through only once the session is gone.
    let lines = "x".repeat(63) + "\n";
    for _ in 0..16 << 10 {
        qemu.write_all(lines.as_bytes()).await.unwrap();
    }
    let mut taken = Vec::new();
    stuck.read_to_end(&mut taken).await.unwrap();
    assert!(taken.len() <= CHUNK * (CHUNKS + 2), "{} bytes", taken.len());
    drop(qemu);
    task.await.unwrap();
}
