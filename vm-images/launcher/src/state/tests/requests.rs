//! Requests of the control port: each as a table of motions.

use rstest::rstest;

use super::super::{Action::*, Motion::*, *};
use super::{live, reason};

const RESETTING: Motion = Resetting { paused: false };
const RESETTING_PAUSED: Motion = Resetting { paused: true };
const TROUBLE: Input = Input::Paused(Cause::Trouble("x"));

fn answered(refusal: Refusal) -> Vec<Action> {
    vec![Answer(Err(refusal))]
}

fn done() -> Vec<Action> {
    vec![Answer(Ok(()))]
}

#[rstest]
#[case(Moving, Request::Pause, Pausing, vec![Suspend])]
#[case(Moving, Request::Unpause, Moving, answered(Refusal::NotPaused))]
#[case(Moving, Request::SoftReboot, Rebooting, vec![Reboot])]
#[case(Moving, Request::Reset, RESETTING, vec![Action::Reset])]
#[case(Paused, Request::Pause, Paused, answered(Refusal::AlreadyPaused))]
#[case(Paused, Request::Unpause, Resuming, vec![Resume])]
#[case(Paused, Request::SoftReboot, Paused, answered(Refusal::Paused))]
#[case(Paused, Request::Reset, RESETTING_PAUSED, vec![Action::Reset])]
fn state_requests_of_a_running_guest(
    #[case] motion: Motion,
    #[case] request: Request,
    #[case] next: Motion,
    #[case] actions: Vec<Action>,
) {
    let stepped = State::Running(motion).step(Input::Asked(request), true);
    assert_eq!(stepped, (State::Running(next), actions));
}

#[rstest]
fn state_one_request_is_carried_out_at_a_time(
    #[values(Pausing, Resuming, Rebooting, RESETTING, RESETTING_PAUSED)] motion: Motion,
    #[values(Request::Pause, Request::Unpause, Request::SoftReboot, Request::Reset)] request: Request,
) {
    let stepped = State::Running(motion).step(Input::Asked(request), true);
    assert_eq!(stepped, (State::Running(motion), answered(Refusal::Busy)));
}

#[rstest]
fn state_requests_need_a_guest_that_runs(
    #[values(
        State::NEW,
        State::ShuttingDown { asked: false },
        State::Stopping { paused: true },
        State::Killing,
        State::Settling((TerminationReason::GuestPaused, String::new())),
        State::Failing((TerminationReason::GuestCrashed, String::new())),
        State::Ended((TerminationReason::Stopped, String::new())),
    )]
    state: State,
    #[values(Request::Pause, Request::Unpause, Request::SoftReboot, Request::Reset)] request: Request,
) {
    let stepped = state.clone().step(Input::Asked(request), true);
    assert_eq!(stepped, (state, answered(Refusal::NotRunning)));
}

#[test]
fn state_a_guest_without_acpi_can_not_be_asked_to_reboot_but_reset() {
    let running = State::Running(Moving);
    assert_eq!(
        running.clone().step(Input::Asked(Request::SoftReboot), false),
        (running.clone(), answered(Refusal::NoAcpi))
    );
    assert_eq!(
        running.step(Input::Asked(Request::Reset), false),
        (State::Running(RESETTING), vec![Action::Reset])
    );
}

