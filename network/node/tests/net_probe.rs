//! The accelerator probe on this machine, whatever it has.

use std::path::Path;
use std::time::{Duration, Instant};

use kubernest_node::accelerator::{Accelerator, LIMIT, probe};

#[tokio::test]
async fn net_probe_ends_in_time_and_gives_its_reason() {
    let started = Instant::now();
    let (accelerator, reason) = probe(Path::new(env!("CARGO_BIN_EXE_kubernest-node")), LIMIT).await;
    println!("{accelerator:?}: {reason}");
    assert!(started.elapsed() < LIMIT + Duration::from_secs(1));
    assert!(!reason.is_empty());
    if !Path::new("/dev/kvm").exists() {
        assert_eq!(accelerator, Accelerator::Tcg);
    }
}

#[tokio::test]
async fn net_probe_without_a_program_is_no_kvm() {
    let (accelerator, reason) = probe(Path::new("/nonexistent"), LIMIT).await;
    assert_eq!(accelerator, Accelerator::Tcg);
    assert!(reason.contains("did not start"), "{reason}");
}
