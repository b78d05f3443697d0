//! Probes that go through the guest agent: the launcher's end of [`kubernest_domain::probe`], and what the kubelet runs.
//!
//! Only processes of the pod reach the socket. What a command says is the guest's word, and cut.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use kubernest_domain::paths;
use kubernest_domain::probe::{ANSWER_BYTES, Answer, DEFAULT_SECONDS, OUTPUT_BYTES, QUESTION_BYTES, Question};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::answers::{Run, Started};
use super::{Agent, AgentError};
use crate::chain;

/// Probes at once; the kubelet has one of each kind.
const PROBES: usize = 8;
/// How long a question may take to arrive, and its answer to be taken.
const TALK_LIMIT: Duration = Duration::from_secs(5);
/// First pause before a command is asked for again; doubled up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest time of a question in seconds.
const SECONDS_MAX: u32 = 3600;
/// Pause after a connection could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// What the asking process gives the launcher beyond the question's own time; the kubelet gives it a second.
const MARGIN: Duration = Duration::from_millis(700);

/// Why a probe has no answer of the guest's.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The command runs on.
    #[error("the command did not end within {0} s")]
    Late(u32),
    /// Ended by a signal.
    #[error("the command was ended by signal {0}")]
    Signal(i32),
}

/// Answers from now on.
///
/// # Errors
/// When the socket can't be made.
pub fn serve(socket: &Path, agent: Agent) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    let places = Arc::new(Semaphore::new(PROBES));
    tokio::spawn(async move {
        // Nobody closes the semaphore.
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let agent = agent.clone();
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, &agent).await {
                            tracing::debug!(%error, "answering a probe");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "accepting a probe");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    });
    Ok(())
}

async fn answer(mut stream: UnixStream, agent: &Agent) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = Vec::new();
    let mut read = BufReader::new(read).take(QUESTION_BYTES);
    timeout(TALK_LIMIT, read.read_until(b'\n', &mut line)).await??;
    let question: Question = serde_json::from_slice(&line)?;
    let seconds = question.seconds.clamp(1, SECONDS_MAX);
    let by = Instant::now() + Duration::from_secs(seconds.into());
    let answered = match question.command.split_first() {
        None => agent.ping(by).await.map_err(ProbeError::Agent),
        Some((program, arguments)) => agent.run(program, arguments, seconds, by).await,
    };
    let answer = answered.unwrap_or_else(|error| Answer {
        code: 1,
        said: chain(&error),
    });
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    timeout(TALK_LIMIT, write.write_all(&text)).await?
}

impl Agent {
    /// Whether it answers; that of a guest that a user has paused need not.
    async fn ping(&self, by: Instant) -> Result<Answer, AgentError> {
        let Err(error) = self.ask::<Value>("guest-ping", Value::Null, by).await else {
            return Ok(Answer::default());
        };
        let (reply, answer) = oneshot::channel();
        self.call(move |guest| drop(reply.send(guest.is_paused_by_user())));
        match timeout_at(by, answer).await {
            Ok(Ok(Ok(true))) => Ok(Answer::default()),
            _ => Err(error),
        }
    }

    /// Runs a command in the guest. One that is late goes on there; nobody asks for it any more.
    async fn run(&self, program: &str, arguments: &[String], seconds: u32, by: Instant) -> Result<Answer, ProbeError> {
        let command = json!({"path": program, "arg": arguments, "capture-output": true});
        let Started { pid } = self.ask("guest-exec", command, by).await?;
        let mut pause = PAUSE;
        loop {
            let run: Run = self.ask("guest-exec-status", json!({"pid": pid}), by).await?;
            if run.exited {
                return match (run.exitcode, run.signal) {
                    (None, Some(signal)) => Err(ProbeError::Signal(signal)),
                    (code, _) => Ok(Answer {
                        code: code.unwrap_or(0),
                        said: output(&run.out_data),
                    }),
                };
            }
            if Instant::now() + pause >= by {
                return Err(ProbeError::Late(seconds));
            }
            sleep(pause).await;
            pause = PAUSE_MAX.min(pause * 2);
        }
    }
}