#[rstest]
#[case(Pausing, Input::Paused(Cause::Plain), Paused, done())]
#[case(Resuming, Input::Resumed, Moving, done())]
#[case(Rebooting, Input::CommandDone, Moving, done())]
#[case(RESETTING, Input::CommandDone, Moving, done())]
#[case(RESETTING_PAUSED, Input::CommandDone, Paused, done())]
#[case(Pausing, Input::CommandFailed("x".into()), Moving, answered(Refusal::Failed("x".into())))]
#[case(Resuming, Input::CommandFailed("x".into()), Paused, answered(Refusal::Failed("x".into())))]
#[case(Rebooting, Input::CommandFailed("x".into()), Moving, answered(Refusal::Failed("x".into())))]
#[case(RESETTING, Input::CommandFailed("x".into()), Moving, answered(Refusal::Failed("x".into())))]
#[case(RESETTING_PAUSED, Input::CommandFailed("x".into()), Paused, answered(Refusal::Failed("x".into())))]
// Late news of the domain's start.
#[case(Moving, Input::Resumed, Moving, vec![])]
#[case(Pausing, Input::Resumed, Pausing, vec![])]
#[case(Paused, Input::Paused(Cause::Plain), Paused, vec![])]
#[case(Resuming, Input::Paused(Cause::Plain), Resuming, vec![])]
#[case(RESETTING, Input::Resumed, RESETTING, vec![])]
#[case(RESETTING_PAUSED, Input::Paused(Cause::Plain), RESETTING_PAUSED, vec![])]
#[case(RESETTING_PAUSED, Input::Resumed, RESETTING, vec![])]
// Answered already.
#[case(Moving, Input::CommandFailed("x".into()), Moving, vec![])]
#[case(Paused, Input::CommandFailed("x".into()), Paused, vec![])]
#[case(Paused, Input::Resumed, Moving, vec![])]
fn state_what_comes_of_a_request(
    #[case] motion: Motion,
    #[case] input: Input,
    #[case] next: Motion,
    #[case] actions: Vec<Action>,
) {
    assert_eq!(
        State::Running(motion).step(input, true),
        (State::Running(next), actions)
    );
}

/// What happens to a guest that moves happens to one that is paused, or is about to be.
#[rstest]
fn state_all_else_ends_a_guest_in_any_motion(
    #[values(Pausing, Paused, Resuming, Rebooting, RESETTING, RESETTING_PAUSED)] motion: Motion,
    #[values(
        Input::Gone(Gone::PoweredOff),
        Input::Gone(Gone::Destroyed),
        Input::Gone(Gone::Panicked),
        Input::Gone(Gone::Died),
        Input::Crashed,
        Input::HelperDied("x".into()),
        Input::ShuttingDown,
    )]
    input: Input,
) {
    let (expected, mut actions) = State::Running(Moving).step(input.clone(), true);
    if motion.is_pending() {
        let heard = motion == Rebooting && input == Input::ShuttingDown;
        actions.insert(0, Answer(if heard { Ok(()) } else { Err(Refusal::NotRunning) }));
    }
    assert_eq!(State::Running(motion).step(input, true), (expected, actions));
}

#[rstest]
fn state_a_pause_nobody_asked_for_is_a_failure(
    #[values(Moving, Rebooting, RESETTING)] motion: Motion,
    #[values(Cause::Plain, Cause::Trouble("x"))] cause: Cause,
) {
    let (state, actions) = State::Running(motion).step(Input::Paused(cause), true);
    let State::Settling((reason, why)) = state else {
        panic!("{state:?}");
    };
    assert_eq!(
        (reason, why.as_str()),
        (TerminationReason::GuestPaused, cause.unasked())
    );
    assert!(actions.ends_with(&[Ready(false), Settle]), "{actions:?}");
    assert_eq!(actions.len() == 3, motion.is_pending(), "{actions:?}");
}

#[test]
fn state_trouble_is_not_the_pause_that_was_asked_for() {
    let (state, actions) = State::Running(Pausing).step(TROUBLE, true);
    assert_eq!(state, State::Settling((TerminationReason::GuestPaused, "x".into())));
    assert_eq!(
        actions,
        [Answer(Err(Refusal::NotRunning)), Ready(false), Settle],
        "whoever has asked does not hear that it is paused"
    );
    // libvirt has carried out the command as well.
    assert_eq!(state.clone().step(Input::Paused(Cause::Plain), true), (state, vec![]));
    // Nor is it while the guest is stopped.
    let (state, _) = State::Running(Pausing).step(Input::StopAsked, true);
    assert_eq!(state.step(TROUBLE, true), (State::Killing, vec![Destroy]));
}

