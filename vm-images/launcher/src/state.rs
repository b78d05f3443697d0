//! The life of one domain as a state machine. Pure: an input in, actions out; [`crate::supervisor`] owns it.
//!
//! ```text
//!            Started              StopAsked                GraceElapsed
//!  Starting ─────────► Running ───────────────► Stopping ────────────────► Killing
//!                       │ │ ▲ │                  ▲  │ │ ShuttingDown           │
//!       Crashed,        │ │ │ │ ShuttingDown     └──┘ └────────┐               │ Gone
//!       HelperDied      │ │ │ └────► ShuttingDown  PressAgain  │               ▼
//!            ┌──────────┘ │ └─────────┘    │ Gone              └─Gone─► Ended(Stopped)
//!            ▼            │ Gone  Resumed  ▼
//!         Failing ─Gone─► Ended(GuestCrashed | GuestPaused | GuestShutdown)
//!
//!  While Running:
//!           Asked(Pause)           Paused
//!   Moving ──────────────► Pausing ──────► Paused ◄── Started, if it shall start so
//!    ▲ ▲ │     Resumed                       │
//!    │ └─┼──────────────── Resuming ◄────────┘
//!    │   │                        Asked(Unpause)
//!    │   └─► Rebooting, Resetting    Asked(SoftReboot), Asked(Reset)
//!    └──────────┘ CommandDone
//! ```
//! Paused can be Resetting as well, and is Paused again after it.
//!
//! A guest that stands still unasked is Settling for a moment before it is Failing: a panic is a pause first. So is one
//! whose helper has ended: it may be qemu's end that was noticed there first.
//! A stop asked for while the domain starts is remembered and carried out once it runs; one asked for while the guest
//! is paused has it go on first, because it can't hear the power button. A guest that powers off takes its helpers with
//! it: from [`Input::ShuttingDown`] on their end is no news. Where a reboot was asked for, libvirt resets a guest that
//! has powered itself off, and has it go on: libvirt 9.0 keeps that to itself, one that tells says ShuttingDown, then
//! Resumed. One request is carried out at a time, and each gets one answer.

use kubernest_domain::{TerminationReason, control};

mod motion;

pub use motion::Motion;

/// What happens to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// libvirt has started it.
    Started {
        /// Its processors wait to be told to go on.
        paused: bool,
    },
    /// It stands still.
    Paused(Cause),
    /// It goes on.
    Resumed,
    /// Its kernel reported a panic.
    Crashed,
    /// The guest has powered itself off; libvirt is ending qemu, or resetting it for a reboot.
    ShuttingDown,
    /// It is gone.
    Gone(Gone),
    /// A process that it can't do without has ended.
    HelperDied(String),
    /// Kubernetes wants the pod to end.
    StopAsked,
    /// A client of the control port wants something.
    Asked(Request),
    /// libvirt has carried out [`Action::Reboot`] or [`Action::Reset`]; of the others an event tells.
    CommandDone,
    /// libvirt did not carry out what a request had led to; its error with all causes.
    CommandFailed(String),
    /// Time to press the power button again.
    PressAgain,
    /// The grace period is over.
    GraceElapsed,
}

/// Why a guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Somebody has told libvirt so. An error inside of qemu or KVM looks the same: libvirt tells of no other cause then.
    Plain,
    /// Nobody has told it so; what has happened.
    Trouble(&'static str),
}

impl Cause {
    /// What has happened if nobody has asked for it.
    fn unasked(self) -> &'static str {
        match self {
            Self::Plain => "qemu paused the guest on an internal error: can this KVM run its kernel?",
            Self::Trouble(what) => what,
        }
    }
}

/// How a domain went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The guest powered itself off.
    PoweredOff,
    /// We, or somebody else in the pod, destroyed it.
    Destroyed,
    /// libvirt has ended it because its kernel panicked.
    Panicked,
    /// qemu died.
    Died,
}

/// What a client of the control port may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The guest's processors shall stand still.
    Pause,
    /// They shall go on.
    Unpause,
    /// The guest shall be asked to reboot.
    SoftReboot,
    /// The guest shall be reset.
    Reset,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is paused already.
    #[error("{}", control::ALREADY_PAUSED)]
    AlreadyPaused,
    /// It is not paused.
    #[error("{}", control::NOT_PAUSED)]
    NotPaused,
    /// A guest that stands still can't do it.
    #[error("{}", control::PAUSED)]
    Paused,
    /// It does not run, or not any more.
    #[error("{}", control::NOT_RUNNING)]
    NotRunning,
    /// It has no power button.
    #[error("{}", control::NO_ACPI)]
    NoAcpi,
    /// Another request is being carried out.
    #[error("{}", control::BUSY)]
    Busy,
    /// libvirt did not do it.
    #[error("{0}")]
    Failed(String),
}