/// The beginning of what a command has said. What is not base64 is left out.
fn output(data: &str) -> String {
    let bytes = STANDARD.decode(data).unwrap_or_default();
    let cut = &bytes[..bytes.len().min(OUTPUT_BYTES)];
    String::from_utf8_lossy(cut).into_owned()
}

/// What the kubelet runs in the pod for a probe that goes through the guest agent.
#[derive(Debug, Parser)]
#[command(about = "Asks the guest agent, through the launcher of this pod")]
pub struct Asked {
    /// The launcher's subcommand.
    #[arg(value_parser = [kubernest_domain::probe::SUBCOMMAND])]
    subcommand: String,
    /// Seconds that it may take.
    #[arg(long, default_value_t = DEFAULT_SECONDS)]
    timeout_seconds: u32,
    /// Where the launcher answers.
    #[arg(long, default_value = paths::PROBE_SOCKET)]
    socket: std::path::PathBuf,
    /// The program to run in the guest and its arguments; without it the agent is only greeted.
    #[arg(last = true)]
    command: Vec<String>,
}

impl Asked {
    /// Asks; exits with the code of the command.
    pub fn run(self) -> ExitCode {
        let asked = self.ask();
        let answer = asked.unwrap_or_else(|error| Answer {
            code: 1,
            said: format!("asking the launcher: {error}"),
        });
        if !answer.said.is_empty() {
            println!("{}", answer.said);
        }
        match (answer.code, u8::try_from(answer.code)) {
            (0, _) => ExitCode::SUCCESS,
            (_, Ok(code)) => ExitCode::from(code),
            (_, Err(_)) => ExitCode::FAILURE,
        }
    }

    fn ask(self) -> io::Result<Answer> {
        let question = Question {
            seconds: self.timeout_seconds,
            command: self.command,
        };
        let mut text = serde_json::to_vec(&question)?;
        text.push(b'\n');
        let mut stream = BlockingStream::connect(&self.socket)?;
        let limit = Duration::from_secs(self.timeout_seconds.into()) + MARGIN;
        stream.set_write_timeout(Some(limit))?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(&text)?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer)?;
        Ok(serde_json::from_slice(&answer)?)
    }
}

#[cfg(test)]
mod tests {
    use kubernest_domain::probe;
    use tokio::sync::watch;

    use super::*;

    #[test]
    fn probe_reads_what_pods_are_told() {
        let pod = |probe: &str| probe::command(&serde_json::from_str(probe).unwrap()).unwrap();
        let ping = Asked::try_parse_from(pod(r#"{"guestAgentPing": {}, "timeoutSeconds": 3}"#)).unwrap();
        assert_eq!((ping.timeout_seconds, ping.command.len()), (3, 0));
        let exec = Asked::try_parse_from(pod(r#"{"exec": {"command": ["sh", "-c", "--help", "--"]}}"#)).unwrap();
        assert_eq!(exec.command, ["sh", "-c", "--help", "--"]);
    }

    #[test]
    fn probe_cuts_what_a_command_says() {
        assert_eq!(output(&STANDARD.encode("hello\n")), "hello\n");
        assert_eq!(output(&STANDARD.encode(vec![b'x'; 1 << 20])).len(), OUTPUT_BYTES);
        assert_eq!(output("no base64!"), "");
    }

    #[tokio::test]
    async fn probe_of_a_guest_without_an_agent_fails_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("probe.sock");
        let (_libvirt, connected) = watch::channel(false);
        serve(&socket, Agent::new(connected)).unwrap();
        let asked = Asked {
            subcommand: probe::SUBCOMMAND.into(),
            timeout_seconds: 1,
            socket,
            command: vec!["true".into()],
        };
        let answer = tokio::task::spawn_blocking(|| asked.ask()).await.unwrap().unwrap();
        assert_eq!(
            (answer.code, answer.said.as_str()),
            (1, "the guest has no agent connected")
        );
    }
}
