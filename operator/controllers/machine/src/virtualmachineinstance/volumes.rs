//! The volumes of a launcher pod and where they are mounted; the other side is `kubernest_domain::paths`.
//!
//! Whatever the guest may read is mounted read-only but claims; whatever is made at start lies on one emptyDir.
//! Secrets and ConfigMaps are mounted by the kubelet: neither this controller nor the launcher reads them by API.

use k8s_openapi::api::core::v1::{
    ConfigMapProjection, ConfigMapVolumeSource, DownwardAPIProjection, DownwardAPIVolumeFile, EmptyDirVolumeSource,
    ImageVolumeSource, KeyToPath, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, ProjectedVolumeSource,
    SecretVolumeSource, ServiceAccountTokenProjection, Volume, VolumeDevice, VolumeMount, VolumeProjection,
};
use kubernest_crds::kubevirt::v1 as kubevirt;
use kubernest_domain::{VolumeMode, paths};

use super::validate::Machine;

/// The pod's own volumes; a dot cannot stand in a volume's name, so a dash and the prefix keep them apart.
const RUN_VOLUME: &str = "kubernest-run";
const KERNEL_VOLUME: &str = "kubernest-kernel-boot";
const CONTROL_VOLUME: &str = "kubernest-control";
/// Owner and group may read: the launcher is in the group (fsGroup).
const SECRET_MODE: i32 = 0o440;
/// Lifetime of a service account's token in seconds: what Kubernetes asks for when it mounts one itself (its admission plugin
/// ServiceAccount). API servers let such a token live on for a year with its pod, so that one on a disk, which nobody renews,
/// is of use to a guest.
const TOKEN_SECONDS: i64 = 3607;
/// ConfigMap with the API server's CA certificate, which Kubernetes keeps in each namespace.
const ROOT_CA: &str = "kube-root-ca.crt";

/// A pod's volumes and how its container sees them.
#[derive(Debug, Default)]
pub struct Mounted {
    /// `spec.volumes`
    pub volumes: Vec<Volume>,
    /// `volumeMounts`
    pub mounts: Vec<VolumeMount>,
    /// `volumeDevices`
    pub devices: Vec<VolumeDevice>,
}

impl Mounted {
    fn add(&mut self, volume: Volume, path: String, read_only: bool) {
        self.mounts.push(VolumeMount {
            name: volume.name.clone(),
            mount_path: path,
            read_only: read_only.then_some(true),
            ..VolumeMount::default()
        });
        self.volumes.push(volume);
    }

    fn add_image(&mut self, name: &str, image: &str, policy: Option<String>, path: String) {
        let image = ImageVolumeSource {
            reference: Some(image.to_owned()),
            pull_policy: policy,
        };
        self.add(
            Volume {
                name: name.to_owned(),
                image: Some(image),
                ..Volume::default()
            },
            path,
            true,
        );
    }

    fn add_secret(&mut self, name: String, secret: Option<String>, optional: Option<bool>, path: String) {
        let secret = SecretVolumeSource {
            secret_name: secret,
            optional,
            default_mode: Some(SECRET_MODE),
            items: None,
        };
        self.add(
            Volume {
                name,
                secret: Some(secret),
                ..Volume::default()
            },
            path,
            true,
        );
    }
}

/// All volumes of the machine's launcher pod; `pair` is the Secret of its control port.
pub fn mounted(machine: &Machine, pair: &str) -> Mounted {
    let mut mounted = Mounted::default();
    let run = EmptyDirVolumeSource::default();
    let run = Volume {
        name: RUN_VOLUME.to_owned(),
        empty_dir: Some(run),
        ..Volume::default()
    };
    mounted.add(run, paths::RUN.to_owned(), false);
    let pair = Some(pair.to_owned());
    mounted.add_secret(CONTROL_VOLUME.to_owned(), pair, None, paths::CONTROL_TLS.to_owned());
    let spec = &machine.instance.spec;
    let boot = spec
        .domain
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.kernel_boot.as_ref()?.container.as_ref());
    if let Some(boot) = boot {
        let policy = boot.image_pull_policy.clone();
        mounted.add_image(KERNEL_VOLUME, &boot.image, policy, paths::KERNEL_BOOT.to_owned());
    }
    for (index, volume) in spec.volumes.iter().flatten().enumerate() {
        add(&mut mounted, machine, index, volume);
    }
    for (index, credential) in spec.access_credentials.iter().flatten().enumerate() {
        let key = credential.ssh_public_key.as_ref();
        if let Some(secret) = key.and_then(|key| key.source.secret.as_ref()) {
            let path = format!("{}/{index}", paths::ACCESS_CREDENTIALS);
            let name = format!("kubernest-access-credential-{index}");
            mounted.add_secret(name, Some(secret.secret_name.clone()), None, path);
        }
    }
    mounted
}

