//! Interfaces and names of the node: fixed addresses by MAC, the remaining interface by DHCP, /etc/hosts.
//!
//! It speaks to the kernel through `ip` and leaves the DHCP lease to its own unit.

use std::fs;
use std::io;
use std::path::Path;

use kubernest_bootstrap::{HostEntry, Interface, NodeConfig};

use crate::command::{self, CommandError};
use crate::files::{self, FileError};

/// Unit that keeps the pod network's lease; it reads [`DHCP_ENVIRONMENT`].
pub const DHCP_UNIT: &str = "kubernest-dhcp.service";
const DHCP_ENVIRONMENT: &str = "/run/kubernest/dhcp.env";

/// Why the network is not as the document wants it.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel's list of interfaces cannot be read.
    #[error("cannot list the network interfaces")]
    List(#[source] io::Error),
    /// None has the MAC.
    #[error("no interface has MAC {mac} ({name}); the VM has {found}: compare its VirtualMachineInstance's interfaces")]
    Missing {
        /// Name it would get.
        name: String,
        /// Wanted address.
        mac: String,
        /// What there is.
        found: String,
    },
    /// A value that would not survive `ip -batch`.
    #[error("{value:?} is not a valid {what}")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// What the document says.
        value: String,
    },
    /// `ip` failed.
    #[error("cannot set up the interfaces")]
    Apply(#[source] CommandError),
    /// /etc/hosts or the DHCP unit's environment.
    #[error("cannot write the network's files")]
    Write(#[source] FileError),
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    name: String,
    mac: String,
}

/// Gives the interfaces their names and addresses; true if an interface is left for [`DHCP_UNIT`].
pub fn configure(config: &NodeConfig) -> Result<bool, NetworkError> {
    let links = links(Path::new("/sys/class/net")).map_err(NetworkError::List)?;
    let batch = batch(&config.interfaces, &links)?;
    command::run_with_input("ip", &["-batch", "-"], &batch).map_err(NetworkError::Apply)?;
    let Some(pod_link) = leftover(&config.interfaces, &links) else {
        return Ok(false);
    };
    let environment = format!("INTERFACE={}\n", pod_link);
    files::write(Path::new(DHCP_ENVIRONMENT), environment.as_bytes(), 0o644).map_err(NetworkError::Write)?;
    Ok(true)
}

/// Writes /etc/hosts.
pub fn write_hosts(config: &NodeConfig) -> Result<(), NetworkError> {
    let text = hosts(&config.hostname, &config.hosts)?;
    files::write(Path::new("/etc/hosts"), text.as_bytes(), 0o644)
        .map(drop)
        .map_err(NetworkError::Write)
}

/// Network cards only: bridges, veths and the like have no `device`.
fn links(sys_net: &Path) -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(sys_net)? {
        let entry = entry?;
        if entry.path().join("device").exists() {
            let mac = fs::read_to_string(entry.path().join("address"))?.trim().to_lowercase();
            links.push(Link {
                name: entry.file_name().to_string_lossy().into_owned(),
                mac,
            });
        }
    }
    links.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(links)
}

fn find<'a>(interface: &Interface, links: &'a [Link]) -> Option<&'a Link> {
    links.iter().find(|link| link.mac.eq_ignore_ascii_case(&interface.mac))
}

/// Name that the card without a fixed address has once [`batch`] was applied.
fn leftover(interfaces: &[Interface], links: &[Link]) -> Option<String> {
    let taken = |link: &Link| {
        interfaces
            .iter()
            .any(|wanted| wanted.mac.eq_ignore_ascii_case(&link.mac))
    };
    let link = links.iter().find(|link| !taken(link))?;
    let evicted = interfaces.iter().any(|wanted| wanted.name == link.name);
    Some(if evicted { parked(link) } else { link.name.clone() })
}

/// Where a card waits whose name another one gets: unique, because MACs are, and short (IFNAMSIZ is 16).
fn parked(link: &Link) -> String {
    format!("pod{}", link.mac.replace(':', ""))
}

