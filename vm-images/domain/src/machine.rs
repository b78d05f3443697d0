//! [`Machine`]: the domain as the launcher will run it, every choice made and every path known.
//!
//! Only [`crate::plan`] makes one; what is unsupported or inconsistent never gets here.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use kubernest_crds::kubevirt::v1::GuestNetwork;

use crate::processors::Pinning;
use crate::{Accelerator, TapKind};

/// One libvirt domain and what must exist before it starts.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// libvirt's name: `<namespace>_<name>`.
    pub name: String,
    /// SMBIOS UUID.
    pub uuid: Option<String>,
    /// SMBIOS system serial number.
    pub system_serial: Option<String>,
    /// Host name offered to the guest through DHCP and cloud-init.
    pub hostname: String,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// qemu's machine type, `q35` or a versioned one of its family.
    pub machine_type: String,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// Virtual processors.
    pub topology: Topology,
    /// The node's processors that they run on, if they have some of their own.
    pub pinning: Option<Pinning>,
    /// What the processors look like.
    pub cpu: Cpu,
    /// Features that the processors get or lose: libvirt's policy and name.
    pub cpu_features: Vec<(String, String)>,
    /// TCG's translation cache in MiB; without meaning under KVM.
    pub translation_cache_mib: u64,
    /// ACPI tables; without them a guest can't be asked to shut down.
    pub acpi: bool,
    /// What boots the disks.
    pub firmware: Firmware,
    /// Kernel that qemu loads itself, past the firmware's boot order.
    pub kernel: Option<Kernel>,
    /// Time zone of the guest's hardware clock; UTC with this many seconds' offset if `Ok`.
    pub clock: Clock,
    /// Timers that the VMI has an opinion about.
    pub timers: Vec<Timer>,
    /// Block devices, in the VMI's order.
    pub disks: Vec<Disk>,
    /// Network cards, in the VMI's order.
    pub nics: Vec<Nic>,
    /// virtiofs shares, in the VMI's order.
    pub shares: Vec<Share>,
    /// A first serial port.
    pub serial_console: bool,
    /// A screen with a VNC server.
    pub graphics: bool,
    /// Tablets, each on its bus.
    pub tablets: Vec<Bus>,
    /// A virtio random number generator.
    pub rng: bool,
    /// A balloon.
    pub balloon: bool,
    /// Memory that the guest has freed goes back to the node at once.
    pub free_page_reporting: bool,
    /// What an i6300esb watchdog does when it expires, in libvirt's words.
    pub watchdog: Option<&'static str>,
    /// Time from ACPI power button to destruction, in seconds.
    pub grace_seconds: u64,
    /// Its processors stand still until somebody has them go on.
    pub start_paused: bool,
}

/// Virtual processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

impl Topology {
    /// All virtual processors.
    pub fn vcpus(self) -> u32 {
        self.sockets * self.cores * self.threads
    }
}

/// What the processors look like to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Exactly the host's.
    HostPassthrough,
    /// libvirt's nearest named model with the host's features.
    HostModel,
    /// A model qemu knows by name.
    Named(String),
}

/// What boots the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios {
        /// Its output goes to the serial console as well.
        serial: bool,
    },
    /// OVMF without secure boot.
    Efi,
}

/// A timer in libvirt's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    /// `hpet`, `kvmclock`, `pit` or `rtc`.
    pub name: &'static str,
    /// There or not; libvirt's choice when not said.
    pub present: Option<bool>,
    /// What becomes of missed ticks.
    pub tick_policy: Option<String>,
    /// What the real time clock follows.
    pub track: Option<String>,
}

/// A kernel that qemu loads directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Command line.
    pub args: String,
}

/// The guest's hardware clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clock {
    /// UTC plus seconds.
    Utc(i64),
    /// Local time of this IANA zone.
    Zone(String),
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The VMI's name of disk and volume.
    pub name: String,
    /// Where its content comes from.
    pub source: Source,
    /// What libvirt opens.
    pub backend: Backend,
    /// How the guest sees it.
    pub device: Device,
    /// Bus.
    pub bus: Bus,
    /// Serial number the guest sees.
    pub serial: Option<String>,
    /// Position in the firmware's boot order, from 1.
    pub boot_order: Option<u32>,
    /// libvirt's cache mode.
    pub cache: Option<String>,
    /// libvirt's I/O mode.
    pub io: Option<String>,
    /// libvirt's error policy.
    pub error_policy: String,
    /// Logical and physical block size in bytes.
    pub block_size: Option<(u64, u64)>,
    /// The guest may not write.
    pub read_only: bool,
}

