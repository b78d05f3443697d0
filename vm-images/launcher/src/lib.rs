//! The launcher: reads a launch document, prepares disks, runs one libvirt domain and reports how it ended.
//!
//! It holds no credential of a Kubernetes API and calls nobody: Kubernetes sees its readiness, exit code and termination
//! message; its stdout is the guest's serial console, its stderr the structured log. `kubernest-api` alone reaches the
//! running guest, through the control port. It does not decide what to run (the machine
//! controller does) and touches no network device (the node agent does).

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use kubernest_domain::machine::Machine;
use kubernest_domain::processors::Processors;
use kubernest_domain::{LAUNCH_ENV, Launch, ParseLaunchError, Termination, TerminationReason, paths, plan};

pub mod agent;
pub mod camera;
mod capabilities;
pub mod console;
pub mod control;
pub mod daemon;
pub mod dhcp;
pub mod health;
pub mod helper;
#[allow(unsafe_code)]
pub mod hypervisor;
pub mod lines;
pub mod listen;
pub mod meter;
pub mod picture;
pub mod prepare;
pub mod processors;
mod queue;
pub mod seat;
pub mod shares;
pub mod state;
pub mod supervisor;

/// Flags; the defaults are what a launcher pod offers.
#[derive(Debug, Parser)]
#[command(version, about = "Runs one virtual machine in one pod")]
pub struct Args {
    /// The launch document, JSON.
    #[arg(long, env = LAUNCH_ENV, hide_env_values = true)]
    pub launch: String,
    /// Where the termination message goes.
    #[arg(long, env = "KUBERNEST_TERMINATION_LOG", default_value = paths::TERMINATION_LOG)]
    pub termination_log: PathBuf,
    /// TCP port of /livez and /readyz.
    #[arg(long, env = "KUBERNEST_HEALTH_PORT", default_value_t = paths::HEALTH_PORT)]
    pub health_port: u16,
    /// TCP port of console, screen and commands.
    #[arg(long, env = "KUBERNEST_CONTROL_PORT", default_value_t = paths::CONTROL_PORT)]
    pub control_port: u16,
    /// Folder with that port's tls.crt and tls.key, and with the CA of its clients, ca.crt.
    #[arg(long, env = "KUBERNEST_CONTROL_TLS", default_value = paths::CONTROL_TLS)]
    pub control_tls: PathBuf,
    /// What is logged to stderr, in tracing-subscriber's syntax.
    #[arg(long, env = "KUBERNEST_LOG", default_value = "info")]
    pub log_filter: String,
    /// libvirt's daemon.
    #[arg(long, env = "KUBERNEST_LIBVIRTD", default_value = "/usr/sbin/libvirtd")]
    pub libvirtd: PathBuf,
    /// The virtiofs daemon, 1.13 or newer.
    #[arg(long, env = "KUBERNEST_VIRTIOFSD", default_value = "/usr/libexec/virtiofsd")]
    pub virtiofsd: PathBuf,
    /// qemu's tool for disk images.
    #[arg(long, env = "KUBERNEST_QEMU_IMG", default_value = "/usr/bin/qemu-img")]
    pub qemu_img: PathBuf,
    /// libvirt's capability cache as the image was built with.
    #[arg(
        long,
        env = "KUBERNEST_CAPABILITY_CACHE",
        default_value = "/usr/share/kubernest/libvirt-cache"
    )]
    pub capability_cache: PathBuf,
}

/// Why a domain never ran.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The document is not what a controller writes.
    #[error("reading the launch document")]
    Parse(#[from] ParseLaunchError),
    /// It asks for what can't be served.
    #[error(transparent)]
    Plan(#[from] plan::PlanError),
    /// Processors of its own.
    #[error("dedicated processors")]
    Processors(#[from] processors::ProcessorsError),
    /// Signal handlers.
    #[error("listening for signals")]
    Signals(#[source] std::io::Error),
    /// Health port.
    #[error("serving health")]
    Health(#[source] listen::ListenError),
    /// Control port.
    #[error("serving the control port")]
    Control(#[source] listen::ListenError),
    /// Disks.
    #[error(transparent)]
    Prepare(#[from] prepare::PrepareError),
    /// Shares.
    #[error(transparent)]
    Share(#[from] shares::ShareError),
    /// libvirtd.
    #[error("starting libvirtd")]
    Daemon(#[from] daemon::DaemonError),
    /// Serial console.
    #[error("listening for the serial console")]
    Console(#[source] std::io::Error),
    /// Probes through the guest agent.
    #[error("serving probes")]
    Probes(#[source] std::io::Error),
    /// DHCP.
    #[error("serving DHCP")]
    Dhcp(#[from] dhcp::server::DhcpError),
    /// libvirt.
    #[error("starting the domain")]
    Domain(#[from] hypervisor::HypervisorError),
}

/// Runs the machine until it ends; writes the termination message; the exit code says whether it ended as it should.
pub async fn run(args: Args) -> ExitCode {
    let termination = match machine(&args.launch) {
        Ok(machine) => supervisor::supervise(&args, machine).await,
        Err(error) => failed(&error),
    };
    tracing::info!(reason = ?termination.reason, message = termination.message, "ended");
    report(&args.termination_log, &termination);
    ExitCode::from(termination.reason.exit_code())
}

/// The machine to run. Where the guest has processors of its own and qemu's threads are kept apart from them, so is this
/// process from now on, and what it starts.
fn machine(launch: &str) -> Result<Machine, LaunchError> {
    let launch = Launch::parse(launch)?;
    let processors = match launch.dedicated() {
        Some(_) => processors::own()?,
        None => Processors::default(),
    };
    let machine = plan::machine(&launch, &processors)?;
    if let Some(pinning) = machine.pinning.as_ref().filter(|pinning| pinning.isolated) {
        processors::keep_to(&pinning.emulator)?;
    }
    Ok(machine)
}

/// The termination of a launcher whose domain never ran.
fn failed(error: &LaunchError) -> Termination {
    Termination {
        reason: TerminationReason::LaunchFailed,
        message: chain(error),
        serial: Vec::new(),
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn report(path: &Path, termination: &Termination) {
    if let Err(error) = std::fs::write(path, termination.to_json()) {
        tracing::error!(%error, path = %path.display(), "writing the termination message");
    }
}
