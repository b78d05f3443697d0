//! One session at a time at a stream: the newest has the seat, unless it would rather leave it to who is there.

use std::sync::Arc;

use tokio::sync::watch;

/// The seat at one stream; clones are the same seat.
#[derive(Clone, Debug, Default)]
pub struct Seat {
    occupancy: Arc<watch::Sender<Occupancy>>,
}

#[derive(Debug, Default)]
struct Occupancy {
    /// Number of the newest session.
    newest: u64,
    /// It is still there.
    taken: bool,
}

impl Occupancy {
    fn sit(&mut self) -> u64 {
        self.taken = true;
        self.newest += 1;
        self.newest
    }
}

impl Seat {
    /// Takes the seat, whoever has it.
    pub fn take(&self) -> Place {
        let mut number = 0;
        self.occupancy.send_modify(|occupancy| number = occupancy.sit());
        self.place(number)
    }

    /// Takes the seat if nobody has it.
    pub fn take_free(&self) -> Option<Place> {
        let mut number = None;
        self.occupancy.send_if_modified(|occupancy| {
            number = (!occupancy.taken).then(|| occupancy.sit());
            number.is_some()
        });
        number.map(|number| self.place(number))
    }

    /// Waits until nobody has the seat.
    pub async fn free(&self) {
        // An error would mean that the sender is gone, which `self` holds.
        let _ = self.occupancy.subscribe().wait_for(|occupancy| !occupancy.taken).await;
    }

    fn place(&self, number: u64) -> Place {
        let seat = self.clone();
        Place { number, seat }
    }
}

/// The seat, taken by one session; left when dropped.
#[derive(Debug)]
pub struct Place {
    number: u64,
    seat: Seat,
}

impl Place {
    /// Waits until a newer session has taken the seat.
    pub async fn lost(&self) {
        let mut occupancy = self.seat.occupancy.subscribe();
        // An error would mean that the sender is gone, which `self` holds.
        let _ = occupancy.wait_for(|occupancy| occupancy.newest != self.number).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.seat.occupancy.send_if_modified(|occupancy| {
            let mine = occupancy.newest == self.number;
            occupancy.taken &= !mine;
            mine
        });
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn seat_is_the_newest_sessions() {
        let seat = Seat::default();
        let first = seat.take();
        assert!(seat.take_free().is_none());
        assert!(first.lost().now_or_never().is_none());
        let second = seat.take();
        assert!(first.lost().now_or_never().is_some());
        // Who has lost it does not leave it.
        drop(first);
        assert!(seat.take_free().is_none() && seat.free().now_or_never().is_none());
        assert!(second.lost().now_or_never().is_none());
        drop(second);
        assert!(seat.free().now_or_never().is_some());
        assert!(seat.take_free().is_some());
    }
}
