//! Random bytes for serial numbers and symmetric keys.

use ring::rand::{SecureRandom, SystemRandom};

/// The system gave no randomness.
#[derive(Debug, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct RandomError;

/// `N` bytes from the system's random number generator.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], RandomError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| RandomError)?;
    Ok(bytes)
}

/// A serial number of 127 random bits: positive, never zero (RFC 5280, 4.1.2.2; CA/Browser Forum asks for 64 bits).
pub(crate) fn serial() -> Result<rcgen::SerialNumber, RandomError> {
    let mut bytes: [u8; 16] = random_bytes()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(rcgen::SerialNumber::from_slice(&bytes))
}
