//! A websocket on one side, bytes on the other: KubeVirt's `plain.kubevirt.io` streams.
//!
//! Binary frames carry data, close 1000 is the end. Each side waits for the other, so nothing piles up. The client is
//! asked for a sign of life; one that is silent for a minute is gone.

use std::{io, net::SocketAddr, time::Duration};

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt, future};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UdpSocket},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{
    codec::{BytesCodec, Framed},
    udp::UdpFramed,
};

/// Subprotocol that upstream's clients offer.
const PROTOCOL: &str = "plain.kubevirt.io";
/// Largest message of a client; its terminal or proxy sends a few KiB at once.
const MESSAGE_BYTES: usize = 1 << 20;
/// How often the client is asked for a sign of life.
const PING: Duration = Duration::from_secs(1);
/// How long it may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// Lets a peer whose machine is gone be noticed, and small writes go at once.
pub fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let probes = TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5));
    SockRef::from(stream).set_tcp_keepalive(&probes)
}

/// Answers the upgrade, then carries bytes between the client and `stream` until either ends.
pub fn answer<S>(upgrade: WebSocketUpgrade, stream: S, held: impl Send + 'static) -> Response
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (out, input) = Framed::new(stream, BytesCodec::new()).split();
    accept(upgrade, input.map(|read| read.map(BytesMut::freeze)), out, held)
}

/// The same with datagrams to and from one address; each is a message.
pub fn answer_datagrams(
    upgrade: WebSocketUpgrade,
    socket: UdpSocket,
    to: SocketAddr,
    held: impl Send + 'static,
) -> Response {
    let (out, input) = UdpFramed::new(socket, BytesCodec::new()).split();
    let input = input.filter_map(move |read| {
        future::ready(match read {
            Ok((data, from)) => (from == to).then(|| Ok(data.freeze())),
            Err(error) => Some(Err(error)),
        })
    });
    let out = out.with(move |data: Bytes| future::ok::<_, io::Error>((data, to)));
    accept(upgrade, input, out, held)
}

fn accept<I, O>(upgrade: WebSocketUpgrade, input: I, out: O, held: impl Send + 'static) -> Response
where
    I: Stream<Item = io::Result<Bytes>> + Send + 'static,
    O: Sink<Bytes, Error = io::Error> + Send + 'static,
{
    upgrade
        .protocols([PROTOCOL])
        .max_message_size(MESSAGE_BYTES)
        .max_frame_size(MESSAGE_BYTES)
        .max_write_buffer_size(2 * MESSAGE_BYTES)
        .on_upgrade(|socket| async move {
            relay(socket, input, out).await;
            drop(held);
        })
}

/// Carries both ways until one side ends.
async fn relay<I, O>(socket: WebSocket, input: I, out: O)
where
    I: Stream<Item = io::Result<Bytes>>,
    O: Sink<Bytes, Error = io::Error>,
{
    let (to_client, from_client) = socket.split();
    // Two futures, so that a side that does not read can't keep the other from being read.
    tokio::select! {
        () = to_stream(from_client, out) => {}
        () = to_websocket(input, to_client) => {}
    }
}

async fn to_stream(
    mut client: impl Stream<Item = Result<Message, axum::Error>> + Unpin,
    out: impl Sink<Bytes, Error = io::Error>,
) {
    let mut out = Box::pin(out);
    let mut takes = true;
    while let Ok(Some(Ok(message))) = timeout(SILENCE, client.next()).await {
        let data = match message {
            Message::Binary(data) => data,
            Message::Text(text) => Bytes::from(text),
            Message::Close(_) => break,
            // Pings are answered by the library; any frame is a sign of life.
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        // A guest that takes no more may still have something to say: its end ends the stream.
        takes = takes && out.send(data).await.is_ok();
    }
}

async fn to_websocket(
    input: impl Stream<Item = io::Result<Bytes>>,
    mut client: impl Sink<Message, Error = axum::Error> + Unpin,
) {
    let mut input = Box::pin(input);
    let mut ping = interval(PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            read = input.next() => match read {
                Some(Ok(data)) => Message::Binary(data),
                Some(Err(_)) | None => break,
            },
            _ = ping.tick() => Message::Ping(Bytes::from_static(b"keep alive")),
        };
        if client.send(message).await.is_err() {
            return;
        }
    }
    let end = CloseFrame {
        code: close_code::NORMAL,
        reason: "".into(),
    };
    let _ = client.send(Message::Close(Some(end))).await;
}
