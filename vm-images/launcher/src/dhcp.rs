//! DHCP (RFC 2131, 2132) for the one guest behind a masquerade interface. Pure: a datagram in, a datagram out.
//!
//! There is one lease and it never changes: no state, no timers, no pool. What comes from the guest is read with
//! bounds on every access and nothing of it is sent back but the transaction's own numbers.

use std::net::Ipv4Addr;

pub mod resolv;
pub mod server;

/// Length of the fixed part including the magic cookie.
const FIXED: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Least length of a reply: BOOTP's 300 bytes, which old clients insist on.
const MIN_REPLY: usize = 300;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;

mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DOMAIN_NAME_SERVER: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const DOMAIN_NAME: u8 = 15;
    pub(super) const INTERFACE_MTU: u8 = 26;
    pub(super) const REQUESTED_ADDRESS: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_IDENTIFIER: u8 = 54;
    pub(super) const DOMAIN_SEARCH: u8 = 119;
    pub(super) const END: u8 = 255;
}

/// Message types (RFC 2132, 9.6).
mod message {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const INFORM: u8 = 8;
}

/// What the guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The only client that is answered.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Ipv4Addr,
    /// Net mask.
    pub mask: Ipv4Addr,
    /// Router and server identifier.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Search domains, most specific first.
    pub search: Vec<String>,
    /// Host name.
    pub hostname: String,
    /// MTU in bytes.
    pub mtu: u16,
    /// Further options: number and value.
    pub options: Vec<(u8, Vec<u8>)>,
    /// The server that it boots from, if that is not the router.
    pub boot_server: Option<Ipv4Addr>,
}

impl Lease {
    /// The answer to a datagram, if it deserves one.
    pub fn answer(&self, datagram: &[u8]) -> Option<Vec<u8>> {
        let asked = Asked::parse(datagram)?;
        if asked.mac != self.mac || asked.server.is_some_and(|server| server != self.gateway) {
            return None;
        }
        match asked.message {
            message::DISCOVER => Some(self.reply(datagram, message::OFFER, self.address)),
            // A client that remembers another network's lease must forget it.
            message::REQUEST if asked.wants.is_some_and(|wants| wants != self.address) => {
                Some(self.reply(datagram, message::NAK, Ipv4Addr::UNSPECIFIED))
            }
            message::REQUEST => Some(self.reply(datagram, message::ACK, self.address)),
            message::INFORM => Some(self.reply(datagram, message::ACK, Ipv4Addr::UNSPECIFIED)),
            _ => None,
        }
    }

    /// `request` is at least [`FIXED`] long: it has been parsed.
    fn reply(&self, request: &[u8], kind: u8, address: Ipv4Addr) -> Vec<u8> {
        let mut reply = vec![0; FIXED];
        reply[..4].copy_from_slice(&[REPLY, 1, 6, 0]);
        reply[4..8].copy_from_slice(&request[4..8]);
        reply[10..12].copy_from_slice(&request[10..12]);
        reply[16..20].copy_from_slice(&address.octets());
        // Boot ROMs take the server from here and not from option 66 (RFC 2131, section 2).
        reply[20..24].copy_from_slice(&self.boot_server.unwrap_or(self.gateway).octets());
        reply[28..34].copy_from_slice(&self.mac);
        reply[236..].copy_from_slice(&MAGIC);
        let mut put = |code: u8, value: &[u8]| {
            // A longer value is continued in a second option of the same code (RFC 3396).
            for chunk in value.chunks(255) {
                reply.extend_from_slice(&[code, chunk.len() as u8]);
                reply.extend_from_slice(chunk);
            }
        };
        put(option::MESSAGE_TYPE, &[kind]);
        put(option::SERVER_IDENTIFIER, &self.gateway.octets());
        if kind != message::NAK {
            if !address.is_unspecified() {
                put(option::LEASE_TIME, &u32::MAX.to_be_bytes());
            }
            put(option::SUBNET_MASK, &self.mask.octets());
            put(option::ROUTER, &self.gateway.octets());
            put(
                option::DOMAIN_NAME_SERVER,
                &self.dns.iter().flat_map(Ipv4Addr::octets).collect::<Vec<_>>(),
            );
            put(option::HOST_NAME, self.hostname.as_bytes());
            put(option::INTERFACE_MTU, &self.mtu.to_be_bytes());
            if let Some(domain) = self.search.first() {
                put(option::DOMAIN_NAME, domain.as_bytes());
            }
            put(
                option::DOMAIN_SEARCH,
                &self
                    .search
                    .iter()
                    .flat_map(|domain| dns_name(domain))
                    .collect::<Vec<_>>(),
            );
            for (code, value) in &self.options {
                put(*code, value);
            }
        }
        reply.push(option::END);
        reply.resize(reply.len().max(MIN_REPLY), 0);
        reply
    }
}

/// A name in DNS's wire form without compression (RFC 1035, 3.1); nothing if it has none.
fn dns_name(name: &str) -> Vec<u8> {
    let labels = || name.trim_end_matches('.').split('.');
    if name.len() > 253 || labels().any(|label| label.is_empty() || label.len() > 63) {
        return Vec::new();
    }
    let mut wire: Vec<u8> = labels()
        .flat_map(|label| [&[label.len() as u8], label.as_bytes()].concat())
        .collect();
    wire.push(0);
    wire
}

/// What matters of a request.
struct Asked {
    mac: [u8; 6],
    message: u8,
    /// The address that the client says it has or wants.
    wants: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Asked {
    fn parse(datagram: &[u8]) -> Option<Self> {
        let fixed = datagram.get(..FIXED)?;
        if fixed[..3] != [REQUEST, 1, 6] || fixed[236..] != MAGIC {
            return None;
        }
        let address = |bytes: &[u8]| {
            <[u8; 4]>::try_from(bytes)
                .ok()
                .map(Ipv4Addr::from)
                .filter(|a| !a.is_unspecified())
        };
        let mut asked = Self {
            mac: fixed[28..34].try_into().ok()?,
            message: 0,
            wants: address(&fixed[12..16]),
            server: None,
        };
        let mut rest = &datagram[FIXED..];
        while let Some((&code, after)) = rest.split_first() {
            match code {
                option::PAD => rest = after,
                option::END => break,
                code => {
                    let (&length, after) = after.split_first()?;
                    let value = after.get(..usize::from(length))?;
                    rest = &after[usize::from(length)..];
                    match code {
                        option::MESSAGE_TYPE => asked.message = *value.first()?,
                        option::REQUESTED_ADDRESS => asked.wants = address(value),
                        option::SERVER_IDENTIFIER => asked.server = address(value),
                        _ => {}
                    }
                }
            }
        }
        Some(asked)
    }
}

#[cfg(test)]
mod tests;
