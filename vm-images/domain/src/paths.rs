//! Where things are inside a launcher pod: the controller mounts to these paths, the launcher reads from them.

/// User and group of everything in a launcher pod.
pub const LAUNCHER_ID: u32 = 107;
/// Writable emptyDir: home, sockets, overlays.
pub const RUN: &str = "/run/kubernest";
/// The launcher in its image; the kubelet runs it where a probe goes through the guest agent, see [`crate::probe`].
pub const LAUNCHER: &str = "/usr/local/bin/kubernest-launcher";
/// Socket on which the launcher answers those probes, below [`RUN`].
pub const PROBE_SOCKET: &str = "/run/kubernest/probe.sock";
/// Files made at start (overlays, empty disks, cloud-init images), below [`RUN`].
pub const DISKS: &str = "/run/kubernest/disks";
/// OVMF's program in the launcher image (Debian's package `ovmf`).
pub const EFI_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// OVMF's empty variables.
pub const EFI_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// A machine's own copy of them, below [`DISKS`].
pub const EFI_OWN_VARS: &str = "/run/kubernest/disks/efi-vars.fd";
/// Container disks are image volumes mounted read-only at `<this>/<volume>`.
pub const CONTAINER_DISKS: &str = "/run/container-disks";
/// In a container disk, the directory that holds the only disk file when the volume names no path.
pub const CONTAINER_DISK_DIR: &str = "disk";
/// The image volume of `firmware.kernelBoot.container`.
pub const KERNEL_BOOT: &str = "/run/kernel-boot";
/// Claims of mode Filesystem are mounted at `<this>/<volume>`.
pub const CLAIMS: &str = "/run/pvcs";
/// The raw disk in a claim of mode Filesystem.
pub const CLAIM_DISK: &str = "disk.img";
/// Claims of mode Block are devices at `<this>/<volume>`.
pub const BLOCK_DEVICES: &str = "/dev";
/// Secrets and ConfigMaps are mounted read-only at `<this>/<volume>`.
pub const VOLUMES: &str = "/run/volumes";
/// Secrets that cloud-init data refer to are mounted read-only at `<this>/<volume>/{user,network}`.
pub const CLOUD_INIT: &str = "/run/cloud-init";
/// Secrets of access credentials are mounted read-only at `<this>/<place in the list>`.
pub const ACCESS_CREDENTIALS: &str = "/run/access-credentials";
/// The Secret with the launcher's key pair for [`CONTROL_PORT`] is mounted read-only here.
pub const CONTROL_TLS: &str = "/run/control";
/// Kubernetes' default `terminationMessagePath`.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// TCP port of the plain HTTP health server in the pod's network namespace.
pub const HEALTH_PORT: u16 = 49080;
/// TCP port of the mTLS server in the pod's network namespace, see [`crate::control`].
pub const CONTROL_PORT: u16 = 49443;
