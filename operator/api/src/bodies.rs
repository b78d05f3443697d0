//! Bodies of which the text is small and what becomes of it in memory is not: a value of two bytes may take some hundred
//! once it is read, and one write of a user must not cost everybody's webhooks their process.
//!
//! Values are counted before they are read, and many of them are read by one request at a time. Nothing waits before its
//! body is read: who sends slowly would keep all others waiting.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use tokio::sync::{Mutex, MutexGuard, OwnedSemaphorePermit, Semaphore};

/// Most values in an object, those in values among them. A machine with everything in it has some hundred.
pub const VALUES: usize = 16 << 10;

/// What is held of bodies at once, in bytes. What is [`SMALL_BYTES`] of each does not count.
const ROOM: usize = 16 << 20;
/// Nearly all objects are smaller: they are answered whatever else there is.
const SMALL_BYTES: usize = 64 << 10;
/// So few values are read whoever else reads some.
const FEW_VALUES: usize = 2 << 10;
/// How long a body may take to come.
const READING: Duration = Duration::from_secs(5);

/// What bodies may take of the process's memory.
#[derive(Debug)]
pub struct Bodies {
    room: Arc<Semaphore>,
    reading: Mutex<()>,
}

impl Default for Bodies {
    fn default() -> Self {
        Self {
            room: Arc::new(Semaphore::new(ROOM)),
            reading: Mutex::default(),
        }
    }
}

/// A body and the room that it takes.
pub struct Held {
    /// Its text.
    pub text: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Bodies {
    /// The body of a request.
    pub async fn read(&self, body: Body, most: usize) -> Result<Held, Response> {
        let read = tokio::time::timeout(READING, self.read_all(body, most)).await;
        read.unwrap_or(Err(StatusCode::REQUEST_TIMEOUT))
            .map_err(IntoResponse::into_response)
    }

    async fn read_all(&self, body: Body, most: usize) -> Result<Held, StatusCode> {
        let mut chunks = body.into_data_stream();
        let (mut text, mut room) = (Vec::new(), None::<OwnedSemaphorePermit>);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| StatusCode::BAD_REQUEST)?;
            if text.len() + chunk.len() > most {
                return Err(StatusCode::PAYLOAD_TOO_LARGE);
            }
            let more = (text.len() + chunk.len()).saturating_sub(SMALL_BYTES).min(chunk.len());
            let more = u32::try_from(more).map_err(|_| StatusCode::PAYLOAD_TOO_LARGE)?;
            let taken = self.room.clone().try_acquire_many_owned(more);
            let taken = taken.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
            match &mut room {
                Some(room) => room.merge(taken),
                None => room = Some(taken),
            }
            text.extend_from_slice(&chunk);
        }
        Ok(Held { text, _room: room })
    }

    /// To be held while so many values are read and decided upon.
    pub async fn turn(&self, values: usize) -> Option<MutexGuard<'_, ()>> {
        match values {
            ..=FEW_VALUES => None,
            _ => Some(self.reading.lock().await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bodies: &Bodies, bytes: usize) -> Result<Held, u16> {
        let held = bodies.read(Body::from(vec![b' '; bytes]), 8 << 20).await;
        held.map_err(|refused| refused.status().as_u16())
    }

    #[tokio::test]
    async fn bodies_have_room_for_small_ones_whatever_large_ones_take() {
        let bodies = Bodies::default();
        let one = read(&bodies, 8 << 20).await.unwrap();
        let other = read(&bodies, 8 << 20).await.unwrap();
        assert_eq!(one.text.len() + other.text.len(), 16 << 20);
        assert_eq!(read(&bodies, SMALL_BYTES * 3 + 1).await.err(), Some(503));
        assert_eq!(read(&bodies, SMALL_BYTES).await.unwrap().text.len(), SMALL_BYTES);
        drop(other);
        assert!(read(&bodies, 1 << 20).await.is_ok());
        assert_eq!(read(&bodies, (8 << 20) + 1).await.err(), Some(413));
        drop(one);
        assert_eq!(bodies.room.available_permits(), ROOM);
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_that_do_not_come_are_waited_for_in_vain() {
        let bodies = Bodies::default();
        let begun = futures::stream::iter([Ok::<_, std::io::Error>(vec![b' '; 1 << 20])]);
        let hanging = Body::from_stream(begun.chain(futures::stream::pending()));
        let refused = bodies.read(hanging, 8 << 20).await.err().unwrap();
        assert_eq!(refused.status(), StatusCode::REQUEST_TIMEOUT);
        assert_eq!(bodies.room.available_permits(), ROOM);
    }

    #[tokio::test]
    async fn bodies_of_many_values_are_read_one_at_a_time() {
        let bodies = Bodies::default();
        assert!(bodies.turn(FEW_VALUES).await.is_none());
        let held = bodies.turn(FEW_VALUES + 1).await;
        assert!(held.is_some() && bodies.reading.try_lock().is_err());
    }
}
