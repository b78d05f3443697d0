//! How much of what takes memory is served at once: in one replica, so that its memory is bounded, and of one namespace or
//! address, so that none keeps the others from their consoles.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// How many there are.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// At once in one replica.
    all: usize,
    /// Of those, of one namespace or address.
    of_one: usize,
}

/// Streams: each may hold some hundred KiB.
pub const STREAMS: Room = Room { all: 256, of_one: 64 };
/// Machines in bodies: each may hold half a MiB.
pub const MACHINES: Room = Room { all: 16, of_one: 4 };

/// Connections: each may hold some 50 KiB. An API server has no more requests under way that change something
/// (--max-mutating-requests-inflight).
pub const CONNECTIONS: Room = Room { all: 1024, of_one: 256 };

/// The places, and who has taken them. Clones share them.
#[derive(Clone, Debug)]
pub struct Places {
    room: Room,
    taken: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    whose: String,
}

impl Places {
    /// All of them free.
    pub fn new(room: Room) -> Self {
        Self {
            room,
            taken: Arc::default(),
        }
    }

    /// Takes a place; `None` when there is none.
    pub fn take(&self, whose: &str) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_one = taken.get(whose).copied().unwrap_or_default();
        if of_one >= self.room.of_one || taken.values().sum::<usize>() >= self.room.all {
            return None;
        }
        taken.insert(whose.to_owned(), of_one + 1);
        Some(Place {
            places: self.clone(),
            whose: whose.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.whose) {
            Some(number) if *number > 1 => *number -= 1,
            _ => drop(taken.remove(&self.whose)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_one_namespace_leave_room_for_others() {
        let places = Places::new(STREAMS);
        let held: Vec<Place> = std::iter::from_fn(|| places.take("greedy")).collect();
        assert_eq!(held.len(), STREAMS.of_one);
        let other = places.take("other");
        assert!(other.is_some());
        drop(held);
        assert!(places.take("greedy").is_some());
        drop(other);
        let all: Vec<Place> = (0..)
            .map_while(|n| places.take(&format!("n{n}")))
            .take(STREAMS.all + 1)
            .collect();
        assert_eq!(all.len(), STREAMS.all);
        drop(all);
        assert!(places.taken.lock().unwrap().is_empty());
    }
}
