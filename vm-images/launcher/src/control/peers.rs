//! A peer's share of the handshakes: whoever opens connections and says nothing takes nobody else's place.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most handshakes of one address at once.
const HANDSHAKES: usize = 4;

/// How many handshakes each address has under way; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Peers {
    /// A place for one more of this address, if it has one left.
    pub(super) fn admit(&self, peer: IpAddr) -> Option<Place> {
        // One address has one share, however the socket writes it.
        let peer = peer.to_canonical();
        let mut handshakes = self.lock();
        let count = handshakes.entry(peer).or_default();
        (*count < HANDSHAKES).then(|| {
            *count += 1;
            Place {
                peer,
                peers: self.clone(),
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handshake that may go on; over when dropped.
#[derive(Debug)]
pub(super) struct Place {
    peer: IpAddr,
    peers: Peers,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut handshakes = self.peers.lock();
        if let Some(count) = handshakes.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                handshakes.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_have_a_share_each() {
        let peers = Peers::default();
        let [silent, mapped, other] = ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let mut places: Vec<_> = (0..HANDSHAKES).map(|_| peers.admit(silent).unwrap()).collect();
        assert!(peers.admit(silent).is_none() && peers.admit(mapped).is_none());
        assert!(peers.admit(other).is_some());
        places.pop();
        let last = peers.admit(mapped).unwrap();
        assert!(peers.admit(silent).is_none());
        drop((places, last));
        assert!(peers.lock().is_empty(), "nobody is remembered");
    }
}