/// Input of `ip -batch` that leads from `links` to `interfaces`. Applied twice it changes nothing.
fn batch(interfaces: &[Interface], links: &[Link]) -> Result<String, NetworkError> {
    let mut moves = String::new();
    let mut rest = String::new();
    for link in links {
        let keeps = interfaces
            .iter()
            .any(|wanted| wanted.name == link.name && find(wanted, links) == Some(link));
        let evicted = interfaces.iter().any(|wanted| wanted.name == link.name) && !keeps;
        if evicted {
            moves.push_str(&format!(
                "link set dev {} down\nlink set dev {} name {}\n",
                link.name,
                link.name,
                parked(link)
            ));
        }
    }
    for wanted in interfaces {
        let name = word("interface name", &wanted.name)?;
        let address = word("address", &wanted.address)?;
        let Some(link) = find(wanted, links) else {
            let found = links
                .iter()
                .map(|link| format!("{} {}", link.name, link.mac))
                .collect::<Vec<_>>()
                .join(", ");
            return Err(NetworkError::Missing {
                name: wanted.name.clone(),
                mac: wanted.mac.clone(),
                found,
            });
        };
        if link.name != wanted.name {
            let evicted = interfaces.iter().any(|other| other.name == link.name);
            let now = if evicted { parked(link) } else { link.name.clone() };
            rest.push_str(&format!("link set dev {now} down\nlink set dev {now} name {name}\n"));
        }
        rest.push_str(&format!(
            "address replace {address} dev {name}\nlink set dev {name} mtu {} up\n",
            wanted.mtu
        ));
    }
    if let Some(pod_link) = leftover(interfaces, links) {
        rest.push_str(&format!("link set dev {pod_link} up\n"));
    }
    Ok(moves + &rest)
}

/// A value that is one word, so that it cannot become another command of the batch.
fn word<'a>(what: &'static str, value: &'a str) -> Result<&'a str, NetworkError> {
    let fine = !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || ".:/_-".contains(c));
    if fine && !value.starts_with('-') {
        Ok(value)
    } else {
        Err(NetworkError::Malformed {
            what,
            value: value.to_owned(),
        })
    }
}

fn hosts(hostname: &str, entries: &[HostEntry]) -> Result<String, NetworkError> {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost\n");
    // Without an entry of its own the name still has to resolve.
    if !entries
        .iter()
        .any(|entry| entry.names.iter().any(|name| name == hostname))
    {
        text.push_str(&format!("127.0.1.1 {}\n", word("host name", hostname)?));
    }
    for entry in entries {
        text.push_str(word("address", &entry.ip)?);
        for name in &entry.names {
            text.push(' ');
            text.push_str(word("host name", name)?);
        }
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, mac: &str) -> Link {
        Link {
            name: name.to_owned(),
            mac: mac.to_owned(),
        }
    }

    fn eth1() -> Interface {
        Interface {
            name: "eth1".to_owned(),
            mac: "02:00:00:00:00:0b".to_owned(),
            address: "100.64.0.10/24".to_owned(),
            mtu: 1400,
        }
    }

    #[test]
    fn network_batch_sets_the_address_and_leaves_the_other_card_to_dhcp() {
        let links = [link("eth0", "02:00:00:00:00:0a"), link("eth1", "02:00:00:00:00:0b")];
        assert_eq!(
            batch(&[eth1()], &links).unwrap(),
            "address replace 100.64.0.10/24 dev eth1\nlink set dev eth1 mtu 1400 up\nlink set dev eth0 up\n"
        );
        assert_eq!(leftover(&[eth1()], &links).as_deref(), Some("eth0"));
    }

    #[test]
    fn network_batch_swaps_names_when_the_kernel_found_the_cards_the_other_way_round() {
        let links = [link("eth0", "02:00:00:00:00:0b"), link("eth1", "02:00:00:00:00:0a")];
        assert_eq!(
            batch(&[eth1()], &links).unwrap(),
            "link set dev eth1 down\nlink set dev eth1 name pod02000000000a\n\
             link set dev eth0 down\nlink set dev eth0 name eth1\n\
             address replace 100.64.0.10/24 dev eth1\nlink set dev eth1 mtu 1400 up\nlink set dev pod02000000000a up\n"
        );
        let after = [
            link("eth1", "02:00:00:00:00:0b"),
            link("pod02000000000a", "02:00:00:00:00:0a"),
        ];
        assert!(!batch(&[eth1()], &after).unwrap().contains("name"));
    }

    #[test]
    fn network_batch_tells_which_card_is_missing_and_refuses_injected_commands() {
        let error = batch(&[eth1()], &[link("eth0", "02:00:00:00:00:0a")])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("02:00:00:00:00:0b") && error.contains("eth0 02:00:00:00:00:0a"),
            "{error}"
        );
        let odd = Interface {
            address: "1.2.3.4/24\nlink del".to_owned(),
            ..eth1()
        };
        assert!(matches!(
            batch(&[odd], &[link("eth1", &eth1().mac)]),
            Err(NetworkError::Malformed { .. })
        ));
    }

    #[test]
    fn network_hosts_always_holds_localhost_and_the_own_name() {
        let entry = HostEntry {
            ip: "100.64.0.10".to_owned(),
            names: vec!["cp-0".to_owned(), "api".to_owned()],
        };
        assert_eq!(
            hosts("w-0", std::slice::from_ref(&entry)).unwrap(),
            "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 w-0\n100.64.0.10 cp-0 api\n"
        );
        assert!(!hosts("cp-0", &[entry]).unwrap().contains("127.0.1.1"));
    }
}