/// What the owner does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Press the ACPI power button, and tell the agent, if there is one.
    PowerButton,
    /// Stop the guest's processors: [`Input::Paused`] or [`Input::CommandFailed`].
    Suspend,
    /// Have them go on: [`Input::Resumed`] or [`Input::CommandFailed`].
    Resume,
    /// Have the agent reboot the guest; without one press the power button such that libvirt resets it once it is off: [`Input::CommandDone`] or
    /// [`Input::CommandFailed`].
    Reboot,
    /// Reset the guest: [`Input::CommandDone`] or [`Input::CommandFailed`].
    Reset,
    /// Answer the request that came with this input; without one, that which is being carried out.
    Answer(Result<(), Refusal>),
    /// Count the grace period from now on; press the button again every few seconds, a kernel that boots misses it.
    StartGrace,
    /// Wait a moment for what else libvirt has to say: [`Input::GraceElapsed`].
    Settle,
    /// End qemu.
    Destroy,
    /// Tell Kubernetes whether the domain runs.
    Ready(bool),
}

/// Why it ended: reason and sentence.
pub type Ending = (TerminationReason, String);

const PANICKED: &str = "the guest's kernel panicked";

/// Where a domain is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// libvirt is creating it; whether a stop was asked for meanwhile.
    Starting {
        /// Stop once it runs.
        stop_asked: bool,
    },
    /// The guest runs, or was paused on request.
    Running(Motion),
    /// The guest has powered itself off; whether it was asked to.
    ShuttingDown {
        /// Somebody wanted it.
        asked: bool,
    },
    /// The power button was pressed.
    Stopping {
        /// Not yet: a pause has to be undone before.
        paused: bool,
    },
    /// qemu is being ended after the grace period.
    Killing,
    /// It stands still, or has lost a helper; libvirt may yet say that its kernel has panicked, or that it is off.
    Settling(Ending),
    /// qemu is being ended because of this.
    Failing(Ending),
    /// Nothing follows.
    Ended(Ending),
}

impl State {
    /// Before anything has happened.
    pub const NEW: Self = Self::Starting { stop_asked: false };

    /// The next state and what to do. `hears`: the guest can be asked to shut down at
    /// all, by ACPI or through its agent.
    pub fn step(self, input: Input, hears: bool) -> (Self, Vec<Action>) {
        let carried_out = match self {
            Self::Running(motion) if motion.is_pending() => Some(motion),
            _ => None,
        };
        let (next, mut actions) = match (self, input) {
            (Self::Running(motion), Input::Asked(request)) => {
                let (motion, action) = motion.asked(request, hears);
                (Self::Running(motion), vec![action])
            }
            (state, Input::Asked(_)) => (state, vec![Action::Answer(Err(Refusal::NotRunning))]),
            (Self::Running(motion), input) => match motion.follow(&input) {
                Some((motion, actions)) => (Self::Running(motion), actions),
                None => Self::Running(motion).follow(input, hears),
            },
            (state, input) => state.follow(input, hears),
        };
        if let Some(motion) = carried_out
            && !matches!(next, Self::Running(_))
        {
            // A guest that is powering off has heard the button, even if libvirt's answer is still on its way.
            let heard = motion == Motion::Rebooting && matches!(next, Self::ShuttingDown { .. });
            actions.insert(0, Action::Answer(if heard { Ok(()) } else { Err(Refusal::NotRunning) }));
        }
        (next, actions)
    }

