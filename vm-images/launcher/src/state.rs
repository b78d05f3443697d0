//! The life of one domain as a state machine. Pure: an input in, actions out; [`crate::supervisor`] owns it.
//!
//! ```text
//!            Started              StopAsked                GraceElapsed
//!  Starting ─────────► Running ───────────────► Stopping ────────────────► Killing
//!                       │ │ │                    ▲  │ │ ShuttingDown           │
//!       Crashed,        │ │ │ ShuttingDown       └──┘ └──────────┐             │ Gone
//!       HelperDied      │ │ └──────► ShuttingDown   PressAgain   │             ▼
//!            ┌──────────┘ │ Gone        │ Gone                   └─Gone─► Ended(Stopped)
//!            ▼            ▼             ▼
//!         Failing ─Gone─► Ended(GuestCrashed | GuestPaused | GuestShutdown)
//! ```
//!
//! A guest that is paused is Settling for a moment before it is Failing: a panic is a pause first.
//! A stop asked for while the domain starts is remembered and carried out once it runs. A guest that powers off takes
//! its helpers with it: from [`Input::ShuttingDown`] on their end is no news.

use kubernest_domain::TerminationReason;

/// What happens to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// libvirt has started it.
    Started,
    /// It stands still although nobody paused it; with libvirt's reason in words.
    Paused(&'static str),
    /// Its kernel reported a panic.
    Crashed,
    /// The guest has powered itself off; libvirt is ending qemu.
    ShuttingDown,
    /// It is gone.
    Gone(Gone),
    /// A process that it can't do without has ended.
    HelperDied(String),
    /// Kubernetes wants the pod to end.
    StopAsked,
    /// Time to press the power button again.
    PressAgain,
    /// The grace period is over.
    GraceElapsed,
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

/// What the owner does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Press the ACPI power button.
    PowerButton,
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
    /// The guest runs.
    Running,
    /// The guest has powered itself off; whether it was asked to.
    ShuttingDown {
        /// Somebody wanted it.
        asked: bool,
    },
    /// The power button was pressed.
    Stopping,
    /// qemu is being ended after the grace period.
    Killing,
    /// It stands still because of this; libvirt may yet say that its kernel has panicked.
    Settling(Ending),
    /// qemu is being ended because of this.
    Failing(Ending),
    /// Nothing follows.
    Ended(Ending),
}

impl State {
    /// Before anything has happened.
    pub const NEW: Self = Self::Starting { stop_asked: false };

    /// The next state and what to do. `acpi`: the guest can be asked to shut down at all.
    pub fn step(self, input: Input, acpi: bool) -> (Self, Vec<Action>) {
        use TerminationReason::{GuestCrashed, GuestPaused, GuestShutdown, Stopped};
        let begin_stop = || match acpi {
            true => (
                Self::Stopping,
                vec![Action::Ready(false), Action::PowerButton, Action::StartGrace],
            ),
            false => (Self::Killing, vec![Action::Ready(false), Action::Destroy]),
        };
        let failing = |reason, why: String| {
            (
                Self::Failing((reason, why)),
                vec![Action::Ready(false), Action::Destroy],
            )
        };
        let ended = |reason, why: &str| (Self::Ended((reason, why.to_owned())), vec![Action::Ready(false)]);
        match (self, input) {
            (Self::Ended(ending), _) => (Self::Ended(ending), vec![]),

            (Self::Starting { stop_asked: false }, Input::Started) => (Self::Running, vec![Action::Ready(true)]),
            (Self::Starting { stop_asked: true }, Input::Started) => begin_stop(),
            (Self::Starting { .. }, Input::StopAsked) => (Self::Starting { stop_asked: true }, vec![]),

            (Self::Running, Input::StopAsked) => begin_stop(),
            (Self::Running | Self::Starting { .. }, Input::ShuttingDown) => {
                (Self::ShuttingDown { asked: false }, vec![Action::Ready(false)])
            }
            (Self::Stopping | Self::Killing, Input::ShuttingDown) => (Self::ShuttingDown { asked: true }, vec![]),
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
            (Self::Stopping, Input::PressAgain) => (Self::Stopping, vec![Action::PowerButton]),
            (Self::Stopping, Input::GraceElapsed) => (Self::Killing, vec![Action::Destroy]),

            (Self::Stopping | Self::Killing, Input::Gone(Gone::PoweredOff)) => {
                ended(Stopped, "the guest shut down as asked")
            }
            (Self::Stopping | Self::Killing, Input::Gone(_)) => ended(
                Stopped,
                "the guest was ended: it did not shut down within its grace period",
            ),
            // Whatever else goes wrong while it is stopped is not news.
            (Self::Stopping, Input::Paused(_) | Input::Crashed | Input::HelperDied(_)) => {
                (Self::Killing, vec![Action::Destroy])
            }

            (_, Input::Gone(Gone::Panicked)) => ended(GuestCrashed, PANICKED),
            (Self::Failing(_) | Self::Running | Self::Starting { .. }, Input::Gone(Gone::PoweredOff)) => {
                ended(GuestShutdown, "the guest shut down by itself")
            }
            // Helpers that end with qemu may be noticed first.
            (Self::Failing((GuestCrashed, _)), Input::Gone(Gone::Died)) => {
                ended(GuestCrashed, "qemu ended unexpectedly")
            }
            (Self::Failing(ending), Input::Gone(_)) => (Self::Ended(ending), vec![]),
            (Self::Running | Self::Starting { .. }, Input::Gone(Gone::Died)) => {
                ended(GuestCrashed, "qemu ended unexpectedly")
            }
            (Self::Running | Self::Starting { .. }, Input::Gone(Gone::Destroyed)) => {
                ended(GuestCrashed, "the domain was destroyed from inside the pod")
            }
            // A panic is a pause first.
            (Self::Running | Self::Starting { .. }, Input::Paused(why)) => (
                Self::Settling((GuestPaused, why.to_owned())),
                vec![Action::Ready(false), Action::Settle],
            ),
            (Self::Settling((reason, why)), Input::GraceElapsed | Input::StopAsked) => failing(reason, why),
            (Self::Settling(ending), Input::Gone(_)) => (Self::Ended(ending), vec![]),
            (Self::Running | Self::Starting { .. } | Self::Settling(_), Input::Crashed) => {
                failing(GuestCrashed, PANICKED.to_owned())
            }
            (Self::Running | Self::Starting { .. }, Input::HelperDied(who)) => {
                failing(GuestCrashed, format!("{who} ended unexpectedly"))
            }
            (state, _) => (state, vec![]),
        }
    }
}

#[cfg(test)]
mod tests;