#[rstest]
#[case(Pausing, vec![Answer(Err(Refusal::NotRunning))])]
#[case(Paused, vec![])]
#[case(Resuming, vec![Answer(Err(Refusal::NotRunning))])]
#[case(RESETTING_PAUSED, vec![Answer(Err(Refusal::NotRunning))])]
fn state_a_paused_guest_goes_on_before_it_is_stopped(#[case] motion: Motion, #[case] answer: Vec<Action>) {
    let (state, actions) = State::Running(motion).step(Input::StopAsked, true);
    assert_eq!(state, State::Stopping { paused: true });
    assert_eq!(actions, [answer, vec![Ready(false), Resume, StartGrace]].concat());
    let pressed = (State::Stopping { paused: false }, vec![PowerButton]);
    // A pause that was on its way goes before the end that it was told to have.
    let (state, actions) = state.step(Input::Paused(Cause::Plain), true);
    assert_eq!((&state, actions), (&State::Stopping { paused: true }, vec![]));
    assert_eq!(state.clone().step(Input::Resumed, true), pressed);
    assert_eq!(state.clone().step(Input::CommandFailed("x".into()), true), pressed);
    let (stopping, _) = state.step(Input::Resumed, true);
    let (killing, _) = stopping.step(Input::Paused(Cause::Plain), true);
    assert_eq!(killing, State::Killing, "only the pause that was asked for is undone");
    assert_eq!(
        State::Running(motion).step(Input::StopAsked, false).0,
        State::Killing,
        "without a power button there is nothing to hear"
    );
}

#[rstest]
#[case(Rebooting)]
#[case(RESETTING)]
fn state_a_guest_that_moves_is_stopped_at_once(#[case] motion: Motion) {
    let (state, actions) = State::Running(motion).step(Input::StopAsked, true);
    assert_eq!(state, State::Stopping { paused: false });
    assert_eq!(
        actions,
        [Answer(Err(Refusal::NotRunning)), Ready(false), PowerButton, StartGrace]
    );
}

#[test]
fn state_a_reboot_is_a_shutdown_that_goes_on() {
    let (state, actions) = live(&[
        super::STARTED,
        Input::Asked(Request::SoftReboot),
        Input::CommandDone,
        Input::ShuttingDown,
        Input::Resumed,
    ]);
    assert_eq!(state, State::Running(Moving));
    assert_eq!(
        actions,
        [Ready(true), Reboot, Answer(Ok(())), Ready(false), Ready(true)]
    );
    // A shutdown later is one again.
    let (state, _) = state.step(Input::ShuttingDown, true);
    let (state, _) = state.step(Input::Gone(Gone::PoweredOff), true);
    assert_eq!(reason(&state), Some(TerminationReason::GuestShutdown));
}

#[test]
fn state_a_stop_that_meets_a_reboot_is_not_lost() {
    for inputs in [
        vec![super::STARTED, Input::ShuttingDown, Input::StopAsked],
        vec![super::STARTED, Input::StopAsked, Input::ShuttingDown],
    ] {
        let (state, actions) = live(&inputs);
        assert_eq!(state, State::ShuttingDown { asked: true });
        assert!(actions.contains(&StartGrace), "{actions:?}");
        assert_eq!(
            state.step(Input::Resumed, true),
            (State::Stopping { paused: false }, vec![PowerButton])
        );
    }
}

#[rstest]
#[case(vec![], Paused, vec![Ready(true)])]
#[case(vec![Input::Paused(Cause::Plain)], Paused, vec![Ready(true)])]
#[case(vec![Input::Asked(Request::Unpause), Input::Paused(Cause::Plain), Input::Resumed], Moving,
    vec![Ready(true), Resume, Answer(Ok(()))])]
fn state_a_guest_that_starts_paused_is_ready(
    #[case] then: Vec<Input>,
    #[case] motion: Motion,
    #[case] actions: Vec<Action>,
) {
    let inputs = [vec![Input::Started { paused: true }], then].concat();
    assert_eq!(live(&inputs), (State::Running(motion), actions));
}

#[test]
fn state_a_stop_while_a_paused_guest_starts_has_it_go_on_first() {
    let (state, actions) = live(&[Input::StopAsked, Input::Started { paused: true }]);
    assert_eq!(state, State::Stopping { paused: true });
    assert_eq!(actions, [Ready(false), Resume, StartGrace]);
}
