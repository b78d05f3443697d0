//! The life of one domain as a state machine. Pure: an input in, actions out; [`crate::supervisor`] owns it.
//!
//! ```text
//!              Started                StopAsked                 GraceElapsed
//!   Starting ───────────► Running ────────────────► Stopping ────────────────► Killing
//!      │                   │   │                     │    ▲ │                    │
//!      │ StartFailed       │   │ Paused, Crashed,    │    └─┘ PressAgain         │ Gone(any)
//!      ▼                   │   │ HelperDied          │ Gone(any)                 ▼
//!   Ended(LaunchFailed)    │   ▼                     └─────────────────► Ended(Stopped)
//!      Gone(PoweredOff)    │ Failing ──Gone(any but PoweredOff)──► Ended(GuestPaused | GuestCrashed)
//!      Ended(GuestShutdown)◄─┘ └───────Gone(PoweredOff)──────────► Ended(GuestShutdown)
//! ```
//!
//! A stop asked for while the domain starts is remembered and carried out once it runs.

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
    /// qemu died.
    Died,
}

/// What the owner does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Press the ACPI power button.
    PowerButton,
    /// Press it now, and again every few seconds: a kernel that boots misses it. Start the grace period.
    BeginGrace,
    /// End qemu.
    Destroy,
    /// Tell Kubernetes whether the domain runs.
    Ready(bool),
}

/// Why it ended: reason and sentence.
pub type Ending = (TerminationReason, String);

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
    /// The power button was pressed.
    Stopping,
    /// qemu is being ended after the grace period.
    Killing,
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
        let begin_stop = |before: &[Action]| {
            let (state, action) = if acpi {
                (Self::Stopping, Action::BeginGrace)
            } else {
                (Self::Killing, Action::Destroy)
            };
            (state, [before, &[Action::Ready(false), action]].concat())
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
            (Self::Starting { stop_asked: true }, Input::Started) => begin_stop(&[]),
            (Self::Starting { .. }, Input::StopAsked) => (Self::Starting { stop_asked: true }, vec![]),

            (Self::Running, Input::StopAsked) => begin_stop(&[]),
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

            (Self::Failing(_) | Self::Running | Self::Starting { .. }, Input::Gone(Gone::PoweredOff)) => {
                ended(GuestShutdown, "the guest shut down by itself")
            }
            (Self::Failing(ending), Input::Gone(_)) => (Self::Ended(ending), vec![]),
            (Self::Running | Self::Starting { .. }, Input::Gone(Gone::Died)) => {
                ended(GuestCrashed, "qemu ended unexpectedly")
            }
            (Self::Running | Self::Starting { .. }, Input::Gone(Gone::Destroyed)) => {
                ended(GuestCrashed, "the domain was destroyed from inside the pod")
            }
            (Self::Running | Self::Starting { .. }, Input::Paused(why)) => failing(GuestPaused, why.to_owned()),
            (Self::Running | Self::Starting { .. }, Input::Crashed) => {
                failing(GuestCrashed, "the guest's kernel panicked".to_owned())
            }
            (Self::Running | Self::Starting { .. }, Input::HelperDied(who)) => {
                failing(GuestCrashed, format!("{who} ended unexpectedly"))
            }
            (state, _) => (state, vec![]),
        }
    }
}

#[cfg(test)]
mod tests {
    use kubernest_domain::TerminationReason::{self, GuestCrashed, GuestPaused, GuestShutdown, Stopped};

    use super::*;

    fn live(inputs: &[Input]) -> (State, Vec<Action>) {
        inputs
            .iter()
            .cloned()
            .fold((State::NEW, vec![]), |(state, mut done), input| {
                let (state, actions) = state.step(input, true);
                done.extend(actions);
                (state, done)
            })
    }

    fn reason(state: &State) -> Option<TerminationReason> {
        if let State::Ended((reason, _)) = state {
            Some(*reason)
        } else {
            None
        }
    }

    #[test]
    fn state_a_guest_that_powers_off_is_done() {
        let (state, actions) = live(&[Input::Started, Input::Gone(Gone::PoweredOff)]);
        assert_eq!(reason(&state), Some(GuestShutdown));
        assert_eq!(actions, [Action::Ready(true), Action::Ready(false)]);
    }

    #[test]
    fn state_a_stop_is_asked_for_then_enforced() {
        use Action::{BeginGrace, Destroy, PowerButton, Ready};
        let (state, actions) = live(&[
            Input::Started,
            Input::StopAsked,
            Input::StopAsked,
            Input::PressAgain,
            Input::GraceElapsed,
            Input::Gone(Gone::Destroyed),
        ]);
        assert_eq!(reason(&state), Some(Stopped));
        assert_eq!(
            actions,
            [
                Ready(true),
                Ready(false),
                BeginGrace,
                PowerButton,
                Destroy,
                Ready(false)
            ]
        );
    }

    #[test]
    fn state_a_stop_while_starting_is_not_lost() {
        let (state, actions) = live(&[Input::StopAsked, Input::Started]);
        assert_eq!(
            (state, actions),
            (State::Stopping, vec![Action::Ready(false), Action::BeginGrace])
        );
    }

    #[test]
    fn state_a_guest_without_acpi_is_not_asked() {
        let (state, actions) = State::Running.step(Input::StopAsked, false);
        assert_eq!(
            (state, actions),
            (State::Killing, vec![Action::Ready(false), Action::Destroy])
        );
    }

    #[test]
    fn state_failures_destroy_first_and_keep_their_reason() {
        for (input, expected) in [
            (Input::Paused("x"), GuestPaused),
            (Input::Crashed, GuestCrashed),
            (Input::HelperDied("virtiofsd".into()), GuestCrashed),
        ] {
            let (state, actions) = live(&[Input::Started, input.clone()]);
            assert_eq!(actions.last(), Some(&Action::Destroy), "{input:?}");
            assert_eq!(
                reason(&state.step(Input::Gone(Gone::Destroyed), true).0),
                Some(expected)
            );
        }
    }

    #[test]
    fn state_a_share_that_ends_with_the_guest_is_no_crash() {
        let (state, _) = live(&[
            Input::Started,
            Input::HelperDied("virtiofsd".into()),
            Input::Gone(Gone::PoweredOff),
        ]);
        assert_eq!(reason(&state), Some(GuestShutdown));
    }

    #[test]
    fn state_every_path_ends_when_the_domain_is_gone() {
        let inputs = [
            Input::Started,
            Input::Paused("x"),
            Input::Crashed,
            Input::HelperDied("x".into()),
            Input::StopAsked,
            Input::PressAgain,
            Input::GraceElapsed,
        ];
        for a in &inputs {
            for b in &inputs {
                for c in &inputs {
                    for gone in [Gone::PoweredOff, Gone::Destroyed, Gone::Died] {
                        let (state, _) = live(&[a.clone(), b.clone(), c.clone(), Input::Gone(gone)]);
                        assert!(reason(&state).is_some(), "{a:?} {b:?} {c:?} {gone:?}");
                    }
                }
            }
        }
    }
}
