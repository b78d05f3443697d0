//! What `kubectl explain` says of Kubernest's kinds, from the definitions as a real API server publishes them.

#![allow(clippy::unwrap_used, reason = "a test; helpers count as production code for clippy")]

use std::time::Duration;

use kubernest_integration::{ControlPlane, install_crds, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn integration_kubectl_explains_fields_of_every_kind() {
    let plane = ControlPlane::start().await.unwrap();
    install_crds(&plane.client().await.unwrap()).await.unwrap();
    let explain = |path: &str| {
        let output = plane.kubectl(["explain", path]).unwrap();
        let said = [output.stdout, output.stderr].concat();
        // It breaks lines where it likes.
        let said = String::from_utf8_lossy(&said);
        said.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (path, expected) in [
        ("tc", "KIND: TenantCluster VERSION: v1alpha1"),
        ("tc.spec.nodePools.replicas", "FIELD: replicas <integer>"),
        ("vm.spec.runStrategy", "FIELD: runStrategy <string>"),
        (
            "vm.spec.template.spec.domain.devices.disks.serial",
            "a UUID is cut there",
        ),
        ("vmi.spec.networks.multus.networkName", "of type `kubernest-cni`"),
        ("vmi.spec.readinessProbe.httpGet.port", "FIELD: port <"),
        ("vmirs.spec.selector", "An empty one is refused"),
        ("vmipreset.spec.domain", "Nothing else is applied"),
    ] {
        // The API server publishes a definition some time after it serves it.
        let explained = wait_until(LIMIT, || async { explain(path).contains(expected) });
        assert!(explained.await, "{path}: {}", explain(path));
    }
}
