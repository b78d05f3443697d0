//! Volumes, disks and filesystems of a VMI → block devices and shares.

use std::path::{Component, Path, PathBuf};

use base64::Engine;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use kubernest_crds::kubevirt::v1::{CloudInitSource, Disk as DiskSpec, Volume};

use super::{PlanError, bytes, invalid, label, missing, plain, unsupported};
use crate::machine::{Backend, Bus, CloudInit, CloudInitLayout, Device, Disk, Share, Source, Text};
use crate::{Launch, VolumeMode, fat, paths, xml};

/// Longest virtiofs tag (virtio 1.2, 5.11.4).
const MAX_TAG: usize = 36;
/// Bytes of a serial number that a guest sees of virtio-blk (virtio 1.2, 5.2.6.1: `VIRTIO_BLK_ID_BYTES`), ATA (ACS-3,
/// IDENTIFY DEVICE, words 10 to 19), and of SCSI without an identifier of its own, which is how qemu makes USB disks.
const SHORT_SERIAL: usize = 20;
/// The same of SCSI (qemu's hw/scsi/scsi-disk.c: `MAX_SERIAL_LEN`).
const LONG_SERIAL: usize = 36;
/// Sizes that a block may have.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
/// Part of a claim that a disk file may fill: file systems keep some for themselves (KubeVirt's 5.5 % overhead).
const CLAIM_SHARE_PER_MILLE: u64 = 945;

/// Base64 as Go reads it, and so KubeVirt.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
);

pub(super) fn disks(launch: &Launch, hostname: &str) -> Result<Vec<Disk>, PlanError> {
    let spec = &launch.vmi.spec;
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    let disks = spec.domain.devices.disks.as_deref().unwrap_or_default();
    let filesystems = spec.domain.devices.filesystems.as_deref().unwrap_or_default();
    for (i, volume) in volumes.iter().enumerate() {
        if volumes[..i].iter().any(|other| other.name == volume.name) {
            return Err(invalid(format!("spec.volumes[{i}].name"), "is used twice"));
        }
        if !disks.iter().any(|disk| disk.name == volume.name) && !filesystems.iter().any(|fs| fs.name == volume.name) {
            return Err(missing(format!("spec.volumes[{i}].name"), &volume.name));
        }
    }
    disks
        .iter()
        .enumerate()
        .map(|(i, disk)| {
            let field = format!("spec.domain.devices.disks[{i}]");
            if disks[..i].iter().any(|other| other.name == disk.name) {
                return Err(invalid(format!("{field}.name"), "is used twice"));
            }
            let (at, volume) = volumes
                .iter()
                .enumerate()
                .find(|(_, volume)| volume.name == disk.name)
                .ok_or_else(|| missing(format!("{field}.name"), &disk.name))?;
            disk_of(launch, hostname, &field, disk, &format!("spec.volumes[{at}]"), volume)
        })
        .collect()
}

