//! How many streams are open at once: in one replica, so that its memory is bounded, and of one namespace, so that none
//! keeps the others from their consoles.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Streams at once in one replica; each may hold some hundred KiB.
const STREAMS: usize = 256;
/// Of those, of one namespace.
const OF_A_NAMESPACE: usize = 64;

/// The places, taken by namespace. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Places(Arc<Mutex<BTreeMap<String, usize>>>);

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    namespace: String,
}

impl Places {
    /// Takes a place; `None` when there is none.
    pub fn take(&self, namespace: &str) -> Option<Place> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_namespace = taken.get(namespace).copied().unwrap_or_default();
        if of_namespace >= OF_A_NAMESPACE || taken.values().sum::<usize>() >= STREAMS {
            return None;
        }
        taken.insert(namespace.to_owned(), of_namespace + 1);
        Some(Place {
            places: self.clone(),
            namespace: namespace.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.namespace) {
            Some(number) if *number > 1 => *number -= 1,
            _ => drop(taken.remove(&self.namespace)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_one_namespace_leave_room_for_others() {
        let places = Places::default();
        let held: Vec<Place> = std::iter::from_fn(|| places.take("greedy")).collect();
        assert_eq!(held.len(), OF_A_NAMESPACE);
        let other = places.take("other");
        assert!(other.is_some());
        drop(held);
        assert!(places.take("greedy").is_some());
        drop(other);
        let all: Vec<Place> = (0..)
            .map_while(|n| places.take(&format!("n{n}")))
            .take(STREAMS + 1)
            .collect();
        assert_eq!(all.len(), STREAMS);
        drop(all);
        assert!(places.0.lock().unwrap().is_empty());
    }
}
