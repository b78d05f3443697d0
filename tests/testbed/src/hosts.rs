//! Lines in the machine's /etc/hosts, so that users and tests reach tenants by name; marked by bed, gone with it.
//!
//! It deliberately changes no line that it did not write.

use std::{fs, io, net::IpAddr, path::Path};

use crate::plan;

/// Why /etc/hosts could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be read.
    #[error("cannot read {FILE}")]
    Read(#[source] io::Error),
    /// It could not be written.
    #[error("cannot write {FILE}")]
    Write(#[source] io::Error),
    /// The name is not one of a host.
    #[error("{0:?} is not a host name")]
    Name(String),
}

const FILE: &str = "/etc/hosts";

/// Lets `host` mean `ip` on this machine, whatever the bed said of it before.
pub fn add(bed: &str, ip: IpAddr, host: &str) -> Result<(), Error> {
    let valid = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if host.is_empty() || !valid {
        return Err(Error::Name(host.into()));
    }
    change(|text| with(text, bed, ip, host))
}

/// Removes all lines of a bed.
pub fn remove(bed: &str) -> Result<(), Error> {
    change(|text| without(text, |line| is_of(line, bed)))
}

/// The lines of a bed.
pub fn of(bed: &str) -> Vec<String> {
    let text = fs::read_to_string(FILE).unwrap_or_default();
    text.lines().filter(|l| is_of(l, bed)).map(str::to_owned).collect()
}

fn mark(bed: &str) -> String {
    format!("# {}", plan::link_alias(bed))
}

fn is_of(line: &str, bed: &str) -> bool {
    line.ends_with(&mark(bed))
}

fn with(text: &str, bed: &str, ip: IpAddr, host: &str) -> String {
    let mut text = without(text, |line| {
        is_of(line, bed) && line.split_whitespace().nth(1) == Some(host)
    });
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text + &format!("{ip} {host} {}\n", mark(bed))
}

fn without(text: &str, gone: impl Fn(&str) -> bool) -> String {
    text.split_inclusive('\n')
        .filter(|line| !gone(line.trim_end_matches('\n')))
        .collect()
}

/// In place, not by renaming: /etc/hosts is a mount in containers.
fn change(edit: impl FnOnce(&str) -> String) -> Result<(), Error> {
    let old = match fs::read_to_string(FILE) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(Error::Read)?,
    };
    let new = edit(&old);
    if new == old {
        Ok(())
    } else {
        fs::write(Path::new(FILE), new).map_err(Error::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_hosts_come_and_go_without_touching_other_lines() {
        let ip: IpAddr = "10.240.0.10".parse().unwrap();
        let other = "127.0.0.1 localhost\n10.0.0.1 a.b # kubernest-testbed dev2";
        let once = with(other, "dev", ip, "a.b");
        assert_eq!(once, format!("{other}\n10.240.0.10 a.b # kubernest-testbed dev\n"));
        assert_eq!(with(&once, "dev", ip, "a.b"), once);
        assert_eq!(without(&once, |l| is_of(l, "dev")), format!("{other}\n"));
    }
}
