//! Annotations by which KubeVirt's users ask for what Kubernest does not do: refused like fields, as a machine that quietly
//! lacks what it was asked for is worse than none.

use serde_json::Value;

use super::unsupported;
use crate::decision::Report;

/// Behind gates that KubeVirt has off by default: the gate's name as KubeVirt's sentence says it.
const GATED: [(&str, &str); 2] = [
    ("kubevirt.io/ignitiondata", "ExperimentalIgnitionSupport"),
    ("hooks.kubevirt.io/hookSidecars", "sidecar"),
];
/// Never asked about by KubeVirt.
const UNKNOWN: [&str; 3] = [
    "kubevirt.io/keep-launcher-alive-after-failure",
    "kubevirt.io/libvirt-log-filters",
    "kubevirt.io/qgs-socket-path",
];

/// Checks the metadata at `f` of an instance, or of a template of instances.
pub fn check(report: &mut Report, f: &str, metadata: Option<&Value>) {
    let set = |name: &str| {
        let value = metadata.and_then(|metadata| metadata.get("annotations")?.get(name)?.as_str());
        value.is_some_and(|value| !value.is_empty())
    };
    for (name, gate) in GATED.into_iter().filter(|(name, _)| set(name)) {
        let message =
            format!("{gate} feature gate is not enabled in kubevirt-config, invalid entry {f}.annotations.{name}");
        report.invalid(format!("{f}.annotations"), message);
    }
    for name in UNKNOWN.into_iter().filter(|name| set(name)) {
        unsupported(report, format!("{f}.annotations[{name}]"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn admit_machine_refuses_annotations_that_would_do_nothing() {
        let metadata = json!({"annotations": {
            "hooks.kubevirt.io/hookSidecars": "[]",
            "kubevirt.io/libvirt-log-filters": "3:qemu",
            "kubevirt.io/ignitiondata": "",
            "example.com/theirs": "hooks",
        }});
        let mut report = Report::default();
        check(&mut report, "spec.template.metadata", Some(&metadata));
        check(&mut report, "metadata", None);
        let causes = report.decide(crate::decision::kubevirt_style).causes;
        let told: Vec<_> = causes.iter().map(|cause| (&*cause.field, &*cause.message)).collect();
        assert_eq!(
            told,
            [
                (
                    "spec.template.metadata.annotations",
                    "sidecar feature gate is not enabled in kubevirt-config, invalid entry \
                     spec.template.metadata.annotations.hooks.kubevirt.io/hookSidecars"
                ),
                (
                    "spec.template.metadata.annotations[kubevirt.io/libvirt-log-filters]",
                    "spec.template.metadata.annotations[kubevirt.io/libvirt-log-filters]: not supported"
                ),
            ]
        );
    }
}