fn disk_of(
    launch: &Launch,
    hostname: &str,
    field: &str,
    disk: &DiskSpec,
    volume_field: &str,
    volume: &Volume,
) -> Result<Disk, PlanError> {
    let name = label(&format!("{field}.name"), &disk.name)?;
    let (device, bus, read_only) = match (&disk.disk, &disk.cdrom) {
        (Some(_), Some(_)) => return Err(invalid(field, "can only have a single target type defined")),
        (disk, None) => {
            let bus = disk.as_ref().and_then(|disk| disk.bus.as_deref()).unwrap_or_default();
            let read_only = disk.as_ref().and_then(|disk| disk.read_only).unwrap_or(false);
            (Device::Disk, bus_of(&format!("{field}.disk.bus"), bus)?, read_only)
        }
        (None, Some(cdrom)) => {
            let bus = bus_of(&format!("{field}.cdrom.bus"), cdrom.bus.as_deref().unwrap_or_default())?;
            if bus == Bus::Virtio {
                return Err(unsupported(format!("{field}.cdrom.bus")));
            }
            if !matches!(cdrom.tray.as_deref(), None | Some("" | "closed")) {
                return Err(unsupported(format!("{field}.cdrom.tray")));
            }
            // Whatever it says: libvirt knows no other drive, so neither have KubeVirt's guests.
            (Device::Cdrom, bus, true)
        }
    };
    if disk.boot_order == Some(0) {
        return Err(invalid(format!("{field}.bootOrder"), "must be greater than 0"));
    }
    let serial = disk
        .serial
        .as_deref()
        .map(|serial| serial_of(&format!("{field}.serial"), bus, serial))
        .transpose()?;
    let (source, backend, source_read_only) = source_of(launch, hostname, volume_field, volume)?;
    let (cache, io) = cache_and_io(field, disk, &source)?;
    let read_only = match (read_only || source_read_only, device, bus, &source) {
        // libvirt knows no read-only SATA disk. What is made anew at each start may be written to.
        (true, Device::Disk, Bus::Sata, Source::Files { .. }) => false,
        (true, Device::Disk, Bus::Sata, _) => {
            return Err(invalid(
                field,
                "a SATA disk can't be read-only: choose the bus virtio, scsi or usb",
            ));
        }
        (read_only, ..) => read_only,
    };
    Ok(Disk {
        source,
        backend,
        device,
        bus,
        serial,
        boot_order: disk.boot_order,
        cache,
        io,
        // A full disk pauses the guest instead of corrupting it; the launcher reports the pause.
        error_policy: one_of(
            &format!("{field}.errorPolicy"),
            disk.error_policy.as_deref(),
            &["stop", "report", "ignore", "enospace"],
        )?
        .unwrap_or_else(|| "stop".to_owned()),
        block_size: block_size(field, disk)?,
        read_only,
        name,
    })
}

/// How qemu caches, and how it reads and writes. Native I/O is past all caches: libvirt takes it with no other cache mode.
fn cache_and_io(field: &str, disk: &DiskSpec, source: &Source) -> Result<(Option<String>, Option<String>), PlanError> {
    let caches = ["none", "writethrough", "writeback"];
    let cache = one_of(&format!("{field}.cache"), disk.cache.as_deref(), &caches)?;
    let io = one_of(&format!("{field}.io"), disk.io.as_deref(), &["native", "threads"])?;
    if io.as_deref() == Some("native") {
        return Ok(match cache.as_deref() {
            // KubeVirt's choice.
            None | Some("none") => (Some("none".to_owned()), io),
            // What qemu itself would fall back to.
            Some(_) => (cache, Some("threads".to_owned())),
        });
    }
    // What goes with the pod outlives no crash of the node: flushing it would only cost time.
    let goes_with_the_pod = matches!(
        source,
        Source::Overlay { .. } | Source::Ephemeral { .. } | Source::Empty { .. }
    );
    Ok((cache.or_else(|| goes_with_the_pod.then(|| "unsafe".to_owned())), io))
}

fn block_size(field: &str, disk: &DiskSpec) -> Result<Option<(u64, u64)>, PlanError> {
    let Some(custom) = disk.block_size.as_ref().and_then(|size| size.custom.as_ref()) else {
        return Ok(None);
    };
    let sound = |size: u64| BLOCK_BYTES.contains(&size) && size.is_power_of_two();
    if !sound(custom.logical) || !sound(custom.physical) || custom.logical > custom.physical {
        return Err(invalid(
            format!("{field}.blockSize.custom"),
            "must be powers of two from 512 to 2097152, logical not above physical",
        ));
    }
    Ok(Some((custom.logical, custom.physical)))
}