    /// What an input leads to that no request is concerned with.
    fn follow(self, input: Input, hears: bool) -> (Self, Vec<Action>) {
        use TerminationReason::{GuestCrashed, GuestPaused, GuestShutdown, Stopped};
        match (self, input) {
            (Self::Ended(ending), _) => (Self::Ended(ending), vec![]),

            (Self::Starting { stop_asked: false }, Input::Started { paused }) => {
                (Self::Running(Motion::at_rest(paused)), vec![Action::Ready(true)])
            }
            (Self::Starting { stop_asked: true }, Input::Started { paused }) => stop(Motion::at_rest(paused), hears),
            (Self::Starting { .. }, Input::StopAsked) => (Self::Starting { stop_asked: true }, vec![]),

            (Self::Running(motion), Input::StopAsked) => stop(motion, hears),
            (Self::Running(_) | Self::Starting { .. }, Input::ShuttingDown) => {
                (Self::ShuttingDown { asked: false }, vec![Action::Ready(false)])
            }
            (Self::Stopping { .. } | Self::Killing, Input::ShuttingDown) => {
                (Self::ShuttingDown { asked: true }, vec![])
            }
            // It was a reboot.
            (Self::ShuttingDown { asked: false }, Input::Resumed) => {
                (Self::Running(Motion::Moving), vec![Action::Ready(true)])
            }
            // It was a reboot that the stop came too late for.
            (Self::ShuttingDown { asked: true }, Input::Resumed) => {
                (Self::Stopping { paused: false }, vec![Action::PowerButton])
            }
            // It has no more to do; only libvirt can still hang.
            (Self::ShuttingDown { asked }, Input::GraceElapsed) => {
                (Self::ShuttingDown { asked }, vec![Action::Destroy])
            }
            (Self::ShuttingDown { .. }, Input::StopAsked) => {
                (Self::ShuttingDown { asked: true }, vec![Action::StartGrace])
            }
            (Self::ShuttingDown { asked: true }, Input::Gone(_)) => ended(Stopped, "the guest shut down as asked"),
            (Self::ShuttingDown { asked: false }, Input::Gone(_)) => {
                ended(GuestShutdown, "the guest shut down by itself")
            }

            // The pause that was asked for before the stop may take effect only now; libvirt will undo it, as told.
            (Self::Stopping { paused: true }, Input::Paused(Cause::Plain)) => (Self::Stopping { paused: true }, vec![]),
            // It hears the button from now on. Where it could not be resumed nothing better can be tried.
            (Self::Stopping { paused: true }, Input::Resumed | Input::CommandFailed(_)) => {
                (Self::Stopping { paused: false }, vec![Action::PowerButton])
            }
            (Self::Stopping { paused }, Input::PressAgain) => (Self::Stopping { paused }, vec![Action::PowerButton]),
            (Self::Stopping { .. }, Input::GraceElapsed) => (Self::Killing, vec![Action::Destroy]),
            (Self::Stopping { .. } | Self::Killing, Input::Gone(Gone::PoweredOff)) => {
                ended(Stopped, "the guest shut down as asked")
            }
            (Self::Stopping { .. } | Self::Killing, Input::Gone(_)) => ended(
                Stopped,
                "the guest was ended: it did not shut down within its grace period",
            ),
            // Whatever else goes wrong while it is stopped is not news.
            (Self::Stopping { .. }, Input::Paused(_) | Input::Crashed | Input::HelperDied(_)) => {
                (Self::Killing, vec![Action::Destroy])
            }

            (_, Input::Gone(Gone::Panicked)) => ended(GuestCrashed, PANICKED),
            (Self::Failing(_) | Self::Running(_) | Self::Starting { .. }, Input::Gone(Gone::PoweredOff)) => {
                ended(GuestShutdown, "the guest shut down by itself")
            }
            // Helpers that end with qemu may be noticed first.
            (Self::Failing((GuestCrashed, _)) | Self::Settling((GuestCrashed, _)), Input::Gone(Gone::Died)) => {
                ended(GuestCrashed, "qemu ended unexpectedly")
            }
            (Self::Failing(ending), Input::Gone(_)) => (Self::Ended(ending), vec![]),
            (Self::Running(_) | Self::Starting { .. }, Input::Gone(Gone::Died)) => {
                ended(GuestCrashed, "qemu ended unexpectedly")
            }
            (Self::Running(_) | Self::Starting { .. }, Input::Gone(Gone::Destroyed)) => {
                ended(GuestCrashed, "the domain was destroyed from inside the pod")
            }
            // A panic is a pause first.
            (Self::Running(_) | Self::Starting { .. }, Input::Paused(cause)) => (
                Self::Settling((GuestPaused, cause.unasked().to_owned())),
                vec![Action::Ready(false), Action::Settle],
            ),
            (Self::Settling((reason, why)), Input::GraceElapsed | Input::StopAsked) => failing(reason, why),
            (Self::Running(_) | Self::Starting { .. } | Self::Settling(_), Input::Crashed) => {
                failing(GuestCrashed, PANICKED.to_owned())
            }
            // libvirt ends qemu, and with it the helper, before it says that the guest has powered off.
            (Self::Running(_) | Self::Starting { .. }, Input::HelperDied(who)) => (
                Self::Settling((GuestCrashed, format!("{who} ended unexpectedly"))),
                vec![Action::Ready(false), Action::Settle],
            ),
            (Self::Settling((GuestCrashed, _)), Input::ShuttingDown) => (Self::ShuttingDown { asked: false }, vec![]),
            (Self::Settling((GuestCrashed, _)), Input::Gone(Gone::PoweredOff)) => {
                ended(GuestShutdown, "the guest shut down by itself")
            }
            (Self::Settling(ending), Input::Gone(_)) => (Self::Ended(ending), vec![]),
            (state, _) => (state, vec![]),
        }
    }
}

/// A running guest shall end.
fn stop(motion: Motion, hears: bool) -> (State, Vec<Action>) {
    let paused = motion.needs_resume();
    match hears {
        true => {
            let first = if paused { Action::Resume } else { Action::PowerButton };
            (
                State::Stopping { paused },
                vec![Action::Ready(false), first, Action::StartGrace],
            )
        }
        false => (State::Killing, vec![Action::Ready(false), Action::Destroy]),
    }
}

fn failing(reason: TerminationReason, why: String) -> (State, Vec<Action>) {
    (
        State::Failing((reason, why)),
        vec![Action::Ready(false), Action::Destroy],
    )
}

fn ended(reason: TerminationReason, why: &str) -> (State, Vec<Action>) {
    (State::Ended((reason, why.to_owned())), vec![Action::Ready(false)])
}

#[cfg(test)]
mod tests;
