//! One CNI call: environment and standard input to the agent's socket, its answer back.
//!
//! Speaks just as much HTTP/1.1 as that takes, since a client library would be most of the binary.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use kubernest_plan::cni::{VERSIONS, WireCall, failed};
use serde_json::{Value, json};

/// Where the agent listens, unless the environment says otherwise.
const SOCKET: &str = "/run/kubernest/cni.sock";
/// Names another socket; for tests and unusual hosts.
const SOCKET_VARIABLE: &str = "KUBERNEST_SOCKET";
/// The largest configuration and the largest answer that are read, in bytes.
const LIMIT: u64 = 1 << 20;
/// How long the agent may take. Runtimes give up after two minutes or more.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no answer of the agent.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("read the network's configuration")]
    Input(#[source] io::Error),
    #[error("the network's configuration is not JSON")]
    Config(#[source] serde_json::Error),
    #[error(
        "kubernest-node does not answer on {socket}: see kubectl -n kubernest-system get pods -o wide, \
         its pod on this node must be Ready"
    )]
    Connect { socket: String, source: io::Error },
    #[error("talk to kubernest-node")]
    Talk(#[source] io::Error),
    #[error("kubernest-node gave an answer that is not HTTP with JSON")]
    Answer,
}

impl CallError {
    /// CNI error codes: 5 input/output, 6 decoding, 11 try again later.
    fn code(&self) -> u32 {
        match self {
            Self::Input(_) => 5,
            Self::Config(_) => 6,
            Self::Connect { .. } | Self::Talk(_) | Self::Answer => 11,
        }
    }
}

/// Carries out the call that environment and standard input describe: what to print, and the exit code.
pub fn run(environment: impl Iterator<Item = (String, String)>, stdin: impl Read) -> (Value, ExitCode) {
    let environment: BTreeMap<_, _> = environment.collect();
    // The runtime asks for versions also where no agent runs yet.
    if environment
        .get("CNI_COMMAND")
        .is_some_and(|command| command == "VERSION")
    {
        let newest = VERSIONS.last().copied().unwrap_or_default();
        return (
            json!({"cniVersion": newest, "supportedVersions": VERSIONS}),
            ExitCode::SUCCESS,
        );
    }
    match pass_on(&environment, stdin) {
        Ok((true, answer)) => (answer, ExitCode::SUCCESS),
        Ok((false, error)) => (error, ExitCode::FAILURE),
        Err(error) => {
            let details = std::error::Error::source(&error)
                .map(ToString::to_string)
                .unwrap_or_default();
            (failed(error.code(), &error.to_string(), &details), ExitCode::FAILURE)
        }
    }
}

fn pass_on(environment: &BTreeMap<String, String>, stdin: impl Read) -> Result<(bool, Value), CallError> {
    let mut input = Vec::new();
    stdin.take(LIMIT).read_to_end(&mut input).map_err(CallError::Input)?;
    let config = if input.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&input).map_err(CallError::Config)?
    };
    let call = wire_call(environment, config);
    let body = serde_json::to_vec(&call).map_err(CallError::Config)?;

    let socket = environment.get(SOCKET_VARIABLE).map_or(SOCKET, String::as_str);
    let connected = UnixStream::connect(socket);
    let mut stream = connected.map_err(|source| CallError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    let answer = exchange(&mut stream, &body).map_err(CallError::Talk)?;
    read_answer(&answer).ok_or(CallError::Answer)
}

fn exchange(stream: &mut UnixStream, body: &[u8]) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "POST /v1/cni HTTP/1.1\r\nHost: kubernest-node\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.take(LIMIT).read_to_end(&mut answer)?;
    Ok(answer)
}

fn wire_call(environment: &BTreeMap<String, String>, config: Value) -> WireCall {
    let variable = |name: &str| environment.get(name).cloned().unwrap_or_default();
    let args = variable("CNI_ARGS");
    let args = args.split(';').filter_map(|pair| pair.split_once('='));
    WireCall {
        command: variable("CNI_COMMAND"),
        container_id: variable("CNI_CONTAINERID"),
        netns: variable("CNI_NETNS"),
        ifname: variable("CNI_IFNAME"),
        args: args.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        config,
    }
}

/// Whether the status is 200, and the JSON body. The agent closes after its answer, so the body is all of the rest.
fn read_answer(answer: &[u8]) -> Option<(bool, Value)> {
    let head_end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let (head, body) = (
        std::str::from_utf8(answer.get(..head_end)?).ok()?,
        answer.get(head_end + 4..)?,
    );
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?;
    Some((status == "200", serde_json::from_slice(body).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_reads_the_environment() {
        let variables = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c0ffee"),
            ("CNI_NETNS", "/run/netns/x"),
            ("CNI_IFNAME", "tap0"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=org-acme;K8S_POD_NAME=p;MAC=02:00:00:00:00:01",
            ),
        ];
        let environment = variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let call = wire_call(&environment, json!({"mode": "masquerade"}));
        assert_eq!(call.args["K8S_POD_NAMESPACE"], "org-acme");
        assert_eq!(call.args["MAC"], "02:00:00:00:00:01");
        assert_eq!(call.ifname, "tap0");
    }

    #[test]
    fn call_reads_answers() {
        let body = |status: &str, body: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\n{body}");
        assert_eq!(read_answer(body("200 OK", "{}").as_bytes()), Some((true, json!({}))));
        assert_eq!(
            read_answer(body("422 No", "{\"code\":7}").as_bytes()),
            Some((false, json!({"code": 7})))
        );
        for bad in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "SSH-2.0\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\n\r\n{",
        ] {
            assert_eq!(read_answer(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn call_says_what_to_do_without_an_agent() {
        let variables = [("CNI_COMMAND", "ADD"), (SOCKET_VARIABLE, "/nonexistent/cni.sock")];
        let (answer, _) = run(
            variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter(),
            &b"{}"[..],
        );
        assert_eq!(answer["code"], 11);
        assert!(answer["msg"].as_str().unwrap().contains("kubectl"), "{answer}");
    }

    #[test]
    fn call_answers_version_itself() {
        let variables = [("CNI_COMMAND".to_owned(), "VERSION".to_owned())];
        let (answer, _) = run(variables.into_iter(), io::empty());
        assert_eq!(answer["supportedVersions"][2], "1.0.0");
    }
}