/// Where the content comes from, what libvirt opens, and whether the source itself forbids writing.
fn source_of(
    launch: &Launch,
    hostname: &str,
    field: &str,
    volume: &Volume,
) -> Result<(Source, Backend, bool), PlanError> {
    let name = label(&format!("{field}.name"), &volume.name)?;
    let made = |extension: &str| PathBuf::from(format!("{}/{name}.{extension}", paths::DISKS));
    let mut found = Vec::new();
    if let Some(container) = &volume.container_disk {
        let file = container
            .path
            .as_deref()
            .map(|p| image_path(&format!("{field}.containerDisk.path"), p))
            .transpose()?;
        let image = Path::new(paths::CONTAINER_DISKS).join(&name);
        found.push((Source::Overlay { image, file }, Backend::Qcow2(made("qcow2")), false));
    }
    if let Some(claim) = &volume.persistent_volume_claim {
        let claimed = launch
            .volumes
            .get(&volume.name)
            .ok_or_else(|| missing("volumes", &volume.name))?;
        let read_only = claim.read_only.unwrap_or(false);
        found.push(match claimed.mode {
            VolumeMode::Block => (
                Source::Device,
                Backend::Block(Path::new(paths::BLOCK_DEVICES).join(&name)),
                read_only,
            ),
            VolumeMode::Filesystem => {
                let size = claimed.capacity / 1000 * CLAIM_SHARE_PER_MILLE / (1 << 20) * (1 << 20);
                if size == 0 {
                    return Err(invalid(format!("volumes.{name}.capacity"), "must be at least 2Mi"));
                }
                let path = Path::new(paths::CLAIMS).join(&name).join(paths::CLAIM_DISK);
                (Source::Keep { size }, Backend::Raw(path), read_only)
            }
        });
    }
    if let Some(ephemeral) = &volume.ephemeral {
        if ephemeral.persistent_volume_claim.is_none() {
            return Err(missing(format!("{field}.ephemeral"), "persistentVolumeClaim"));
        }
        let claimed = launch
            .volumes
            .get(&volume.name)
            .ok_or_else(|| missing("volumes", &volume.name))?;
        let base = match claimed.mode {
            VolumeMode::Block => Path::new(paths::BLOCK_DEVICES).join(&name),
            VolumeMode::Filesystem => Path::new(paths::CLAIMS).join(&name).join(paths::CLAIM_DISK),
        };
        found.push((Source::Ephemeral { base }, Backend::Qcow2(made("qcow2")), false));
    }
    if let Some(empty) = &volume.empty_disk {
        let size = bytes(&format!("{field}.emptyDisk.capacity"), &empty.capacity)?.next_multiple_of(512);
        if size == 0 {
            return Err(invalid(format!("{field}.emptyDisk.capacity"), "must be greater than 0"));
        }
        found.push((Source::Empty { size }, Backend::Raw(made("img")), false));
    }
    let no_cloud = volume.cloud_init_no_cloud.as_ref();
    let config_drive = volume.cloud_init_config_drive.as_ref();
    for (kind, layout, cloud_init) in [
        ("cloudInitNoCloud", CloudInitLayout::NoCloud, no_cloud),
        ("cloudInitConfigDrive", CloudInitLayout::ConfigDrive, config_drive),
    ] {
        let Some(cloud_init) = cloud_init else { continue };
        let field = format!("{field}.{kind}");
        let data = cloud_init_of(launch, hostname, &field, &name, layout, cloud_init)?;
        found.push((Source::CloudInit(data), Backend::Raw(made("img")), false));
    }
    let secret = volume.secret.as_ref();
    let config_map = volume.config_map.as_ref();
    let files = [
        secret.map(|secret| ("secret", secret.volume_label.as_deref())),
        config_map.map(|config_map| ("configMap", config_map.volume_label.as_deref())),
        volume.service_account.as_ref().map(|_| ("serviceAccount", None)),
    ];
    for (kind, volume_label) in files.into_iter().flatten() {
        let volume_label = volume_label.filter(|label| !label.is_empty()).unwrap_or("cfgdata");
        if fat::label(volume_label).is_none() {
            return Err(invalid(
                format!("{field}.{kind}.volumeLabel"),
                "must be 1 to 11 ASCII characters",
            ));
        }
        let directory = Path::new(paths::VOLUMES).join(&name);
        found.push((
            Source::Files {
                directory,
                label: volume_label.to_owned(),
            },
            Backend::Raw(made("img")),
            true,
        ));
    }
    match (found.pop(), found.is_empty()) {
        (Some(source), true) => Ok(source),
        _ => Err(invalid(field, "must have exactly one source type set")),
    }
}

