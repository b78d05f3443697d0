//! The owner of the domain: starts everything, then feeds [`State`] and carries out its actions until it has ended.
//!
//! The only place that awaits more than one thing. It decides nothing that [`State`] could decide.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use kubernest_domain::machine::Machine;
use kubernest_domain::{Accelerator, Termination, xml};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, interval_at, sleep_until};

use crate::console::Console;
use crate::dhcp::server as dhcp;
use crate::helper::Helper;
use crate::hypervisor::{self, Guest};
use crate::state::{Action, Ending, Gone, Input, State};
use crate::{Args, LaunchError, daemon, failed, health, prepare, shares};

/// Time between two presses of the power button: a kernel that boots misses the first.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// How long libvirt may take from a guest's pause to the panic that caused it.
const SETTLE: Duration = Duration::from_secs(1);
/// How long the rest of the serial console may take to arrive once qemu is gone.
const DRAIN: Duration = Duration::from_secs(2);
/// How long libvirt may take to end qemu (it gives SIGTERM 10 s, then SIGKILL).
const DESTROY_LIMIT: Duration = Duration::from_secs(40);
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
    let (reason, message) = own(&mut running, &machine, &ready, &mut signals).await;
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
    guest: Guest,
    events: mpsc::UnboundedReceiver<Input>,
    console: Option<(Console, JoinHandle<()>)>,
    /// Ends with the name of the first helper that has ended.
    helpers: JoinSet<String>,
}

async fn start(args: &Args, machine: &Machine, ready: watch::Receiver<bool>) -> Result<Running, LaunchError> {
    health::serve(args.health_port, ready).await?;
    hypervisor::start_event_loop()?;
    let console = match machine.serial_console {
        true => Some(Console::listen(Path::new(xml::SERIAL_SOCKET)).map_err(LaunchError::Console)?),
        false => None,
    };
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
    let (sender, events) = mpsc::unbounded_channel();
    hypervisor.subscribe(sender)?;
    let xml = xml::domain(machine);
    tracing::debug!(xml, "domain");
    let guest = blocking(move || hypervisor.create(&xml)).await?;
    Ok(Running {
        guest,
        events,
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

/// Feeds the state machine until the domain has ended.
async fn own(running: &mut Running, machine: &Machine, ready: &watch::Sender<bool>, signals: &mut Signals) -> Ending {
    let far = Instant::now() + Duration::from_secs(1 << 30);
    let (mut grace, mut destroyed_by) = (far, far);
    let mut press = interval_at(far, PRESS_AGAIN);
    let mut state = State::NEW;
    let mut input = Input::Started;
    loop {
        tracing::debug!(?state, ?input, "step");
        let (next, actions) = state.step(input, machine.acpi);
        state = next;
        for action in actions {
            match action {
                Action::Ready(value) => drop(ready.send_replace(value)),
                Action::PowerButton => command(&running.guest, Guest::power_button),
                Action::StartGrace => {
                    grace = Instant::now() + Duration::from_secs(machine.grace_seconds);
                    press = interval_at(Instant::now() + PRESS_AGAIN, PRESS_AGAIN);
                }
                Action::Settle => grace = Instant::now() + SETTLE,
                Action::Destroy => {
                    command(&running.guest, Guest::destroy);
                    destroyed_by = Instant::now() + DESTROY_LIMIT;
                    (grace, press) = (far, interval_at(far, PRESS_AGAIN));
                }
            }
        }
        if let State::Ended(ending) = state {
            return ending;
        }
        input = tokio::select! {
            // What has happened to the domain goes before what it caused.
            biased;
            Some(event) = running.events.recv() => event,
            () = signals.stop() => Input::StopAsked,
            Some(Ok(helper)) = running.helpers.join_next() => Input::HelperDied(helper),
            () = sleep_until(grace) => {
                grace = far;
                Input::GraceElapsed
            }
            _ = press.tick() => Input::PressAgain,
            // libvirt itself hangs or is gone: with this process everything in the pod ends.
            () = sleep_until(destroyed_by) => Input::Gone(Gone::Destroyed),
        };
    }
}

/// Tells libvirt to do something; what comes of it arrives as an event.
fn command(guest: &Guest, what: fn(&Guest) -> Result<(), hypervisor::HypervisorError>) {
    let guest = guest.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = what(&guest) {
            tracing::warn!(error = crate::chain(&error), "commanding the domain");
        }
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
            .collect();
        termination.message = format!("{}; qemu's log ends: {}", termination.message, said.join("; "));
    }
    termination
}
