//! HAProxy's map of routes: the file it reads at start and the runtime socket that changes it while it runs.
//!
//! Nothing is ever reloaded, so no connection is dropped. Source: HAProxy 2.6 management guide, "show map", "add map",
//! "set map", "del map".

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::routes::{Change, Routes, changes};

/// Largest answer that is read from the socket: 100,000 routes of 160 bytes.
const ANSWER_LIMIT: u64 = 16 * 1024 * 1024;
/// HAProxy answers within milliseconds; past this it hangs and the attempt is repeated.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the map could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum HaproxyError {
    /// The map file can't be written.
    #[error("cannot write the map file {path}")]
    WriteMap {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The runtime socket can't be used.
    #[error("cannot talk to HAProxy at {path}")]
    Socket {
        /// Which socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// HAProxy didn't answer.
    #[error("HAProxy at {path} did not answer within {ANSWER_TIMEOUT:?}")]
    Silent {
        /// Which socket.
        path: PathBuf,
    },
    /// HAProxy refused a command.
    #[error("HAProxy refused {command:?}: {answer}")]
    Refused {
        /// The command.
        command: String,
        /// What it said.
        answer: String,
    },
}

/// Where HAProxy's map and socket are.
#[derive(Clone, Debug)]
pub struct Haproxy {
    /// Map file, also the map's name on the socket.
    pub map: PathBuf,
    /// Runtime socket with level admin.
    pub socket: PathBuf,
}

impl Haproxy {
    /// Writes the file that HAProxy reads when it starts; replaced in one step, so that it is never half there.
    pub fn write_map(&self, routes: &Routes) -> Result<(), HaproxyError> {
        let failed = |source| HaproxyError::WriteMap {
            path: self.map.clone(),
            source,
        };
        let text: String = routes.iter().map(|(host, to)| format!("{host} {to}\n")).collect();
        let fresh = self.map.with_extension("new");
        std::fs::write(&fresh, text).map_err(failed)?;
        std::fs::rename(&fresh, &self.map).map_err(failed)
    }

    /// Brings the running HAProxy's map to `routes`; returns how many entries changed.
    pub async fn update(&self, routes: &Routes) -> Result<usize, HaproxyError> {
        let map = self.map.display();
        let actual = parse_map(&self.ask(&format!("show map {map}")).await?);
        let changes = changes(routes, &actual);
        for change in &changes {
            let command = match change {
                Change::Add(host, to) => format!("add map {map} {host} {to}"),
                Change::Set(host, to) => format!("set map {map} {host} {to}"),
                Change::Delete(host) => format!("del map {map} {host}"),
            };
            let answer = self.ask(&command).await?;
            if !answer.trim().is_empty() {
                return Err(HaproxyError::Refused {
                    command,
                    answer: answer.trim().to_owned(),
                });
            }
        }
        Ok(changes.len())
    }

    async fn ask(&self, command: &str) -> Result<String, HaproxyError> {
        match tokio::time::timeout(ANSWER_TIMEOUT, exchange(&self.socket, command)).await {
            Ok(answer) => answer.map_err(|source| HaproxyError::Socket {
                path: self.socket.clone(),
                source,
            }),
            Err(_) => Err(HaproxyError::Silent {
                path: self.socket.clone(),
            }),
        }
    }
}

async fn exchange(socket: &Path, command: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("{command}\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_LIMIT).read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Lines of `show map`: `<pointer> <key> <value>`.
fn parse_map(answer: &str) -> Routes {
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        let (_pointer, host, to) = (words.next()?, words.next()?, words.next()?);
        Some((host.to_owned(), to.to_owned()))
    };
    answer.lines().filter_map(row).collect::<BTreeMap<_, _>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ingress_parses_show_map() {
        let text = "0x55d5 a.org.example 10.0.0.1:6443\n0x55d6 b.org.example 10.0.0.2:6443\n\n";
        assert_eq!(
            parse_map(text).get("b.org.example").map(String::as_str),
            Some("10.0.0.2:6443")
        );
    }
}