fn cloud_init_of(
    launch: &Launch,
    hostname: &str,
    field: &str,
    volume: &str,
    layout: CloudInitLayout,
    source: &CloudInitSource,
) -> Result<CloudInit, PlanError> {
    let mounted = |which: &str, keys: [&str; 2]| {
        let directory = Path::new(paths::CLOUD_INIT).join(volume).join(which);
        Text::Mounted(keys.map(|key| directory.join(key)).to_vec())
    };
    let user = text(
        &format!("{field}.userData"),
        source.user_data.as_deref(),
        source.user_data_base64.as_deref(),
        source
            .secret_ref
            .is_some()
            .then(|| mounted("user", ["userdata", "userData"])),
    )?;
    let network_data = text(
        &format!("{field}.networkData"),
        source.network_data.as_deref(),
        source.network_data_base64.as_deref(),
        source
            .network_data_secret_ref
            .is_some()
            .then(|| mounted("network", ["networkdata", "networkData"])),
    )?;
    let metadata = &launch.vmi.metadata;
    let (name, namespace) = (
        metadata.name.as_deref().unwrap_or_default(),
        metadata.namespace.as_deref().unwrap_or_default(),
    );
    // The instance is the machine, not its run: a restart on the same disk is no first boot.
    let id = format!("{name}.{namespace}");
    let meta_data = match layout {
        CloudInitLayout::NoCloud => [("instance-id", id.as_str()), ("local-hostname", hostname)].to_vec(),
        CloudInitLayout::ConfigDrive => [
            ("instance_id", id.as_str()),
            ("uuid", &id),
            ("hostname", hostname),
            ("local_hostname", hostname),
        ]
        .to_vec(),
    };
    Ok(CloudInit {
        layout,
        meta_data: meta_data
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.into()))
            .collect(),
        ssh_keys: ssh_keys(launch, layout)?,
        user_data: user.unwrap_or_else(|| Text::Inline(Vec::new())),
        network_data,
    })
}

/// Where the keys for a guest that reads this form of cloud-init are mounted.
fn ssh_keys(launch: &Launch, layout: CloudInitLayout) -> Result<Vec<PathBuf>, PlanError> {
    let mut folders = Vec::new();
    for (index, credential) in launch.vmi.spec.access_credentials.iter().flatten().enumerate() {
        let field = format!("spec.accessCredentials[{index}]");
        let key = credential
            .ssh_public_key
            .as_ref()
            .ok_or_else(|| unsupported(format!("{field} without sshPublicKey")))?;
        if key.source.secret.is_none() {
            return Err(missing(format!("{field}.sshPublicKey.source"), "secret"));
        }
        let method = &key.propagation_method;
        let wanted = match (&method.no_cloud, &method.config_drive) {
            (Some(_), None) => CloudInitLayout::NoCloud,
            (None, Some(_)) => CloudInitLayout::ConfigDrive,
            _ => {
                let field = format!("{field}.sshPublicKey.propagationMethod");
                return Err(invalid(field, "must have exactly one method set"));
            }
        };
        if wanted == layout {
            folders.push(Path::new(paths::ACCESS_CREDENTIALS).join(index.to_string()));
        }
    }
    Ok(folders)
}

