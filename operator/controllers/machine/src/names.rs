//! Names that the machine controllers give: field manager, annotations of theirs, launcher pods.
//!
//! Labels and finalizers that others know as well stand in `kubernest-crds`.

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Field manager, event reporter and metrics prefix of the controllers.
pub const MANAGER: &str = "kubernest-machine";
/// Annotation of an instance: generation of the VirtualMachine that it was made from (KubeVirt's name).
pub const ANNOTATION_VM_GENERATION: &str = "kubevirt.io/vm-generation";
/// Annotation of an instance: hash of the template spec that it was made from; tells whether a restart would change it.
pub const ANNOTATION_TEMPLATE_HASH: &str = "kubernest.io/template-hash";

/// Longest name of a launcher pod: it becomes the pod's host name, a DNS label (RFC 1123).
const POD_NAME_MAX: usize = 63;
const POD_NAME_PREFIX: &str = "virt-launcher-";
/// Longest value of a label.
pub const LABEL_MAX: usize = 63;

/// The launcher pod of an instance: one name for one uid, so that the API server refuses a second pod for it.
pub fn launcher_pod(instance: &str, uid: &str) -> String {
    let suffix = &hex(&Sha256::digest(uid))[..5];
    let room = POD_NAME_MAX - POD_NAME_PREFIX.len() - suffix.len() - 1;
    let part: String = instance
        .chars()
        .map(|c| if c == '.' { '-' } else { c })
        .take(room)
        .collect();
    format!("{POD_NAME_PREFIX}{}-{suffix}", part.trim_end_matches('-'))
}

/// What stands for an instance's name in labels, whose values have at most 63 characters: virtctl computes the same
/// (KubeVirt's pkg/apimachinery/labels.go).
pub fn instance_id(instance: &str) -> String {
    if instance.len() <= LABEL_MAX {
        return instance.to_owned();
    }
    let hash = &hex(&Sha1::digest(instance))[..8];
    let part = &instance[..instance.floor_char_boundary(LABEL_MAX - hash.len() - 1)];
    format!("{part}-{hash}")
}

/// The Secret with the key pair of that pod's control port; `attempt` is random, so nobody can make it first.
pub fn control_secret(instance: &str, uid: &str, attempt: [u8; 4]) -> String {
    format!("{}-control-{}", launcher_pod(instance, uid), hex(&attempt))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A locally administered unicast MAC address, the same for the same instance and interface.
pub fn mac(uid: &str, interface: &str) -> String {
    let digest = Sha256::digest(format!("{uid}/{interface}"));
    let tail: Vec<String> = digest.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    format!("02:{}", tail.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_pod_name_is_a_dns_label_and_differs_by_uid() {
        let long = "a.".repeat(60);
        let name = launcher_pod(&long, "u1");
        assert!(
            name.len() <= 63 && !name.contains('.') && !name.contains("--"),
            "{name}"
        );
        assert!(launcher_pod("vm", "u1").starts_with("virt-launcher-vm-"));
        assert_ne!(launcher_pod("vm", "u1"), launcher_pod("vm", "u2"));
        assert_eq!(launcher_pod("vm", "u1").len(), "virt-launcher-vm-".len() + 5);
    }

    #[test]
    fn build_instance_id_is_what_virtctl_selects() {
        assert_eq!(instance_id("vm.a"), "vm.a");
        assert_eq!(instance_id(&"a".repeat(63)), "a".repeat(63));
        // printf %064d | tr 0 a | sha1sum
        let expected = format!("{}-0098ba82", "a".repeat(54));
        assert_eq!(instance_id(&"a".repeat(64)), expected);
    }

    #[test]
    fn build_mac_is_local_unicast_and_stable() {
        assert_eq!(mac("u", "default"), mac("u", "default"));
        assert_ne!(mac("u", "default"), mac("u", "tenant"));
        assert_eq!(mac("u", "default").len(), 17);
    }
}
