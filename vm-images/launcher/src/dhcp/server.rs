//! The socket around [`Lease`]: bound to the tap, so no packet of another device is ever seen.
//!
//! Needs no capability: containerd lets every user bind low ports inside a pod, and Linux lets everyone tie an unbound
//! socket to a device (since 5.7).

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use kubernest_domain::machine::{Dhcp, Machine, Nic};
use tokio::net::UdpSocket;

use super::{Lease, resolv};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Longest datagram looked at in bytes; DHCP clients send at most an Ethernet frame.
const MAX_DATAGRAM: usize = 1500;
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why the guest would get no address.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// Name servers.
    #[error("reading {RESOLV_CONF}")]
    ResolvConf(#[source] io::Error),
    /// The guest would look for its name server on its own wire.
    #[error(
        "spec.networks[].pod.vmNetworkCIDR: the guest's network {network} has the address of the name server {server}, \
         which the guest would not reach: choose another"
    )]
    NameServer {
        /// The guest's.
        network: String,
        /// Of the pod's.
        server: Ipv4Addr,
    },
    /// UDP port 67.
    #[error("binding UDP port {SERVER_PORT}")]
    Bind(#[source] io::Error),
    /// The tap.
    #[error("binding to {tap}; has the CNI plugin made it?")]
    Device {
        /// Name of the device.
        tap: String,
        /// What was wrong.
        source: io::Error,
    },
}

/// Serves DHCP on the masquerade interface, if there is one, as long as the launcher lives.
pub async fn serve(machine: &Machine) -> Result<(), DhcpError> {
    let mut served = machine.nics.iter().filter_map(|nic| Some((nic, nic.dhcp.as_ref()?)));
    let Some((nic, dhcp)) = served.next() else {
        return Ok(());
    };
    let resolv_conf = std::fs::read_to_string(RESOLV_CONF).map_err(DhcpError::ResolvConf)?;
    let lease = lease(nic, dhcp, &machine.hostname, &resolv_conf)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SERVER_PORT))
        .await
        .map_err(DhcpError::Bind)?;
    socket
        .bind_device(Some(nic.tap.as_bytes()))
        .map_err(|source| DhcpError::Device {
            tap: nic.tap.clone(),
            source,
        })?;
    socket.set_broadcast(true).map_err(DhcpError::Bind)?;
    tracing::info!(tap = nic.tap, address = %lease.address, dns = ?lease.dns, "serving DHCP");
    tokio::spawn(async move {
        let mut buffer = [0; MAX_DATAGRAM];
        loop {
            match answer(&socket, &lease, &mut buffer).await {
                Ok(()) => {}
                Err(error) => tracing::debug!(%error, "answering DHCP"),
            }
        }
    });
    Ok(())
}

fn lease(nic: &Nic, dhcp: &Dhcp, hostname: &str, resolv_conf: &str) -> Result<Lease, DhcpError> {
    let (dns, search) = resolv::parse(resolv_conf);
    let (gateway, mask) = (dhcp.network.gateway(), dhcp.network.mask());
    if let Some(&server) = dns.iter().find(|server| **server & mask == gateway & mask) {
        let network = dhcp.network.to_string();
        return Err(DhcpError::NameServer { network, server });
    }
    Ok(Lease {
        mac: nic.mac,
        address: dhcp.network.guest(),
        mask,
        gateway,
        dns,
        search,
        hostname: hostname.to_owned(),
        mtu: u16::try_from(nic.mtu).unwrap_or(u16::MAX),
        options: dhcp.options.clone(),
        boot_server: dhcp.boot_server,
    })
}

async fn answer(socket: &UdpSocket, lease: &Lease, buffer: &mut [u8]) -> io::Result<()> {
    let (length, from) = socket.recv_from(buffer).await?;
    let Some(reply) = lease.answer(&buffer[..length]) else {
        return Ok(());
    };
    // A client without address hears broadcasts only; one that renews is asked by its own.
    let to = match from {
        SocketAddr::V4(from) if *from.ip() == lease.address => *from.ip(),
        _ => Ipv4Addr::BROADCAST,
    };
    socket.send_to(&reply, (to, CLIENT_PORT)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use kubernest_domain::TapKind;

    use super::*;

    fn lease_on(network: &str) -> Result<Lease, DhcpError> {
        let dhcp = Dhcp {
            network: network.parse().unwrap(),
            ..Dhcp::default()
        };
        let nic = Nic {
            name: "default".into(),
            tap: "tap0".into(),
            kind: TapKind::Masquerade,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1400,
            model: "virtio".into(),
            boot_order: None,
            dhcp: None,
        };
        let resolv_conf = "nameserver 10.96.0.10\nnameserver 192.0.2.53\nsearch cluster.local\n";
        lease(&nic, &dhcp, "vm-a", resolv_conf)
    }

    #[test]
    fn dhcp_guest_network_leaves_the_name_servers_outside() {
        for free in ["10.0.2.0/24", "10.96.1.0/24", "10.96.0.0/29"] {
            let lease = lease_on(free).unwrap();
            assert_eq!(lease.dns.len(), 2, "{free}");
            assert_eq!(lease.gateway.octets()[3], 1, "{free}");
        }
        for (taken, server) in [
            ("10.96.0.0/24", "10.96.0.10"),
            ("10.96.0.8/30", "10.96.0.10"),
            ("192.0.0.0/16", "192.0.2.53"),
        ] {
            let refused = crate::LaunchError::from(lease_on(taken).unwrap_err());
            let message = crate::failed(&refused).message;
            for part in ["spec.networks[].pod.vmNetworkCIDR", taken, server] {
                assert!(message.contains(part), "{message}");
            }
        }
    }
}