/// At most one of the three forms of a text.
fn text(
    field: &str,
    inline: Option<&str>,
    base64: Option<&str>,
    mounted: Option<Text>,
) -> Result<Option<Text>, PlanError> {
    let mut forms = Vec::new();
    if let Some(inline) = inline {
        forms.push(Text::Inline(inline.as_bytes().to_vec()));
    }
    if let Some(base64) = base64 {
        // base64(1) breaks lines.
        let digits = base64.replace(['\r', '\n'], "");
        let text = BASE64.decode(digits);
        let text = text.map_err(|_| invalid(format!("{field}Base64"), "must be base64"))?;
        forms.push(Text::Inline(text));
    }
    forms.extend(mounted);
    let last = forms.pop();
    if forms.is_empty() {
        Ok(last)
    } else {
        Err(invalid(field, "must have only one source"))
    }
}

pub(super) fn shares(launch: &Launch) -> Result<Vec<Share>, PlanError> {
    let spec = &launch.vmi.spec;
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    let filesystems = spec.domain.devices.filesystems.as_deref().unwrap_or_default();
    filesystems
        .iter()
        .enumerate()
        .map(|(i, filesystem)| {
            let field = format!("spec.domain.devices.filesystems[{i}]");
            let tag = label(&format!("{field}.name"), &filesystem.name)?;
            if filesystems[..i].iter().any(|other| other.name == filesystem.name) {
                return Err(invalid(format!("{field}.name"), "is used twice"));
            }
            if filesystem.virtiofs.is_none() {
                return Err(invalid(format!("{field}.virtiofs"), "must be set"));
            }
            if tag.len() > MAX_TAG {
                return Err(invalid(
                    format!("{field}.name"),
                    "must be at most 36 characters: it is the virtiofs tag",
                ));
            }
            let volume = volumes
                .iter()
                .find(|volume| volume.name == filesystem.name)
                .ok_or_else(|| missing(format!("{field}.name"), &filesystem.name))?;
            if volume.secret.is_none() && volume.config_map.is_none() && volume.service_account.is_none() {
                return Err(unsupported(format!(
                    "{field}.virtiofs of a volume that is neither secret, configMap nor serviceAccount"
                )));
            }
            let directory = Path::new(paths::VOLUMES).join(&tag);
            Ok(Share {
                socket: xml::share_socket(&tag),
                directory,
                tag,
            })
        })
        .collect()
}

fn bus_of(field: &str, bus: &str) -> Result<Bus, PlanError> {
    match bus {
        "virtio" => Ok(Bus::Virtio),
        // KubeVirt's default.
        "" | "sata" => Ok(Bus::Sata),
        "scsi" => Ok(Bus::Scsi),
        "usb" => Ok(Bus::Usb),
        _ => Err(unsupported(field)),
    }
}

/// What a guest sees of a serial number on the bus. Longer ones qemu cuts or refuses, by its version.
fn serial_of(field: &str, bus: Bus, serial: &str) -> Result<String, PlanError> {
    let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b' ' | b'+');
    if !serial.bytes().all(safe) {
        return Err(invalid(field, "must be letters, digits, '-', '_', '.', '+' and blanks"));
    }
    let visible = match bus {
        Bus::Virtio | Bus::Sata | Bus::Usb => SHORT_SERIAL,
        Bus::Scsi => LONG_SERIAL,
    };
    Ok(serial.chars().take(visible).collect())
}

pub(super) fn one_of(field: &str, value: Option<&str>, known: &[&str]) -> Result<Option<String>, PlanError> {
    match value {
        None | Some("") => Ok(None),
        Some(value) if known.contains(&value) => Ok(Some(value.to_owned())),
        Some(_) => Err(unsupported(field)),
    }
}

/// An absolute path inside an image, made relative; nothing that climbs.
pub(super) fn image_path(field: &str, path: &str) -> Result<PathBuf, PlanError> {
    let path = plain(field, path)?;
    let Ok(relative) = Path::new(&path).strip_prefix("/") else {
        return Err(invalid(field, "must be an absolute path"));
    };
    if relative.as_os_str().is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(invalid(field, "must name a file inside the image"));
    }
    Ok(relative.to_owned())
}
