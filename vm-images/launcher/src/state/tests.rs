//! Lives as lists of inputs.

use kubernest_domain::TerminationReason::{self, GuestCrashed, GuestPaused, GuestShutdown, Stopped};
use rstest::rstest;

use super::*;

mod requests;

const STARTED: Input = Input::Started { paused: false };
const MOVING: State = State::Running(Motion::Moving);

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
    let (state, actions) = live(&[STARTED, Input::Gone(Gone::PoweredOff)]);
    assert_eq!(reason(&state), Some(GuestShutdown));
    assert_eq!(actions, [Action::Ready(true), Action::Ready(false)]);
}

#[test]
fn state_a_stop_is_asked_for_then_enforced() {
    use Action::{Destroy, PowerButton, Ready, StartGrace};
    let (state, actions) = live(&[
        STARTED,
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
            PowerButton,
            StartGrace,
            PowerButton,
            Destroy,
            Ready(false)
        ]
    );
}

#[test]
fn state_a_stop_while_starting_is_not_lost() {
    let (state, actions) = live(&[Input::StopAsked, STARTED]);
    assert_eq!(state, State::Stopping { paused: false });
    assert_eq!(actions, [Action::Ready(false), Action::PowerButton, Action::StartGrace]);
}

#[test]
fn state_a_guest_without_acpi_is_not_asked() {
    let (state, actions) = MOVING.step(Input::StopAsked, false);
    assert_eq!(
        (state, actions),
        (State::Killing, vec![Action::Ready(false), Action::Destroy])
    );
}

#[test]
fn state_failures_destroy_first_and_keep_their_reason() {
    for inputs in [
        vec![STARTED, Input::Crashed],
        // For a moment it may be that the guest is off.
        vec![STARTED, Input::HelperDied("virtiofsd".into()), Input::GraceElapsed],
    ] {
        let (state, actions) = live(&inputs);
        assert_eq!(actions.last(), Some(&Action::Destroy), "{inputs:?}");
        assert_eq!(
            reason(&state.step(Input::Gone(Gone::Destroyed), true).0),
            Some(GuestCrashed)
        );
    }
}

#[test]
fn state_a_pause_is_a_failure_unless_it_was_a_panic() {
    let (state, actions) = live(&[STARTED, Input::Paused(Cause::Plain)]);
    assert_eq!(actions.last(), Some(&Action::Settle));
    assert_eq!(
        reason(&state.clone().step(Input::Gone(Gone::Died), true).0),
        Some(GuestPaused)
    );
    let (panicked, _) = state.clone().step(Input::Crashed, true);
    assert_eq!(
        reason(&panicked.step(Input::Gone(Gone::Destroyed), true).0),
        Some(GuestCrashed)
    );
    assert_eq!(
        reason(&state.clone().step(Input::Gone(Gone::Panicked), true).0),
        Some(GuestCrashed)
    );
    let (failing, actions) = state.step(Input::GraceElapsed, true);
    assert_eq!(actions.last(), Some(&Action::Destroy));
    assert_eq!(
        reason(&failing.step(Input::Gone(Gone::Destroyed), true).0),
        Some(GuestPaused)
    );
}

#[test]
fn state_helpers_that_end_with_the_guest_are_no_crash() {
    let helper = || Input::HelperDied("virtiofsd".into());
    for inputs in [
        vec![STARTED, Input::ShuttingDown, helper(), Input::Gone(Gone::Died)],
        vec![STARTED, helper(), Input::Gone(Gone::PoweredOff)],
        vec![STARTED, helper(), Input::ShuttingDown, Input::Gone(Gone::Destroyed)],
    ] {
        assert_eq!(reason(&live(&inputs).0), Some(GuestShutdown), "{inputs:?}");
    }
    let (state, actions) = live(&[
        STARTED,
        Input::StopAsked,
        Input::ShuttingDown,
        helper(),
        Input::Gone(Gone::PoweredOff),
    ]);
    assert_eq!(
        (reason(&state), actions.contains(&Action::Destroy)),
        (Some(Stopped), false)
    );
}

#[test]
fn state_qemus_death_is_named_before_that_of_its_helpers() {
    let (state, _) = live(&[STARTED, Input::HelperDied("virtiofsd".into()), Input::Gone(Gone::Died)]);
    assert_eq!(state, State::Ended((GuestCrashed, "qemu ended unexpectedly".into())));
}

#[rstest]
fn state_every_path_ends_when_the_domain_is_gone(
    #[values(Gone::PoweredOff, Gone::Destroyed, Gone::Panicked, Gone::Died)] gone: Gone,
) {
    let inputs = [
        STARTED,
        Input::Started { paused: true },
        Input::Paused(Cause::Plain),
        Input::Paused(Cause::Trouble("x")),
        Input::Resumed,
        Input::Crashed,
        Input::ShuttingDown,
        Input::HelperDied("x".into()),
        Input::StopAsked,
        Input::Asked(Request::Pause),
        Input::Asked(Request::Unpause),
        Input::Asked(Request::SoftReboot),
        Input::Asked(Request::Reset),
        Input::CommandDone,
        Input::CommandFailed("x".into()),
        Input::PressAgain,
        Input::GraceElapsed,
    ];
    for a in &inputs {
        for b in &inputs {
            for c in &inputs {
                let path = [a.clone(), b.clone(), c.clone(), Input::Gone(gone)];
                let (state, actions) = live(&path);
                assert!(reason(&state).is_some(), "{path:?}");
                let asked = path.iter().filter(|input| matches!(input, Input::Asked(_))).count();
                let answered = actions
                    .iter()
                    .filter(|action| matches!(action, Action::Answer(_)))
                    .count();
                assert_eq!(asked, answered, "each request gets one answer: {path:?} {actions:?}");
            }
        }
    }
}
