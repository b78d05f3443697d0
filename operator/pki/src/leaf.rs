//! What a leaf certificate shall say. Decides nothing about who may have it.

use std::{net::IpAddr, time::Duration};

use crate::LEAF_VALIDITY;

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum San {
    /// A DNS name.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

/// What a certificate may be used for (extended key usage).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// TLS client only.
    Client,
    /// TLS server only.
    Server,
    /// Both, as etcd's peers need.
    Both,
}

impl Usage {
    /// Whether it authenticates clients.
    pub fn client(self) -> bool {
        matches!(self, Usage::Client | Usage::Both)
    }

    /// Whether it authenticates servers.
    pub fn server(self) -> bool {
        matches!(self, Usage::Server | Usage::Both)
    }
}

/// The profile of a leaf certificate: for Kubernetes the common name is the user, the organization the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Subject's common name.
    pub common_name: String,
    /// Subject's organization.
    pub organization: Option<String>,
    /// Subject alternative names, sorted and without doubles.
    pub sans: Vec<San>,
    /// Extended key usage.
    pub usage: Usage,
    /// Time from now until `notAfter`.
    pub validity: Duration,
}

impl Leaf {
    /// A client certificate, valid for [`LEAF_VALIDITY`].
    pub fn client(common_name: impl Into<String>, organization: Option<&str>) -> Self {
        Leaf {
            common_name: common_name.into(),
            organization: organization.map(str::to_owned),
            sans: Vec::new(),
            usage: Usage::Client,
            validity: LEAF_VALIDITY,
        }
    }

    /// A server certificate, valid for [`LEAF_VALIDITY`].
    pub fn server(common_name: impl Into<String>, mut sans: Vec<San>) -> Self {
        sans.sort();
        sans.dedup();
        Leaf {
            common_name: common_name.into(),
            organization: None,
            sans,
            usage: Usage::Server,
            validity: LEAF_VALIDITY,
        }
    }

    /// The same leaf with another usage.
    pub fn with_usage(self, usage: Usage) -> Self {
        Leaf { usage, ..self }
    }
}
