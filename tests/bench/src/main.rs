//! `make bench`: what Kubernest costs in time, memory and writes, next to the same work without it in the same run.

mod by_hand;
mod figure;
mod machines;
mod readyz;
mod tenant;
mod writes;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use kubernest_e2e::{Outer, pods};

use crate::by_hand::ByHand;
use crate::figure::{Figure, median};

/// Longest that all of it may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// Measures an installed Kubernest on the bed that KUBERNEST_E2E_BED names. Run it with `make bench`.
#[derive(Debug, Parser)]
struct Args {
    /// The script that boots a node image without Kubernest.
    #[arg(long, default_value = "vm-images/node-image/boot")]
    boot: PathBuf,
    /// The archive of the node image that the cluster uses.
    #[arg(long)]
    node_image: PathBuf,
    /// The folder with kernel and initrd of the small guest.
    #[arg(long)]
    guest: PathBuf,
    /// Which part to measure; all when not given.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// The Kubernetes version in it.
    #[arg(long, default_value = "v1.35.4")]
    version: String,
    /// The tenant whose nodes are waited for.
    #[arg(long, default_value = "deploy/samples/tenantcluster.yaml")]
    sample: PathBuf,
    /// How often a start is measured, with and without Kubernest in turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds during which writes are counted at rest.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    rest: u64,
    /// Where the figures go.
    #[arg(long, default_value = "target/bench.json")]
    out: PathBuf,
}

/// A part of what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Tenant clusters.
    Tenants,
    /// Virtual machines.
    Machines,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let outer = Outer::open().await?;
    let by_hand = ByHand {
        boot: args.boot,
        image: args.node_image,
    };
    let measured = async {
        let mut figures = Vec::new();
        if args.only != Some(Part::Tenants) {
            let guest = machines::Guest(args.guest);
            figures.extend(machines::measure(&outer, &guest, args.runs).await?);
        }
        if args.only != Some(Part::Machines) {
            figures.extend(api_ready(&outer, &by_hand, &args.version, args.runs).await?);
            figures.extend(sample(&outer, &args.sample, Duration::from_secs(args.rest)).await?);
        }
        anyhow::Ok(figures)
    };
    // Whatever is waited for is given up together, so that nothing that was started stays.
    let figures = tokio::select! {
        measured = tokio::time::timeout(LIMIT, measured) => measured.context("not done within an hour")??,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
    };
    figure::report(&figures, &args.out)
}

/// A control plane through Kubernest and by hand, in turn.
async fn api_ready(outer: &Outer, by_hand: &ByHand, version: &str, runs: u32) -> Result<Vec<Figure>> {
    let (mut with, mut until_qemu, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        let start = tenant::start(outer, version).await?;
        let baseline = by_hand
            .run(start.bootstrap.path(), start.config, start.kvm)
            .await?
            .as_secs_f64();
        println!(
            "   run {run} of {runs}: apply to /readyz {:.1} s, of them {:.1} s until qemu starts; by hand {baseline:.1} s",
            start.ready, start.qemu
        );
        with.push(start.ready);
        until_qemu.push(start.qemu);
        without.push(baseline);
    }
    let mut figures = Vec::new();
    if let (Some(with), Some(until_qemu), Some(without)) = (median(with), median(until_qemu), median(without)) {
        figures.push(Figure::against("apply_to_api_ready", with, "s", without, 1.15));
        figures.push(Figure::alone("apply_to_qemu_start", until_qemu, "s", None));
    }
    Ok(figures)
}

/// The sample's nodes, then its machines' memory and Kubernest's writes while nothing happens.
async fn sample(outer: &Outer, manifest: &std::path::Path, rest: Duration) -> Result<Vec<Figure>> {
    let sample = tenant::Sample::apply(outer, manifest).await?;
    let mut figures = vec![Figure::alone("apply_to_nodes_ready", sample.ready, "s", None)];
    let mut audit = writes::Audit::open(&outer.bed.audit_log())?;
    let quiet = Duration::from_secs(20);
    if !audit.rest(quiet, Duration::from_secs(300)).await? {
        println!("   Kubernest did not come to rest within five minutes; its writes follow");
    }
    let (mut most, mut own, mut translated) = (0.0_f64, 0.0_f64, 0.0_f64);
    for launcher in sample.launchers().await? {
        let memory = pods::memory(&launcher.uid, None)?;
        let sum: f64 = memory.by_program.values().sum();
        println!(
            "   {}: {sum:.1} MiB beyond the guest's own ({:.1} MiB of them in no file) and {:.1} MiB of translated code: {:.1?}",
            launcher.machine, memory.in_no_file, memory.translated, memory.by_program
        );
        most = most.max(sum);
        own = own.max(memory.in_no_file);
        translated = translated.max(memory.translated);
    }
    figures.push(Figure::alone("vm_overhead_mib", most, "MiB", Some(90.0)));
    figures.push(Figure::alone("vm_overhead_in_no_file_mib", own, "MiB", None));
    figures.push(Figure::alone("vm_translated_code_mib", translated, "MiB", None));
    audit.since()?;
    tokio::time::sleep(rest).await;
    let (leases, others): (Vec<_>, Vec<_>) = audit
        .since()?
        .into_iter()
        .partition(|(write, _)| writes::is_lease(write));
    println!(
        "   writes in {} s at rest: {others:?}; renewals of leases: {leases:?}",
        rest.as_secs()
    );
    let a_minute = |writes: &[(String, usize)]| {
        let count: usize = writes.iter().map(|(_, count)| count).sum();
        count as f64 * 60.0 / rest.as_secs_f64()
    };
    figures.push(Figure::alone("idle_writes", a_minute(&others), "1/min", Some(0.0)));
    figures.push(Figure::alone("idle_lease_renewals", a_minute(&leases), "1/min", None));
    sample.delete().await?;
    Ok(figures)
}
