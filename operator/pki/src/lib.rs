//! Keys and certificates of tenant clusters.
//!
//! An [`Issuer`] signs leaves for one CA; [`EmbeddedIssuer`] is the one that holds the CA's key itself. Keys are always
//! made here and signed by certificate request, so that an issuer elsewhere (Vault, OpenBao) sees no private key.
//! Everything is ECDSA P-256: under TCG an RSA handshake costs the guest several times as much.
//!
//! This crate holds no Kubernetes client, keeps nothing, and does not decide who gets which certificate.

mod csr;
mod embedded;
mod inspect;
mod issuer;
mod kubeconfig;
mod leaf;
mod random;

use std::time::Duration;

pub use csr::{CsrError, SigningRequest};
pub use embedded::{CaMaterial, EmbeddedError, EmbeddedIssuer, KeyMaterial};
pub use inspect::{CertificateInfo, InspectError, needs_renewal};
pub use issuer::{Credential, IssueError, Issuer, SignedCertificate, issue};
pub use kubeconfig::{Kubeconfig, KubeconfigAuth};
pub use leaf::{Leaf, San, Usage};
pub use random::{RandomError, random_bytes};

/// How long a CA is valid.
pub const CA_VALIDITY: Duration = Duration::from_secs(10 * YEAR);
/// How long a leaf is valid unless its request says otherwise.
pub const LEAF_VALIDITY: Duration = Duration::from_secs(YEAR);
/// How far `notBefore` lies in the past, so that a guest with a slow clock accepts a fresh certificate.
pub const BACKDATE: Duration = Duration::from_secs(5 * 60);

/// Seconds of a year without leap day.
const YEAR: u64 = 365 * 24 * 3600;
