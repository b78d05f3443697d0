//! A picture on its way from a launcher to a client: never whole in memory, and not for long.

use std::{io, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    response::{IntoResponse, Response},
};
use futures::{Sink, SinkExt, Stream, StreamExt, channel::mpsc};
use kubernest_domain::control::SCREENSHOT_BYTES;
use tokio::time::timeout;

/// How long launcher and client may take for a picture, whichever is slow.
const LIMIT: Duration = Duration::from_secs(60);
/// Media type of pictures.
pub const PNG: &str = "image/png";

/// A picture of which the first byte is still to come.
pub struct Picture<S> {
    length: u64,
    pieces: S,
}

impl<S> Picture<S>
where
    S: Stream<Item = io::Result<Bytes>> + Send + Unpin + 'static,
{
    /// What a launcher has announced; `None` if it is no picture, or is larger than one may be.
    pub fn new(kind: Option<&HeaderValue>, length: Option<u64>, pieces: S) -> Option<Self> {
        let length = length.filter(|length| (1..=SCREENSHOT_BYTES).contains(length))?;
        (kind.is_some_and(|kind| kind == PNG)).then_some(Self { length, pieces })
    }

    /// Passes it on. One that breaks off is shorter than announced, which ends the client's connection.
    pub fn answer(self, held: impl Send + 'static) -> Response {
        let (out, pieces) = mpsc::channel(0);
        tokio::spawn(async move {
            // The body is asked for pieces only while its client takes them: the time is kept here.
            if timeout(LIMIT, relay(self.pieces, out)).await.is_err() {
                tracing::info!("a picture took longer than {LIMIT:?}");
            }
            drop(held);
        });
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static(PNG)),
            (CONTENT_LENGTH, HeaderValue::from(self.length)),
            // Whoever owns the launcher chooses the bytes.
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        ];
        (headers, Body::from_stream(pieces)).into_response()
    }
}

async fn relay(
    mut pieces: impl Stream<Item = io::Result<Bytes>> + Unpin,
    mut out: impl Sink<io::Result<Bytes>> + Unpin,
) {
    while let Some(piece) = pieces.next().await {
        if out.send(piece).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::BodyExt;

    use super::*;

    type Pieces = stream::Iter<std::vec::IntoIter<io::Result<Bytes>>>;

    fn pieces(text: &str) -> Pieces {
        let pieces: Vec<_> = text.split(' ').map(|piece| Ok(Bytes::from(piece.to_owned()))).collect();
        stream::iter(pieces)
    }

    #[test]
    fn picture_is_what_is_announced_as_one() {
        let png = HeaderValue::from_static(PNG);
        let html = HeaderValue::from_static("text/html");
        let is_one = |kind, length| Picture::new(kind, length, pieces("a")).is_some();
        assert!(is_one(Some(&png), Some(SCREENSHOT_BYTES)));
        for (kind, length) in [
            (None, Some(1)),
            (Some(&html), Some(1)),
            (Some(&png), None),
            (Some(&png), Some(0)),
            (Some(&png), Some(SCREENSHOT_BYTES + 1)),
        ] {
            assert!(!is_one(kind, length), "{kind:?} {length:?}");
        }
    }

    #[tokio::test]
    async fn picture_gives_its_place_back_when_its_client_goes() {
        let (held, given_back) = tokio::sync::oneshot::channel::<()>();
        let endless = stream::repeat_with(|| Ok(Bytes::from_static(b"x")));
        let kind = HeaderValue::from_static(PNG);
        let picture = Picture::new(Some(&kind), Some(1), endless).unwrap();
        drop(picture.answer(held));
        assert!(given_back.await.is_err());
    }

    #[tokio::test]
    async fn picture_comes_in_pieces() {
        let kind = HeaderValue::from_static(PNG);
        let picture = Picture::new(Some(&kind), Some(3), pieces("a b c")).unwrap();
        let response = picture.answer(());
        assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "abc");
    }
}
