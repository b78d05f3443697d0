//! Rules of KubeVirt's kinds, in its words (fields and sentences as KubeVirt 1.9 answers them), one file a concern. What of KubeVirt's API is not supported is refused by path: `F: not supported`.
//!
//! Only what the types of `kubernest-crds` know is checked further.

mod annotations;
mod cloudinit;
mod complete;
mod credentials;
mod defaults;
mod dhcp;
mod disks;
mod guard;
mod hardware;
mod interfaces;
mod mutate;
mod presets;
mod replicas;
mod resources;
mod settings;
mod volumes;

pub use complete::complete;
pub use defaults::{BRIDGE, fill as fill_defaults};
pub use guard::guard;
use kubernest_crds::kubevirt::v1::{VirtualMachineInstanceSpec, VirtualMachineSpec, run_strategy};
pub use mutate::{Mutation, Preset, mutate};
pub use presets::{MAX_NAME as MAX_PRESET_NAME, decide as decide_preset};
pub use replicas::decide as decide_replica_set;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    Decision, Installation, Review,
    decision::{Report, kubevirt_style, reasons},
    parse::parse,
    path,
};

/// Decides upon a VirtualMachine.
pub fn decide_virtual_machine(_: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    let filled = filled(review.object, "/spec/template/spec", defaults::fill_template);
    if let Some(spec) = read::<VirtualMachineSpec>(&mut report, &filled) {
        strategy(&mut report, &spec);
        instance(&mut report, "spec.template.spec", &spec.template.spec);
    }
    guard::template_brings_none(&mut report, review);
    guard::leaves_a_clusters_own(&mut report, review);
    template_annotations(&mut report, review.object);
    report.decide(kubevirt_style)
}

fn template_annotations(report: &mut Report, object: &Value) {
    annotations::check(
        report,
        "spec.template.metadata",
        object.pointer("/spec/template/metadata"),
    );
}

/// Decides upon a VirtualMachineInstance.
pub fn decide_virtual_machine_instance(_: &Installation, review: Review<'_>) -> Decision {
    let mut report = Report::default();
    if review.old.is_some() {
        if !review.own_request {
            report.invalid("", "update of VMI object is restricted");
        }
        return report.decide(kubevirt_style);
    }
    let filled = filled(review.object, "/spec", defaults::fill_checked);
    if let Some(spec) = read::<VirtualMachineInstanceSpec>(&mut report, &filled) {
        instance(&mut report, "spec", &spec);
    }
    annotations::check(&mut report, "metadata", review.object.get("metadata"));
    if !review.own_request {
        guard::brings_none(&mut report, review.object);
    }
    report.decide(kubevirt_style)
}

/// The object with its gaps filled: KubeVirt checks what will be, not what was sent.
fn filled(object: &Value, path: &str, fill: fn(&mut Value)) -> Value {
    let mut object = object.clone();
    if let Some(spec) = object.pointer_mut(path) {
        fill(spec);
    }
    object
}

/// Reads `spec`, reporting unknown fields and values that cannot be read.
fn read<Spec: DeserializeOwned>(report: &mut Report, object: &Value) -> Option<Spec> {
    let parsed = parse::<Spec>(object, "spec");
    for path in parsed.unknown {
        let message = format!("{path}: not supported");
        report.not_supported(path, message);
    }
    match parsed.value {
        Ok(spec) => Some(spec),
        Err((path, message)) => {
            let missing = message
                .strip_prefix("missing field `")
                .and_then(|rest| rest.strip_suffix('`'));
            report.add(
                "",
                "",
                match missing {
                    Some(name) => format!("{} in body is required", path::field(&path, name)),
                    None => format!("{path} in body: {message}"),
                },
            );
            None
        }
    }
}

fn strategy(report: &mut Report, spec: &VirtualMachineSpec) {
    use run_strategy::{ALWAYS, HALTED, MANUAL, ONCE, RERUN_ON_FAILURE};
    match (spec.running, spec.run_strategy.as_deref()) {
        (Some(_), Some(_)) => report.invalid(
            "spec.running",
            "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use RunStrategy instead",
        ),
        (None, None) => report.invalid("spec.running", "RunStrategy must be specified"),
        (Some(_), None) | (None, Some(ALWAYS | HALTED | MANUAL | RERUN_ON_FAILURE | ONCE)) => {}
        (None, Some(other)) => report.invalid("spec.runStrategy", format!("Invalid RunStrategy ({other})")),
    }
}

/// Checks the spec of an instance; `f` is the path that it stands at.
fn instance(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    resources::check(report, f, spec);
    disks::check(report, f, spec);
    volumes::check(report, f, spec);
    hardware::check(report, f, spec);
    credentials::check(report, f, spec);
    interfaces::check(report, f, spec);
    settings::check(report, f, spec);
}

/// Most bytes of a serial number.
const SERIAL_BYTES: usize = 256;

/// A serial number of a disk; `subject` is what KubeVirt's sentence begins with.
fn check_serial(report: &mut Report, field: &str, subject: &str, serial: &str) {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_.+-".contains(&b);
    if !serial.bytes().all(allowed) {
        let message = format!("{subject} must be made up of the following characters [A-Za-z0-9_.+-], if specified");
        report.invalid(field, message);
    }
    if serial.len() > SERIAL_BYTES {
        let message = format!("{subject} must be less than or equal to {SERIAL_BYTES} in length, if specified");
        report.invalid(field, message);
    }
}

/// Reports `field: not supported`.
fn unsupported(report: &mut Report, field: String) {
    let message = format!("{field}: not supported");
    report.add(reasons::NOT_SUPPORTED, field, message);
}
