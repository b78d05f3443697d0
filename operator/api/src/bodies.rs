//! Bodies of which the text is small and what becomes of it in memory is not: a value of two bytes may take some hundred
//! once it is read, and one write of a user must not cost everybody's webhooks their process.
//!
//! Values are counted before they are read. What is large is read one at a time.

use std::time::Duration;

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, StatusCode, header::CONTENT_LENGTH},
    response::{IntoResponse, Response},
};
use tokio::sync::{Mutex, MutexGuard};

/// Most values in an object, those in values among them. A machine with everything in it has some hundred.
pub const VALUES: usize = 16 << 10;

/// Bodies up to this size are taken as they come.
const SMALL_BYTES: usize = 64 << 10;
/// As many values are read as they come.
const FEW_VALUES: usize = 2 << 10;
/// The API server gives up on a webhook after as long.
const READING: Duration = Duration::from_secs(10);

/// Whose turn it is. What is given must be held until the answer is made.
#[derive(Debug, Default)]
pub struct Turns {
    bytes: Mutex<()>,
    values: Mutex<()>,
}

impl Turns {
    /// The body of a request, with the turn that one takes that is large.
    pub async fn read(
        &self,
        headers: &HeaderMap,
        body: Body,
        most: usize,
    ) -> Result<(Bytes, Option<MutexGuard<'_, ()>>), Response> {
        let length = headers
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        let turn = match length {
            Some(length) if length <= SMALL_BYTES => None,
            _ => Some(self.bytes.lock().await),
        };
        let reading = axum::body::to_bytes(body, most.min(length.unwrap_or(most)));
        match tokio::time::timeout(READING, reading).await {
            Ok(Ok(body)) => Ok((body, turn)),
            Ok(Err(error)) => {
                let why = format!("cannot read a body of up to {most} bytes: {error}");
                Err((StatusCode::PAYLOAD_TOO_LARGE, why).into_response())
            }
            Err(_) => Err(StatusCode::REQUEST_TIMEOUT.into_response()),
        }
    }

    /// The turn to read so many values; few need none.
    pub async fn many(&self, values: usize) -> Option<MutexGuard<'_, ()>> {
        match values {
            ..=FEW_VALUES => None,
            _ => Some(self.values.lock().await),
        }
    }
}

/// How many values a JSON text has at most: brackets and commas outside of strings.
pub fn values(json: &[u8]) -> usize {
    let (mut values, mut quoted, mut escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'{' | b'[' | b',' if !quoted => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_as_many_values_as_brackets_and_commas() {
        assert_eq!(values(br#"{"a":[1,2],"b{[,\\":"\",","c":"\\\\","d":{}}"#), 7);
        assert_eq!(values(b""), 0);
    }

    #[tokio::test]
    async fn bodies_that_are_large_wait_for_their_turn() {
        let turns = Turns::default();
        let headers = |length: usize| HeaderMap::from_iter([(CONTENT_LENGTH, length.into())]);
        let (large, turn) = turns
            .read(&headers(70_000), Body::from(vec![b' '; 70_000]), 80_000)
            .await
            .unwrap();
        assert_eq!((large.len(), turn.is_some()), (70_000, true));
        assert!(turns.bytes.try_lock().is_err());
        let small = turns.read(&headers(2), Body::from("{}"), 80_000).await.unwrap();
        assert!(small.1.is_none());
        drop(turn);
        // A length that is not told may be any.
        let unknown = turns.read(&HeaderMap::new(), Body::from("{}"), 80_000).await.unwrap();
        assert!(unknown.1.is_some());
        drop(unknown);
        for (told, sent) in [(90_000, 90_000), (2, 3)] {
            let refused = turns.read(&headers(told), Body::from(vec![b' '; sent]), 80_000).await;
            assert_eq!(refused.unwrap_err().status(), StatusCode::PAYLOAD_TOO_LARGE);
        }
        assert!(turns.many(FEW_VALUES).await.is_none());
        let held = turns.many(FEW_VALUES + 1).await;
        assert!(held.is_some() && turns.values.try_lock().is_err());
    }
}