fn add(mounted: &mut Mounted, machine: &Machine, index: usize, volume: &kubevirt::Volume) {
    let name = volume.name.as_str();
    if let Some(disk) = &volume.container_disk {
        let path = format!("{}/{name}", paths::CONTAINER_DISKS);
        mounted.add_image(name, &disk.image, disk.image_pull_policy.clone(), path);
    }
    if let Some(source) = volume.claim() {
        // An ephemeral volume never writes to its claim.
        let read_only = if volume.ephemeral.is_some() {
            Some(true)
        } else {
            source.read_only
        };
        let claim = PersistentVolumeClaimVolumeSource {
            claim_name: source.claim_name.clone(),
            read_only,
        };
        let claim = Volume {
            name: name.to_owned(),
            persistent_volume_claim: Some(claim),
            ..Volume::default()
        };
        if machine
            .claims
            .get(name)
            .is_some_and(|claim| claim.mode == VolumeMode::Block)
        {
            let path = format!("{}/{name}", paths::BLOCK_DEVICES);
            mounted.devices.push(VolumeDevice {
                name: name.to_owned(),
                device_path: path,
            });
            mounted.volumes.push(claim);
        } else {
            mounted.add(claim, format!("{}/{name}", paths::CLAIMS), read_only == Some(true));
        }
    }
    if let Some(secret) = &volume.secret {
        let path = format!("{}/{name}", paths::VOLUMES);
        mounted.add_secret(name.to_owned(), secret.secret_name.clone(), secret.optional, path);
    }
    if let Some(map) = &volume.config_map {
        let source = ConfigMapVolumeSource {
            name: map.name.clone().unwrap_or_default(),
            optional: map.optional,
            ..ConfigMapVolumeSource::default()
        };
        let volume = Volume {
            name: name.to_owned(),
            config_map: Some(source),
            ..Volume::default()
        };
        mounted.add(volume, format!("{}/{name}", paths::VOLUMES), true);
    }
    if volume.service_account.is_some() {
        let volume = Volume {
            name: name.to_owned(),
            projected: Some(service_account()),
            ..Volume::default()
        };
        mounted.add(volume, format!("{}/{name}", paths::VOLUMES), true);
    }
    if let Some(cloud_init) = volume.cloud_init() {
        let data = [
            ("user", &cloud_init.secret_ref),
            ("network", &cloud_init.network_data_secret_ref),
        ];
        for (part, secret) in data {
            let Some(secret) = secret else { continue };
            let path = format!("{}/{name}/{part}", paths::CLOUD_INIT);
            mounted.add_secret(
                format!("kubernest-cloud-init-{index}-{part}"),
                Some(secret.name.clone()),
                None,
                path,
            );
        }
    }
}

/// The three files that Kubernetes mounts into pods, of the pod's own account.
fn service_account() -> ProjectedVolumeSource {
    let token = VolumeProjection {
        service_account_token: Some(ServiceAccountTokenProjection {
            audience: None,
            expiration_seconds: Some(TOKEN_SECONDS),
            path: "token".to_owned(),
        }),
        ..VolumeProjection::default()
    };
    let ca = VolumeProjection {
        config_map: Some(ConfigMapProjection {
            name: ROOT_CA.to_owned(),
            items: Some(vec![KeyToPath {
                key: "ca.crt".to_owned(),
                path: "ca.crt".to_owned(),
                mode: None,
            }]),
            optional: None,
        }),
        ..VolumeProjection::default()
    };
    let namespace = DownwardAPIVolumeFile {
        field_ref: Some(ObjectFieldSelector {
            field_path: "metadata.namespace".to_owned(),
            api_version: None,
        }),
        path: "namespace".to_owned(),
        ..DownwardAPIVolumeFile::default()
    };
    let namespace = VolumeProjection {
        downward_api: Some(DownwardAPIProjection {
            items: Some(vec![namespace]),
        }),
        ..VolumeProjection::default()
    };
    ProjectedVolumeSource {
        default_mode: Some(SECRET_MODE),
        sources: Some(vec![token, ca, namespace]),
    }
}
