//! What the processors of a running guest do, and what requests and libvirt's events make of that. Pure.

use super::{Action, Cause, Input, Refusal, Request};

/// What the processors of a running guest do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Motion {
    /// They move.
    Moving,
    /// libvirt was told to stop them.
    Pausing,
    /// They stand still, as somebody wanted.
    Paused,
    /// libvirt was told to have them go on.
    Resuming,
    /// They move; libvirt was told to reboot the guest.
    Rebooting,
    /// libvirt was told to reset the guest.
    Resetting {
        /// They stand still meanwhile, and after it.
        paused: bool,
    },
}

impl Motion {
    /// That of a guest of which no more is known.
    pub(super) fn at_rest(paused: bool) -> Self {
        if paused { Self::Paused } else { Self::Moving }
    }

    /// A request is being carried out.
    pub(super) fn is_pending(self) -> bool {
        !matches!(self, Self::Moving | Self::Paused)
    }

    /// The processors stand still, or may do so any moment.
    pub(super) fn needs_resume(self) -> bool {
        matches!(
            self,
            Self::Pausing | Self::Paused | Self::Resuming | Self::Resetting { paused: true }
        )
    }

    /// What a request leads to: a command to libvirt, or its refusal.
    pub(super) fn asked(self, request: Request, hears: bool) -> (Self, Action) {
        let refused = |refusal| (self, Action::Answer(Err(refusal)));
        match (self, request) {
            (Self::Pausing | Self::Resuming | Self::Rebooting | Self::Resetting { .. }, _) => refused(Refusal::Busy),
            (Self::Moving, Request::Pause) => (Self::Pausing, Action::Suspend),
            (Self::Paused, Request::Pause) => refused(Refusal::AlreadyPaused),
            (Self::Paused, Request::Unpause) => (Self::Resuming, Action::Resume),
            (Self::Moving, Request::Unpause) => refused(Refusal::NotPaused),
            // It can't hear the button; a reset needs no hearing.
            (Self::Paused, Request::SoftReboot) => refused(Refusal::Paused),
            (Self::Moving, Request::SoftReboot) if !hears => refused(Refusal::NoAcpi),
            (Self::Moving, Request::SoftReboot) => (Self::Rebooting, Action::Reboot),
            (Self::Moving, Request::Reset) => (Self::Resetting { paused: false }, Action::Reset),
            (Self::Paused, Request::Reset) => (Self::Resetting { paused: true }, Action::Reset),
        }
    }

    /// What else concerns the processors alone, with the answer to the request that is being carried out; nothing when
    /// it concerns the whole domain.
    pub(super) fn follow(self, input: &Input) -> Option<(Self, Vec<Action>)> {
        let done = || vec![Action::Answer(Ok(()))];
        let failed = |why: &String| vec![Action::Answer(Err(Refusal::Failed(why.clone())))];
        Some(match (self, input) {
            (Self::Pausing, Input::Paused(Cause::Plain)) => (Self::Paused, done()),
            // libvirt says so of a domain that starts paused too, and late: never after it has said that it goes on.
            (Self::Paused | Self::Resuming | Self::Resetting { paused: true }, Input::Paused(_)) => (self, vec![]),
            (Self::Resuming, Input::Resumed) => (Self::Moving, done()),
            (Self::Paused, Input::Resumed) => (Self::Moving, vec![]),
            (Self::Resetting { .. }, Input::Resumed) => (Self::Resetting { paused: false }, vec![]),
            // Said of the domain's start.
            (_, Input::Resumed) => (self, vec![]),
            (Self::Rebooting, Input::CommandDone) => (Self::Moving, done()),
            (Self::Resetting { paused }, Input::CommandDone) => (Self::at_rest(paused), done()),
            (Self::Pausing | Self::Rebooting, Input::CommandFailed(why)) => (Self::Moving, failed(why)),
            (Self::Resetting { paused }, Input::CommandFailed(why)) => (Self::at_rest(paused), failed(why)),
            (Self::Resuming, Input::CommandFailed(why)) => (Self::Paused, failed(why)),
            _ => return None,
        })
    }
}
