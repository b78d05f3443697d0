//! The launcher's control protocol: what its mTLS port offers to `kubernest-api`, and the names in both certificates.
//!
//! HTTP/1.1 over TLS on [`crate::paths::CONTROL_PORT`]. Streams are upgrades (RFC 9110, section 7.8) to
//! [`STREAM_PROTOCOL`]: after `101 Switching Protocols` raw bytes flow both ways until one side closes. Commands are PUT
//! without a body. 200 is done; 409 with a sentence as plain text is refused because of the guest's state; other codes
//! are faults, with a sentence too.

/// `Upgrade:` of the streams.
pub const STREAM_PROTOCOL: &str = "kubernest-stream";
/// GET, upgrade: the serial console. A newer session ends an older one.
pub const CONSOLE: &str = "/v1/console";
/// GET, upgrade: the screen, as RFB. A newer session ends an older one, unless it asks for [`PRESERVE_SESSION`].
pub const VNC: &str = "/v1/vnc";
/// Query of [`VNC`] (`preserveSession=true`): refused with 409 while another session is open.
pub const PRESERVE_SESSION: &str = "preserveSession";
/// GET: a picture of the screen, as PNG of at most [`SCREENSHOT_BYTES`], whose number `Content-Length` tells.
pub const SCREENSHOT: &str = "/v1/screenshot";
/// Largest picture.
pub const SCREENSHOT_BYTES: u64 = 16 << 20;
/// PUT: the guest's processors stand still.
pub const PAUSE: &str = "/v1/pause";
/// PUT: they go on.
pub const UNPAUSE: &str = "/v1/unpause";
/// PUT: the guest is asked by ACPI to reboot.
pub const SOFT_REBOOT: &str = "/v1/softreboot";
/// PUT: the guest is reset as by its button; nothing is asked. A paused one stays paused.
pub const RESET: &str = "/v1/reset";

/// Files of the launcher's key pair, and of those that it lets in, below [`crate::paths::CONTROL_TLS`]; keys of the Secret.
pub mod files {
    /// The launcher's certificate, PEM.
    pub const CERTIFICATE: &str = "tls.crt";
    /// Its key, PEM.
    pub const KEY: &str = "tls.key";
    /// The CA that signs the other side's certificate, PEM.
    pub const CA: &str = "ca.crt";
}

/// DNS name in the certificate of the only client that a launcher serves.
pub const CLIENT_NAME: &str = "api.launcher.kubernest.io";

/// Conflict: asked to pause what is paused (KubeVirt's sentence).
pub const ALREADY_PAUSED: &str = "VMI is already paused";
/// Conflict: asked to go on with what is not paused (KubeVirt's sentence).
pub const NOT_PAUSED: &str = "VMI is not paused";
/// Conflict: asked of a guest that stands still (KubeVirt's sentence).
pub const PAUSED: &str = "VMI is paused";
/// Conflict: the guest does not run, or not any more (KubeVirt's sentence).
pub const NOT_RUNNING: &str = "VMI is not running";
/// Conflict: the guest has no way to be asked (KubeVirt's sentence).
pub const NO_ACPI: &str = "VMI neither have the agent connected nor the ACPI feature enabled";
/// Conflict: a command waits for libvirt; one is carried out at a time.
pub const BUSY: &str = "another command is being carried out";
/// Conflict: another session is open and shall stay.
pub const SESSION_OPEN: &str = "another VNC session is open";

/// DNS name in the certificate of the launcher that runs the instance of this uid.
pub fn server_name(uid: &str) -> String {
    format!("{uid}.launcher.kubernest.io")
}
