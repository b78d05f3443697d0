//! Runs a program to its end and says what it said when it failed.
//!
//! For short administrative programs only: nothing here supervises or times out.

use std::io::Write;
use std::process::{Command, Output, Stdio};

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started, or its input not be written.
    #[error("cannot run {program}")]
    Run {
        /// Name of the program.
        program: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("{program} {status}: {said}")]
    Failed {
        /// Name and arguments.
        program: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The end of its standard error.
        said: String,
    },
}

/// Runs `program` and returns its output whatever its exit status.
pub fn output(program: &str, args: &[&str]) -> Result<Output, CommandError> {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| CommandError::Run {
            program: program.to_owned(),
            source,
        })
}

/// Runs `program`, which must succeed, and returns what it printed.
pub fn run(program: &str, args: &[&str]) -> Result<String, CommandError> {
    checked(program, args, output(program, args)?)
}

/// Like [`run`], with `input` on the program's standard input.
pub fn run_with_input(program: &str, args: &[&str], input: &str) -> Result<String, CommandError> {
    let failed = |source| CommandError::Run {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(failed)?;
    }
    checked(program, args, child.wait_with_output().map_err(failed)?)
}

fn checked(program: &str, args: &[&str], output: Output) -> Result<String, CommandError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().rev().take(3).collect::<Vec<_>>();
    Err(CommandError::Failed {
        program: format!("{program} {}", args.join(" ")),
        status: output.status,
        said: said.into_iter().rev().collect::<Vec<_>>().join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_failure_tells_what_the_program_said() {
        let error = run("sh", &["-c", "echo one >&2; echo two >&2; exit 3"]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("one; two"), "{text}");
    }

    #[test]
    fn command_input_reaches_the_program() {
        assert_eq!(run_with_input("cat", &[], "hello").unwrap(), "hello");
    }
}
