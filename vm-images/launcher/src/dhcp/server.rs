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
    let lease = lease(nic, dhcp, &machine.hostname, &resolv_conf);
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

fn lease(nic: &Nic, dhcp: &Dhcp, hostname: &str, resolv_conf: &str) -> Lease {
    let (dns, search) = resolv::parse(resolv_conf);
    Lease {
        mac: nic.mac,
        address: dhcp.network.guest(),
        mask: dhcp.network.mask(),
        gateway: dhcp.network.gateway(),
        dns,
        search,
        hostname: hostname.to_owned(),
        mtu: u16::try_from(nic.mtu).unwrap_or(u16::MAX),
        options: dhcp.options.clone(),
        boot_server: dhcp.boot_server,
    }
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
