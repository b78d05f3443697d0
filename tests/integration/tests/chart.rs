//! The Helm chart, rendered by the real helm without a cluster: what it takes, and how it names what is wrong.

#![allow(clippy::unwrap_used, reason = "a test; helpers count as production code for clippy")]

use std::process::{Command, Output};

use kubernest_integration::Binaries;
use rstest::rstest;

const IMAGES: &str = r#"nodeImages={"v1.35.4":{"image":"registry.example/node@sha256:0"}}"#;

fn template(arguments: &[&str]) -> Output {
    Command::new(Binaries::locate().helm().unwrap())
        .args(["template", "kubernest"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/kubernest"))
        .args(["--kube-version", "1.35.4"])
        .args(arguments)
        .output()
        .unwrap()
}

#[rstest]
#[case::base_domain("baseDomain=clusters.example.org", "clusters.example.org")]
#[case::spread("operator.replicas=3", "matchLabelKeys: [pod-template-hash]")]
#[case::kubelet("node.kubeletDir=/var/lib/k0s/kubelet", "path: /var/lib/k0s/kubelet/pod-resources")]
#[case::node_port("ingress.service.type=NodePort,ingress.service.nodePort=30643", "nodePort: 30643")]
#[case::resources("operator.resources.limits.memory=1Gi", "memory: 1Gi")]
#[case::pull_secrets("imagePullSecrets[0].name=registry", "- name: registry")]
fn integration_chart_takes_values(#[case] values: &str, #[case] rendered: &str) {
    let arguments = ["--namespace", "kubernest-system", "--set-json", IMAGES, "--set", values];
    let output = template(&arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains(rendered), "{rendered}");
}

#[rstest]
#[case::unknown_value("node.cniDir=/x", "at '/node': additional properties 'cniDir' not allowed")]
#[case::unknown_part("webhook.port=1", "additional properties 'webhook' not allowed")]
#[case::unknown_choice("emulation=maybe", "at '/emulation': value must be one of 'auto', 'always', 'never'")]
#[case::no_replicas("operator.replicas=0", "at '/operator/replicas': minimum: got 0, want 1")]
#[case::no_port("ingress.port=70000", "at '/ingress/port': maximum: got 70,000, want 65,535")]
#[case::no_addresses("nodeCIDRPool=999.1/77", "at '/nodeCIDRPool': '999.1/77' does not match pattern")]
#[case::small_pool(
    "nodeCIDRPool=10.0.0.0/25",
    "at '/nodeCIDRPool': '10.0.0.0/25' does not match pattern"
)]
#[case::no_version("nodeImages.stable.image=x", "nodeImages.stable: name a Kubernetes version")]
#[case::no_image(r"nodeImages.v1\.34\.4.kernelArgs=quiet", "missing property 'image'")]
fn integration_chart_names_the_wrong_value(#[case] value: &str, #[case] message: &str) {
    let arguments = ["--namespace", "kubernest-system", "--set-json", IMAGES, "--set", value];
    refused(&arguments, message);
}

#[rstest]
#[case::namespace(&["--set-json", IMAGES], "install Kubernest into the namespace kubernest-system")]
#[case::node_images(&["--namespace", "kubernest-system"], "nodeImages is empty: name at least one Kubernetes version")]
fn integration_chart_says_what_is_missing(#[case] arguments: &[&str], #[case] message: &str) {
    refused(arguments, message);
}

fn refused(arguments: &[&str], message: &str) {
    let output = template(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(message), "{said}");
}
