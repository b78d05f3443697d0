//! The owner of the domain: feeds [`State`] and carries out its actions until it has ended.
//!
//! The only place that awaits more than one thing. It decides nothing that [`State`] could decide.

use std::time::Duration;

use kubernest_domain::machine::Machine;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, Interval, interval_at, sleep_until};

use super::{Running, Signals};
use crate::hypervisor::{Guest, HypervisorError};
use crate::queue::Queue;
use crate::state::{Action, Ending, Gone, Input, Refusal, State};

/// Time between two presses of the power button: a kernel that boots misses the first.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// How long libvirt may take from a guest's pause to the panic that caused it.
const SETTLE: Duration = Duration::from_secs(1);
/// How long libvirt may take to end qemu (it gives SIGTERM 10 s, then SIGKILL).
const DESTROY_LIMIT: Duration = Duration::from_secs(40);
/// A time that no launcher lives to see.
const FAR: Duration = Duration::from_secs(1 << 30);

type Reply = oneshot::Sender<Result<(), Refusal>>;

/// What the owner of a running domain knows beside its state.
pub(super) struct Owner<'a> {
    running: &'a mut Running,
    machine: &'a Machine,
    ready: &'a watch::Sender<bool>,
    signals: &'a mut Signals,
    /// The grace period's end.
    grace: Instant,
    /// When libvirt must have ended qemu.
    destroyed_by: Instant,
    press: Interval,
    /// The agent was told to shut the guest down.
    told: bool,
    /// Whose request came with the present input.
    asker: Option<Reply>,
    /// Whose request is being carried out.
    pending: Option<Reply>,
}

impl<'a> Owner<'a> {
    pub(super) fn new(
        running: &'a mut Running,
        machine: &'a Machine,
        ready: &'a watch::Sender<bool>,
        signals: &'a mut Signals,
    ) -> Self {
        let far = Instant::now() + FAR;
        Self {
            running,
            machine,
            ready,
            signals,
            grace: far,
            destroyed_by: far,
            press: interval_at(far, PRESS_AGAIN),
            told: false,
            asker: None,
            pending: None,
        }
    }

    /// Feeds the state machine until the domain has ended.
    pub(super) async fn own(mut self) -> Ending {
        let mut state = State::NEW;
        let mut input = Input::Started {
            paused: self.machine.start_paused,
        };
        loop {
            tracing::debug!(?state, ?input, "step");
            let hears = self.machine.acpi || self.running.agent.is_connected();
            let (next, actions) = state.step(input, hears);
            state = next;
            for action in actions {
                self.carry_out(action);
            }
            // Not answered yet: it is being carried out.
            self.pending = self.asker.take().or(self.pending.take());
            if let State::Ended(ending) = state {
                return ending;
            }
            input = self.next().await;
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Ready(value) => drop(self.ready.send_replace(value)),
            Action::PowerButton => self.power_off(),
            Action::Suspend => self.command(Guest::suspend, failure),
            Action::Resume => self.command(Guest::resume, failure),
            Action::Reboot => self.reboot(),
            Action::Reset => self.command(Guest::reset, outcome),
            Action::Answer(answer) => {
                if let Some(reply) = self.asker.take().or_else(|| self.pending.take()) {
                    // Who has asked may have gone.
                    let _ = reply.send(answer);
                }
            }
            Action::StartGrace => {
                self.grace = Instant::now() + Duration::from_secs(self.machine.grace_seconds);
                self.press = interval_at(Instant::now() + PRESS_AGAIN, PRESS_AGAIN);
            }
            Action::Settle => self.grace = Instant::now() + SETTLE,
            Action::Destroy => {
                self.command_by(&self.running.end, Guest::destroy, |_| None);
                let far = Instant::now() + FAR;
                self.destroyed_by = Instant::now() + DESTROY_LIMIT;
                (self.grace, self.press) = (far, interval_at(far, PRESS_AGAIN));
            }
        }
    }

    /// Presses the power button, and once tells the agent too: either may hear what the other does not.
    fn power_off(&mut self) {
        self.command(Guest::power_button, |_| None);
        if self.running.agent.is_connected() && !std::mem::replace(&mut self.told, true) {
            self.running.agent.call(|guest| {
                if let Err(error) = guest.shut_down_by_agent() {
                    tracing::info!(error = crate::chain(&error), "telling the guest agent to shut down");
                }
            });
        }
    }

    /// Through the agent if there is one, as KubeVirt does; one that hangs holds up no other command.
    fn reboot(&self) {
        if !self.running.agent.is_connected() {
            return self.command(Guest::reboot, outcome);
        }
        let (outcomes, acpi) = (self.running.outcomes.clone(), self.machine.acpi);
        self.running.agent.call(move |guest| {
            let result = guest.reboot_by_agent(acpi);
            if let Err(error) = &result {
                tracing::warn!(error = crate::chain(error), "rebooting through the guest agent");
            }
            if let Some(input) = outcome(result) {
                // The receiver is gone only when the launcher is ending.
                let _ = outcomes.send(input);
            }
        });
    }

    /// Tells libvirt to do something, after all that it was told before. What comes of it arrives as an event;
    /// `outcome` is what the call itself tells.
    fn command(
        &self,
        what: fn(&Guest) -> Result<(), HypervisorError>,
        outcome: fn(Result<(), HypervisorError>) -> Option<Input>,
    ) {
        self.command_by(&self.running.guest, what, outcome);
    }

    fn command_by(
        &self,
        queue: &Queue<Guest>,
        what: fn(&Guest) -> Result<(), HypervisorError>,
        outcome: fn(Result<(), HypervisorError>) -> Option<Input>,
    ) {
        let outcomes = self.running.outcomes.clone();
        queue.call(move |guest| {
            let result = what(guest);
            if let Err(error) = &result {
                tracing::warn!(error = crate::chain(error), "commanding the domain");
            }
            if let Some(input) = outcome(result) {
                // The receiver is gone only when the launcher is ending.
                let _ = outcomes.send(input);
            }
        });
    }

    async fn next(&mut self) -> Input {
        tokio::select! {
            // What has happened to the domain goes before what it caused, and all of it before what somebody wants.
            biased;
            Some(event) = self.running.events.recv() => event,
            () = self.signals.stop() => Input::StopAsked,
            Some(Ok(helper)) = self.running.helpers.join_next() => Input::HelperDied(helper),
            () = sleep_until(self.grace) => {
                self.grace = Instant::now() + FAR;
                Input::GraceElapsed
            }
            _ = self.press.tick() => Input::PressAgain,
            // libvirt itself hangs or is gone: with this process everything in the pod ends.
            () = sleep_until(self.destroyed_by) => Input::Gone(Gone::Destroyed),
            Some(command) = self.running.commands.recv() => {
                self.asker = Some(command.reply);
                Input::Asked(command.request)
            }
        }
    }
}

fn outcome(result: Result<(), HypervisorError>) -> Option<Input> {
    match result {
        Ok(()) => Some(Input::CommandDone),
        Err(_) => failure(result),
    }
}

fn failure(result: Result<(), HypervisorError>) -> Option<Input> {
    let error = result.err()?;
    Some(Input::CommandFailed(crate::chain(&error)))
}
