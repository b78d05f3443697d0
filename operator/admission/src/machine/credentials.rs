//! Ways to log in.

use kubernest_crds::kubevirt::v1::VirtualMachineInstanceSpec;

use crate::decision::Report;

/// Checks `accessCredentials`.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let volumes = || spec.volumes.iter().flatten();
    let no_cloud = volumes().any(|volume| volume.cloud_init_no_cloud.is_some());
    let config_drive = volumes().any(|volume| volume.cloud_init_config_drive.is_some());
    for (index, credential) in spec.access_credentials.iter().flatten().enumerate() {
        let at = format!("{f}.accessCredentials[{index}]");
        let Some(key) = &credential.ssh_public_key else {
            if !report.mentions_below(&at) {
                report.invalid(&at, format!("{at} must have exactly one access credential type set"));
            }
            continue;
        };
        let method = format!("{at}.sshPublicKey.propagationMethod");
        let methods = [
            ("noCloud", key.propagation_method.no_cloud.is_some(), no_cloud),
            (
                "configDrive",
                key.propagation_method.config_drive.is_some(),
                config_drive,
            ),
        ];
        for (name, set, there) in methods {
            if set && !there {
                let message =
                    format!("{at} requires a {name} volume to exist when the {name} propagationMethod is in use.");
                report.invalid(&method, message);
            }
        }
        if key.source.secret.is_none() {
            let message = format!("{at} must have exactly one source set");
            report.invalid(format!("{at}.sshPublicKey.source"), message);
        }
        if methods.iter().filter(|(_, set, _)| *set).count() != 1 && !report.mentions_below(&method) {
            report.invalid(&method, format!("{at} must have exactly one propagationMethod set"));
        }
    }
}