impl Disk {
    /// Bytes of the smallest piece of it that a guest reads: those of a CD-ROM are always larger.
    pub fn sector_bytes(&self) -> u64 {
        let logical = self.block_size.map_or(512, |(logical, _)| logical);
        match self.device {
            Device::Disk => logical,
            Device::Cdrom => logical.max(2048),
        }
    }
}

/// Where a disk's content comes from: what the launcher does before the domain starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A throw-away overlay over a file of an image: the named one, or the only file in the directory.
    Overlay {
        /// Root of the mounted image.
        image: PathBuf,
        /// Path below it, without leading slash; none means the only file below `disk/`.
        file: Option<PathBuf>,
    },
    /// A throw-away overlay over a raw disk that is there.
    Ephemeral {
        /// The disk: a file or a block device.
        base: PathBuf,
    },
    /// A raw file that is kept; made sparse with this many bytes when absent.
    Keep {
        /// Size in bytes when made.
        size: u64,
    },
    /// A device that is there.
    Device,
    /// A new sparse raw file.
    Empty {
        /// Size in bytes.
        size: u64,
    },
    /// A FAT image that cloud-init reads.
    CloudInit(CloudInit),
    /// A FAT image of the plain files of a directory.
    Files {
        /// Directory to take them from.
        directory: PathBuf,
        /// Volume label, at most 11 characters.
        label: String,
    },
}

/// What cloud-init is told; texts given inline, or read from a mounted Secret at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudInit {
    /// Where its parts lie.
    pub layout: CloudInitLayout,
    /// Meta data: a JSON object.
    pub meta_data: serde_json::Map<String, serde_json::Value>,
    /// Folders whose files are lines of `authorized_keys`, added to the meta data at start.
    pub ssh_keys: Vec<PathBuf>,
    /// User data.
    pub user_data: Text,
    /// Network configuration.
    pub network_data: Option<Text>,
}

/// A data source of cloud-init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloudInitLayout {
    /// `meta-data`, `user-data`, `network-config` on a volume `cidata`.
    NoCloud,
    /// `openstack/latest/…` on a volume `config-2`.
    ConfigDrive,
}

/// Bytes known now, or found in one of these files at start (first that exists).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// Given inline.
    Inline(Vec<u8>),
    /// A key of a mounted Secret; more than one spelling is accepted.
    Mounted(Vec<PathBuf>),
}

/// What libvirt opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A raw file.
    Raw(PathBuf),
    /// A qcow2 file.
    Qcow2(PathBuf),
    /// A raw block device.
    Block(PathBuf),
}

/// How the guest sees a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// A disk.
    Disk,
    /// A CD-ROM drive.
    Cdrom,
}

/// The bus a block device hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// AHCI.
    Sata,
    /// virtio-scsi.
    Scsi,
    /// USB.
    Usb,
}

/// A network card on an existing tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The VMI's name of the interface.
    pub name: String,
    /// Device in the pod's network namespace.
    pub tap: String,
    /// How the tap meets the network.
    pub kind: TapKind,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// MTU in bytes offered to the guest.
    pub mtu: u32,
    /// qemu's device name, or `virtio`.
    pub model: String,
    /// Position in the firmware's boot order, from 1.
    pub boot_order: Option<u32>,
    /// What the launcher's DHCP server tells the guest; none where it serves nothing.
    pub dhcp: Option<Dhcp>,
}

/// What DHCP tells a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dhcp {
    /// Addresses of guest and router.
    pub network: GuestNetwork,
    /// Options beyond the lease: number and value of 1 to 255 bytes.
    pub options: Vec<(u8, Vec<u8>)>,
    /// The server that it boots from, where that is known as an address.
    pub boot_server: Option<Ipv4Addr>,
}

impl Nic {
    /// The address as libvirt and people write it.
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}

/// A directory shared read-only through virtiofs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The guest's mount tag; the VMI's name of filesystem and volume.
    pub tag: String,
    /// Directory in the pod.
    pub directory: PathBuf,
    /// Socket on which its virtiofsd answers.
    pub socket: PathBuf,
}
