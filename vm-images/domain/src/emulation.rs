//! How much memory qemu's emulator (TCG) gets for the code that it translates. Operator and launcher both follow from it: what
//! the pod requests, and what the domain is started with.

const MIB: u64 = 1 << 20;
/// As a share of the guest's memory: larger guests run larger programs. A cache that is full is thrown away as a whole and filled
/// anew. A control plane of 2 GiB needs until all of it is Ready 249 s of processor time and 14 flushes with 256 MiB, 212 s
/// and 5 with 512 MiB, 187 s and 1 with 1 GiB; a quarter is where the guest's own memory is still most of the pod's.
const CACHE_SHARE: u64 = 4;
/// The cache of the smallest and of the largest guests.
const CACHE: std::ops::RangeInclusive<u64> = 32 * MIB..=512 * MIB;
/// What qemu keeps of the blocks in that cache, trees and a hash table, as a share of it: 50 MiB for 256 MiB of them.
const BLOCKS_SHARE: u64 = 5;

/// Bytes of the cache for translated code of a guest with so much memory.
pub fn translation_cache_bytes(guest_bytes: u64) -> u64 {
    (guest_bytes / CACHE_SHARE).clamp(*CACHE.start(), *CACHE.end())
}

/// Bytes that emulation costs beyond what a machine with KVM needs.
pub fn overhead_bytes(guest_bytes: u64) -> u64 {
    let cache = translation_cache_bytes(guest_bytes);
    cache + cache / BLOCKS_SHARE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_translation_cache_grows_with_the_guest() {
        let mib = |guest: u64| translation_cache_bytes(guest * MIB) / MIB;
        assert_eq!([64, 128, 1024, 2048, 65536].map(mib), [32, 32, 256, 512, 512]);
        assert_eq!(overhead_bytes(1 << 30) / MIB, 256 + 51);
    }
}
