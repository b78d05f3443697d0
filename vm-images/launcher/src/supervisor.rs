//! A machine from its first helper to its termination message: starts everything, hands it to the domain's [`Owner`],
//! and collects what is left at the end.
//!
//! It decides nothing that [`crate::state::State`] could decide.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use kubernest_domain::machine::Machine;
use kubernest_domain::{Accelerator, Termination, paths, xml};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use self::owner::Owner;
use crate::agent::{Agent, probe};
use crate::camera::Camera;
use crate::console::Console;
use crate::control::{self, Backend, Command, Screen};
use crate::dhcp::server as dhcp;
use crate::helper::Helper;
use crate::hypervisor::{self, Guest, HypervisorError};
use crate::listen::listen;
use crate::meter::Meter;
use crate::queue::Queue;
use crate::seat::Seat;
use crate::state::Input;
use crate::{Args, LaunchError, daemon, failed, health, prepare, processors, shares};

mod owner;

/// How long the rest of the serial console may take to arrive once qemu is gone.
const DRAIN: Duration = Duration::from_secs(2);
/// Commands that wait for the owner.
const COMMANDS: usize = 8;
/// Bytes of qemu's log that go into a termination message.
const QEMU_LOG_TAIL: u64 = 600;

/// Runs a machine to its end.
pub async fn supervise(args: &Args, machine: Machine) -> Termination {
    let (ready, watched) = watch::channel(false);
    let mut signals = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => Signals { terminate, interrupt },
        (Err(source), _) | (_, Err(source)) => return failed(&LaunchError::Signals(source)),
    };
    let begin = Instant::now();
    let started = tokio::select! {
        started = start(args, &machine, watched) => started,
        // Before qemu runs there is nothing to shut down.
        () = signals.stop() => {
            let message = "asked to stop before the guest started".to_owned();
            return Termination { reason: kubernest_domain::TerminationReason::Stopped, message, serial: Vec::new() };
        }
    };
    let mut running = match started {
        Ok(running) => running,
        Err(error) => return with_qemu_log(failed(&error), &machine.name),
    };
    tracing::info!(
        domain = machine.name,
        milliseconds = begin.elapsed().as_millis() as u64,
        "started"
    );
    let (reason, message) = Owner::new(&mut running, &machine, &ready, &mut signals).own().await;
    let _ = tokio::time::timeout(DRAIN, async {
        if let Some((_, task)) = &mut running.console {
            let _ = task.await;
        }
    })
    .await;
    let serial = running
        .console
        .as_ref()
        .map(|(console, _)| console.tail())
        .unwrap_or_default();
    let termination = Termination {
        reason,
        message,
        serial,
    };
    if reason.exit_code() == 0 {
        termination
    } else {
        with_qemu_log(termination, &machine.name)
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// All that lives while the domain does.
struct Running {
    /// To libvirt, but the last one.
    guest: Queue<Guest>,
    /// The end of qemu goes before what libvirt still has to do, or hangs at.
    end: Queue<Guest>,
    events: mpsc::UnboundedReceiver<Input>,
    /// The other end of `events`, for what becomes of commands to libvirt.
    outcomes: mpsc::UnboundedSender<Input>,
    agent: Agent,
    /// From the control port.
    commands: mpsc::Receiver<Command>,
    console: Option<(Console, JoinHandle<()>)>,
    /// Ends with the name of the first helper that has ended.
    helpers: JoinSet<String>,
}

async fn start(args: &Args, machine: &Machine, ready: watch::Receiver<bool>) -> Result<Running, LaunchError> {
    let meter = Meter::new(machine);
    let listener = listen(args.health_port).await.map_err(LaunchError::Health)?;
    health::serve(listener, ready, meter.clone());
    hypervisor::start_event_loop()?;
    let console = match machine.serial_console {
        true => Some(Console::listen(Path::new(xml::SERIAL_SOCKET)).map_err(LaunchError::Console)?),
        false => None,
    };
    let camera = Camera::default();
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (channel, connected) = watch::channel(false);
    let agent = Agent::new(connected);
    probe::serve(Path::new(paths::PROBE_SOCKET), agent.clone()).map_err(LaunchError::Probes)?;
    let backend = Backend {
        agent: agent.clone(),
        console: console.as_ref().map(|(console, _)| console.clone()),
        screen: machine.graphics.then(|| Screen {
            socket: xml::VNC_SOCKET.into(),
            seat: Seat::default(),
            camera: camera.clone(),
        }),
        commands: sender,
    };
    let listener = listen(args.control_port).await.map_err(LaunchError::Control)?;
    control::serve(listener, args.control_tls.clone(), backend);
    let mut helpers = JoinSet::new();
    for share in &machine.shares {
        watch_over(&mut helpers, shares::serve(&args.virtiofsd, share)?);
    }
    dhcp::serve(machine).await?;
    // Where the image was built there was no KVM; libvirt would believe so here too.
    let capability_cache = (machine.accelerator == Accelerator::Tcg).then_some(args.capability_cache.as_path());
    let (libvirtd, ()) = tokio::try_join!(
        async {
            daemon::start(&args.libvirtd, capability_cache)
                .await
                .map_err(LaunchError::from)
        },
        async { prepare::disks(&args.qemu_img, machine).await.map_err(LaunchError::from) },
    )?;
    let (daemon, hypervisor) = libvirtd;
    watch_over(&mut helpers, daemon);
    let (outcomes, events) = mpsc::unbounded_channel();
    hypervisor.subscribe(outcomes.clone())?;
    hypervisor.subscribe_agent(channel)?;
    let (xml, paused) = (xml::domain(machine), machine.start_paused);
    tracing::debug!(xml, "domain");
    let guest = blocking(move || hypervisor.create(&xml, paused)).await?;
    if let Some(pinning) = &machine.pinning {
        if machine.accelerator == Accelerator::Tcg {
            processors::pin_emulated(&machine.name, pinning)?;
        }
        tracing::info!(vcpus = ?pinning.vcpus, emulator = %pinning.emulator, "processors of its own");
    }
    meter.attach(guest.clone()).map_err(HypervisorError::Thread)?;
    if machine.graphics {
        camera.attach(guest.clone()).map_err(HypervisorError::Thread)?;
    }
    agent.attach(guest.clone()).map_err(HypervisorError::Thread)?;
    let queue = |name, guest| Queue::start(name, guest).map_err(HypervisorError::Thread);
    Ok(Running {
        end: queue("libvirt-end", guest.clone())?,
        guest: queue("libvirt-commands", guest)?,
        agent,
        events,
        outcomes,
        commands,
        console,
        helpers,
    })
}

fn watch_over(helpers: &mut JoinSet<String>, mut helper: Helper) {
    helpers.spawn(async move {
        let status = helper.child.wait().await;
        tracing::info!(helper = helper.name, ?status, said = ?helper.tail.to_vec(), "ended");
        helper.name
    });
}

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(call).await {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Adds the end of qemu's log, which often has the cause.
fn with_qemu_log(mut termination: Termination, domain: &str) -> Termination {
    let tail = std::fs::File::open(daemon::qemu_log(domain)).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(QEMU_LOG_TAIL)))?;
        let mut tail = Vec::new();
        file.take(QEMU_LOG_TAIL).read_to_end(&mut tail)?;
        Ok(tail)
    });
    if let Ok(tail) = tail
        && !tail.is_empty()
    {
        let tail = String::from_utf8_lossy(&tail);
        // Its command line stands in its log too, one argument a line.
        let said: Vec<_> = tail
            .lines()
            .filter(|line| line.starts_with("20") && !line.ends_with('\\'))
            // Not the cause of anything: we have asked the guest agent.
            .filter(|line| !line.contains("is tainted: custom-ga-command"))
            .collect();
        termination.message = format!("{}; qemu's log ends: {}", termination.message, said.join("; "));
    }
    termination
}
