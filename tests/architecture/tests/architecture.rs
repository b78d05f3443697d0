//! Architecture tests; see ARCHITECTURE.md for what they hold and why.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    // Asked at run time: a target folder that several checkouts share may hold a build of another, removed one.
    Path::new(&std::env::var_os("CARGO_MANIFEST_DIR").unwrap())
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Normal (not dev) dependencies of each crate of the workspace, by name.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let normal = |dependency: &&Value| dependency["kind"].is_null();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let used = package["dependencies"]
                .as_array()
                .unwrap()
                .iter()
                .filter(normal)
                .map(name)
                .collect();
            (name(package), used)
        })
        .collect()
}

/// Every edge between Kubernest's own crates that is allowed. What isn't here fails.
const EDGES: &[(&str, &[&str])] = &[
    ("crds", &[]),
    ("bootstrap", &[]),
    ("pki", &[]),
    ("runtime", &[]),
    ("admission", &["crds"]),
    ("domain", &["crds"]),
    ("plan", &["crds"]),
    ("machine", &["crds", "domain", "pki", "runtime"]),
    ("tenant", &["bootstrap", "crds", "pki", "runtime"]),
    ("ingress", &["crds", "runtime"]),
    ("operator", &["crds", "machine", "runtime", "tenant"]),
    ("api", &["admission", "crds", "domain", "pki", "runtime"]),
    ("launcher", &["crds", "domain"]),
    ("guest", &["bootstrap"]),
    ("node", &["crds", "plan", "runtime"]),
    ("cni", &["plan"]),
    ("testbed", &[]),
    ("integration", &["admission", "api", "crds", "pki"]),
    ("e2e", &["crds", "integration", "testbed"]),
    ("bench", &["crds", "e2e"]),
    ("architecture", &[]),
];

#[test]
fn architecture_arrows_go_one_way() {
    let allowed: BTreeMap<_, BTreeSet<_>> = EDGES
        .iter()
        .map(|(from, to)| {
            (
                format!("kubernest-{from}"),
                to.iter().map(|to| format!("kubernest-{to}")).collect(),
            )
        })
        .collect();
    for (from, used) in dependencies() {
        let allowed = allowed
            .get(&from)
            .unwrap_or_else(|| panic!("{from} has no row in EDGES"));
        let own: BTreeSet<_> = used.into_iter().filter(|name| name.starts_with("kubernest-")).collect();
        let wrong: Vec<_> = own.difference(allowed).collect();
        assert!(
            wrong.is_empty(),
            "{from} must not use {wrong:?}: see the code map in ARCHITECTURE.md"
        );
    }
}

#[test]
fn architecture_only_the_launcher_links_libvirt() {
    let users = users_of(&["virt", "virt-sys"]);
    assert_eq!(users, BTreeSet::from(["kubernest-launcher".to_owned()]));
}

#[test]
fn architecture_only_network_speaks_netlink() {
    let users = users_of(&["rtnetlink", "netlink-sys", "netlink-packet-route", "nftables"]);
    let allowed = BTreeSet::from(["kubernest-node".to_owned(), "kubernest-plan".to_owned()]);
    assert!(users.is_subset(&allowed), "{users:?}");
}

#[test]
fn architecture_pure_crates_have_no_client_and_no_io() {
    let crates = dependencies();
    for name in ["admission", "domain", "plan", "bootstrap", "pki"] {
        let used = &crates[&format!("kubernest-{name}")];
        for io in ["tokio", "hyper", "kube", "reqwest", "axum", "rtnetlink"] {
            assert!(!used.contains(io), "kubernest-{name} must stay pure but uses {io}");
        }
    }
    let sources = rust_sources("crds/src")
        .into_iter()
        .filter(|path| !path.ends_with("bin/crdgen.rs"));
    for path in sources {
        let text = std::fs::read_to_string(&path).unwrap();
        for io in ["kube::Client", "kube::Api", "std::fs", "std::net::Tcp", "tokio::"] {
            assert!(!text.contains(io), "{} uses {io}", path.display());
        }
    }
}

/// Invariant 1: the tenant half sees VirtualMachines, never what stands behind them.
#[test]
fn architecture_tenant_controllers_never_see_pods() {
    for path in rust_sources("operator/controllers/tenant/src") {
        let text = std::fs::read_to_string(&path).unwrap();
        // What is said about them in comments does no harm.
        let text: String = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        for word in ["Api<Pod>", "::Pod,", "api::core::v1::Pod;", "virt-launcher", "libvirt"] {
            assert!(!text.contains(word), "{} mentions {word}", path.display());
        }
    }
    let rules = std::fs::read_to_string(root().join("operator/controllers/tenant/rbac.yaml")).unwrap();
    let rules: Vec<_> = rules
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    assert!(
        !rules.join("\n").contains("pods"),
        "the tenant half has no rights on pods"
    );
}

#[test]
fn architecture_every_invariant_names_a_test_that_exists() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section = text
        .split("## Invariants")
        .nth(1)
        .expect("a section Invariants")
        .split("\n## ")
        .next()
        .unwrap();
    let rows: Vec<_> = section
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains('`'))
        .collect();
    assert!(
        rows.len() >= 10,
        "all invariants stand in the table: found {}",
        rows.len()
    );
    let sources: String = ["crds", "operator", "vm-images", "network", "tests"]
        .iter()
        .flat_map(|folder| rust_sources(folder))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    for row in rows {
        let tests: Vec<_> = row.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "no test named: {row}");
        for test in tests {
            assert!(
                sources.contains(&format!("fn {test}(")),
                "there is no test {test}, named by: {row}"
            );
        }
    }
}

fn users_of(crates: &[&str]) -> BTreeSet<String> {
    let uses = |used: &BTreeSet<String>| crates.iter().any(|name| used.contains(*name));
    dependencies()
        .into_iter()
        .filter(|(_, used)| uses(used))
        .map(|(name, _)| name)
        .collect()
}

fn rust_sources(folder: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    found
}
