//! libvirt, as little of it as needed: connect, create, pause, power button, reset, destroy, screen, the guest's agent,
//! events.
//!
//! Calls block (they are remote procedure calls to libvirtd): the supervisor makes them on threads of their own. The
//! event loop has one too, for the life of the process. Nothing here decides anything.

use std::ffi::{c_int, c_void};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::stream::Stream;

use crate::state::{Cause, Gone, Input};

/// Why libvirt did not do it.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// Event loop.
    #[error("registering libvirt's event loop")]
    EventLoop(#[source] virt::error::Error),
    /// Thread of the event loop, or of commands.
    #[error("starting a thread for libvirt")]
    Thread(#[source] std::io::Error),
    /// Connection.
    #[error("connecting")]
    Connect(#[source] virt::error::Error),
    /// Event registration.
    #[error("registering for events")]
    Register(#[source] virt::error::Error),
    /// The domain.
    #[error("creating the domain")]
    Create(#[source] virt::error::Error),
    /// Power button.
    #[error("pressing the power button")]
    PowerButton(#[source] virt::error::Error),
    /// Pause.
    #[error("pausing the domain")]
    Suspend(#[source] virt::error::Error),
    /// End of a pause.
    #[error("resuming the domain")]
    Resume(#[source] virt::error::Error),
    /// Reboot.
    #[error("asking the guest to reboot")]
    Reboot(#[source] virt::error::Error),
    /// Reset.
    #[error("resetting the domain")]
    Reset(#[source] virt::error::Error),
    /// The guest agent.
    #[error("asking the guest agent")]
    Agent(#[source] virt::error::Error),
    /// The guest agent does not answer, or not in time.
    #[error("the guest agent does not answer")]
    AgentSilent(#[source] virt::error::Error),
    /// The domain's state.
    #[error("asking whether the domain is paused")]
    State(#[source] virt::error::Error),
    /// Destruction.
    #[error("destroying the domain")]
    Destroy(#[source] virt::error::Error),
    /// Picture of the screen.
    #[error("taking a picture of the screen")]
    Screenshot(#[source] virt::error::Error),
    /// Figures.
    #[error("reading what {of} has used")]
    Usage {
        /// The domain or a device of it.
        of: String,
        /// What libvirt said.
        #[source]
        source: virt::error::Error,
    },
}

/// Starts libvirt's event loop; once per process, before the first connection.
pub fn start_event_loop() -> Result<(), HypervisorError> {
    // libvirt prints errors that it also returns; they are logged where they are handled.
    virt::error::clear_error_callback();
    virt::event::event_register_default_impl().map_err(HypervisorError::EventLoop)?;
    let run = || {
        loop {
            if let Err(error) = virt::event::event_run_default_impl() {
                tracing::error!(%error, "libvirt's event loop");
            }
        }
    };
    std::thread::Builder::new()
        .name("libvirt-events".into())
        .spawn(run)
        .map_err(HypervisorError::Thread)?;
    Ok(())
}

/// A connection to this pod's libvirtd.
#[derive(Debug, Clone)]
pub struct Hypervisor {
    connect: Connect,
}

impl Hypervisor {
    /// Connects to the session daemon that listens at `socket`.
    pub fn connect(socket: &Path) -> Result<Self, HypervisorError> {
        let uri = format!("qemu+unix:///session?socket={}", socket.display());
        Ok(Self {
            connect: Connect::open(Some(&uri)).map_err(HypervisorError::Connect)?,
        })
    }

    /// Sends what happens to domains of this connection, from now on.
    pub fn subscribe(&self, events: mpsc::UnboundedSender<Input>) -> Result<(), HypervisorError> {
        type Callback =
            unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
        // SAFETY: libvirt's C API takes every event's callback as one generic type and, for LIFECYCLE, calls it with
        // the signature of `virConnectDomainEventCallback` (libvirt-domain.h), which `on_lifecycle` has; both are
        // function pointers, so of one size.
        let callback = unsafe { std::mem::transmute::<Callback, AnyCallback>(on_lifecycle) };
        // SAFETY: `on_lifecycle` takes the opaque pointer for what is boxed here, and `free` drops just that.
        unsafe { self.register(virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, callback, events) }
    }

    /// Says whether the guest agent is connected, from now on. The guest may change that as often as it likes: only the
    /// last is kept.
    pub fn subscribe_agent(&self, connected: watch::Sender<bool>) -> Result<(), HypervisorError> {
        type Callback =
            unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, c_int, c_int, *mut c_void);
        // SAFETY: as above, for AGENT_LIFECYCLE with `virConnectDomainEventAgentLifecycleCallback`.
        let callback = unsafe { std::mem::transmute::<Callback, AnyCallback>(on_agent) };
        // SAFETY: `on_agent` takes the opaque pointer for what is boxed here, and `free` drops just that.
        unsafe { self.register(virt_sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, callback, connected) }
    }

    /// Registers for an event of all domains.
    ///
    /// # Safety
    /// `callback` must have the signature of this event's, and take its opaque pointer for a `T` that it borrows.
    unsafe fn register<T: Send + 'static>(
        &self,
        event: virt_sys::virDomainEventID,
        callback: AnyCallback,
        listener: T,
    ) -> Result<(), HypervisorError> {
        let opaque = Box::into_raw(Box::new(listener)).cast::<c_void>();
        // SAFETY: the connection is alive as `self` holds a reference to it; a null domain means all domains; `opaque`
        // stays valid until libvirt calls `free` on it, once, when the callback is deregistered.
        let id = unsafe {
            virt_sys::virConnectDomainEventRegisterAny(
                self.connect.as_ptr(),
                std::ptr::null_mut(),
                event as c_int,
                Some(callback),
                opaque,
                Some(free::<T>),
            )
        };
        if id < 0 {
            // SAFETY: on failure libvirt has not taken `opaque`.
            unsafe { free::<T>(opaque) };
            return Err(HypervisorError::Register(virt::error::Error::last_error()));
        }
        Ok(())
    }

    /// Creates and starts a transient domain; a paused one executes nothing before [`Guest::resume`].
    pub fn create(&self, xml: &str, paused: bool) -> Result<Guest, HypervisorError> {
        let flags = match paused {
            true => virt_sys::VIR_DOMAIN_START_PAUSED,
            false => virt_sys::VIR_DOMAIN_NONE,
        };
        let domain = Domain::create_xml(&self.connect, xml, flags).map_err(HypervisorError::Create)?;
        let connect = self.connect.clone();
        Ok(Guest { connect, domain })
    }
}

/// The running domain.
#[derive(Debug, Clone)]
pub struct Guest {
    connect: Connect,
    domain: Domain,
}

impl Guest {
    /// Presses the ACPI power button.
    pub fn power_button(&self) -> Result<(), HypervisorError> {
        let flags = virt_sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN;
        self.domain
            .shutdown_flags(flags)
            .map(drop)
            .map_err(HypervisorError::PowerButton)
    }

    /// Stops the guest's processors; an event tells when they stand still.
    pub fn suspend(&self) -> Result<(), HypervisorError> {
        self.domain.suspend().map(drop).map_err(HypervisorError::Suspend)
    }

    /// Has the guest's processors go on; an event tells when they do.
    pub fn resume(&self) -> Result<(), HypervisorError> {
        self.domain.resume().map(drop).map_err(HypervisorError::Resume)
    }

    /// Presses the ACPI power button; once the guest has powered itself off libvirt resets it instead of ending qemu.
    pub fn reboot(&self) -> Result<(), HypervisorError> {
        let flags = virt_sys::VIR_DOMAIN_REBOOT_ACPI_POWER_BTN;
        self.domain.reboot(flags).map_err(HypervisorError::Reboot)
    }

    /// Resets the guest as its button would.
    pub fn reset(&self) -> Result<(), HypervisorError> {
        self.domain.reset().map(drop).map_err(HypervisorError::Reset)
    }

    /// Has the guest's agent reboot it. The guest may be gone before it can answer; one whose agent does not answer at all
    /// is asked by ACPI, if it can hear that.
    pub fn reboot_by_agent(&self, acpi: bool) -> Result<(), HypervisorError> {
        let asked = self.domain.reboot(virt_sys::VIR_DOMAIN_REBOOT_GUEST_AGENT);
        match asked.map_err(agent_error) {
            Err(HypervisorError::AgentSilent(_)) if acpi => self.reboot(),
            other => other,
        }
    }

    /// Has the guest's agent shut it down.
    pub fn shut_down_by_agent(&self) -> Result<(), HypervisorError> {
        let flags = virt_sys::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT;
        self.domain.shutdown_flags(flags).map(drop).map_err(agent_error)
    }

    /// Asks the guest's agent a question of its protocol; its answer is the guest's own word. libvirt greets the agent
    /// before, for which it has 5 s of its own; it reads 10 MiB at most of an answer (`QEMU_AGENT_MAX_RESPONSE`) and
    /// hands on 4 MiB (`REMOTE_STRING_MAX`).
    pub fn ask_agent(&self, question: &str, limit: Duration) -> Result<String, HypervisorError> {
        let seconds = i32::try_from(limit.as_secs().max(1)).unwrap_or(i32::MAX);
        self.domain
            .qemu_agent_command(question, seconds, 0)
            .map_err(agent_error)
    }

    /// Whether its processors stand still because somebody wanted it.
    pub fn is_paused_by_user(&self) -> Result<bool, HypervisorError> {
        let (state, reason) = self.domain.get_state().map_err(HypervisorError::State)?;
        let reason = u32::try_from(reason).ok();
        Ok(state == virt_sys::VIR_DOMAIN_PAUSED && reason == Some(virt_sys::VIR_DOMAIN_PAUSED_USER))
    }

    /// What the domain has used so far, with its disks and network cards by libvirt's names.
    pub fn usage(&self, disks: &[String], nics: &[String]) -> Result<Usage, HypervisorError> {
        let failed = |of: &str| {
            let of = of.to_owned();
            move |source| HypervisorError::Usage { of, source }
        };
        let info = self.domain.get_info().map_err(failed("the domain"))?;
        let memory = self.domain.memory_stats(0).map_err(failed("the domain"))?;
        let resident = memory
            .iter()
            .find(|one| one.tag == virt_sys::VIR_DOMAIN_MEMORY_STAT_RSS);
        // Negative where libvirt does not know.
        let known = |value: i64| u64::try_from(value).unwrap_or(0);
        let disk = |name: &String| {
            let stats = self.domain.get_block_stats(name).map_err(failed(name))?;
            Ok([stats.rd_bytes, stats.wr_bytes, stats.rd_req, stats.wr_req].map(known))
        };
        let nic = |name: &String| {
            let stats = self.domain.interface_stats(name).map_err(failed(name))?;
            let received = [stats.rx_bytes, stats.rx_packets, stats.rx_errs, stats.rx_drop];
            let transmitted = [stats.tx_bytes, stats.tx_packets, stats.tx_errs, stats.tx_drop];
            Ok([received, transmitted].map(|all| all.map(known)))
        };
        Ok(Usage {
            cpu_nanoseconds: info.cpu_time,
            memory_kib: info.memory,
            resident_kib: resident.map_or(0, |resident| resident.val),
            disks: disks.iter().map(disk).collect::<Result<_, _>>()?,
            nics: nics.iter().map(nic).collect::<Result<_, _>>()?,
        })
    }

    /// A picture of the first screen: a PNG or a pixmap, as qemu likes it.
    pub fn screenshot(&self) -> Result<Screenshot, HypervisorError> {
        let stream = Stream::new(&self.connect, 0).map_err(HypervisorError::Screenshot)?;
        self.domain
            .screenshot(&stream, 0, 0)
            .map_err(HypervisorError::Screenshot)?;
        Ok(Screenshot(Some(stream)))
    }

    /// Ends qemu: SIGTERM, so that it flushes its disks, then SIGKILL.
    pub fn destroy(&self) -> Result<(), HypervisorError> {
        self.domain.destroy().map_err(HypervisorError::Destroy)
    }
}

/// A picture that libvirt passes on, piece by piece.
pub struct Screenshot(Option<Stream>);

impl Read for Screenshot {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Some(stream) => stream.recv(buffer).map_err(io::Error::other),
            None => Ok(0),
        }
    }
}

impl Drop for Screenshot {
    fn drop(&mut self) {
        // A stream that was read to its end is over; any other goes no further.
        if let Some(Err(error)) = self.0.take().map(Stream::abort) {
            tracing::debug!(%error, "ending a picture");
        }
    }
}

fn agent_error(error: virt::error::Error) -> HypervisorError {
    match error.code() {
        ErrorNumber::AgentUnresponsive | ErrorNumber::AgentUnsynced => HypervisorError::AgentSilent(error),
        _ => HypervisorError::Agent(error),
    }
}

/// What a domain has used since it was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Processor time of qemu.
    pub cpu_nanoseconds: u64,
    /// Memory that the guest has.
    pub memory_kib: u64,
    /// Memory that qemu has touched.
    pub resident_kib: u64,
    /// Of each disk: bytes read and written, requests to read and to write.
    pub disks: Vec<[u64; 4]>,
    /// Of each network card what the guest received, then what it transmitted: bytes, packets, errors, drops.
    pub nics: Vec<[[u64; 4]; 2]>,
}

/// libvirt's `virConnectDomainEventGenericCallback`, which stands for that of each event.
type AnyCallback = unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, *mut c_void);

/// Frees what [`Hypervisor::register`] gave away.
unsafe extern "C" fn free<T>(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `Box::into_raw` of this very type and is freed once.
    drop(unsafe { Box::from_raw(opaque.cast::<T>()) });
}

/// libvirt's `virConnectDomainEventAgentLifecycleCallback`.
unsafe extern "C" fn on_agent(
    _: virt_sys::virConnectPtr,
    _: virt_sys::virDomainPtr,
    state: c_int,
    reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: `opaque` is the box of `subscribe_agent`, alive as long as the callback is registered, only ever borrowed.
    let connected = unsafe { &*opaque.cast::<watch::Sender<bool>>() };
    tracing::debug!(state, reason, "agent lifecycle");
    let is = u32::try_from(state).ok() == Some(virt_sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED);
    connected.send_if_modified(|was| std::mem::replace(was, is) != is);
}

/// libvirt's `virConnectDomainEventCallback`.
unsafe extern "C" fn on_lifecycle(
    _: virt_sys::virConnectPtr,
    _: virt_sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: `opaque` is the box of `subscribe`, alive as long as the callback is registered, only ever borrowed.
    let events = unsafe { &*opaque.cast::<mpsc::UnboundedSender<Input>>() };
    tracing::debug!(event, detail, "lifecycle");
    if let Some(input) = lifecycle(event, detail) {
        // The receiver is gone only when the launcher is ending.
        let _ = events.send(input);
    }
    0
}

/// libvirt's numbers (`virDomainEventType` and its details) → what they mean here.
fn lifecycle(event: c_int, detail: c_int) -> Option<Input> {
    let (event, detail) = (u32::try_from(event).ok()?, u32::try_from(detail).ok()?);
    Some(match (event, detail) {
        (virt_sys::VIR_DOMAIN_EVENT_SUSPENDED, detail) => Input::Paused(pause_cause(detail)),
        (virt_sys::VIR_DOMAIN_EVENT_RESUMED, _) => Input::Resumed,
        (virt_sys::VIR_DOMAIN_EVENT_CRASHED, _) => Input::Crashed,
        (virt_sys::VIR_DOMAIN_EVENT_SHUTDOWN, virt_sys::VIR_DOMAIN_EVENT_SHUTDOWN_GUEST) => Input::ShuttingDown,
        (virt_sys::VIR_DOMAIN_EVENT_STOPPED, virt_sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN) => {
            Input::Gone(Gone::PoweredOff)
        }
        (virt_sys::VIR_DOMAIN_EVENT_STOPPED, virt_sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED) => {
            Input::Gone(Gone::Destroyed)
        }
        (virt_sys::VIR_DOMAIN_EVENT_STOPPED, virt_sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED) => Input::Gone(Gone::Panicked),
        (virt_sys::VIR_DOMAIN_EVENT_STOPPED, _) => Input::Gone(Gone::Died),
        _ => return None,
    })
}

/// libvirt's `virDomainEventSuspendedDetailType` → what it means here.
fn pause_cause(detail: u32) -> Cause {
    match detail {
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => Cause::Plain,
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => {
            Cause::Trouble("qemu paused the guest on a disk error: is the disk or its node full?")
        }
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG => Cause::Trouble("the watchdog paused the guest"),
        _ => Cause::Trouble("libvirt paused the guest for a reason of its own"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypervisor_tells_trouble_from_a_pause() {
        let cause = |detail: u32| {
            let event = virt_sys::VIR_DOMAIN_EVENT_SUSPENDED;
            lifecycle(event.try_into().ok()?, detail.try_into().ok()?)
        };
        assert_eq!(
            cause(virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED),
            Some(Input::Paused(Cause::Plain))
        );
        for detail in [
            virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR,
            virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG,
            virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR,
        ] {
            let input = cause(detail);
            assert!(matches!(input, Some(Input::Paused(Cause::Trouble(_)))), "{input:?}");
        }
    }
}
