//! The webhooks in front of a real API server: every example of `crds/examples` gets the answer that stands in it.
//!
//! An invalid example begins with one or more lines `# error: <field>: <part of the message>`. It has one manifest,
//! which is refused when created, or two, of which the second is refused as an update of the first.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test; helpers count as production code for clippy"
)]

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::{
    admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration},
    core::v1::{Namespace, Secret},
    rbac::v1::{ClusterRole, RoleBinding},
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
    core::Status,
};
use kubernest_integration::{Binaries, ControlPlane, Process, free_port, install_crds, wait_until};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const NODE_IMAGES: &str = r#"{"v1.34.4": {"image": "localhost/kubernest-node:v1.34.4"}, "v1.35.4": {"image": "localhost/kubernest-node:v1.35.4"}}"#;

/// An API server that asks one replica of kubernest-api.
struct Setup {
    api: Process,
    port: u16,
    client: Client,
    plane: ControlPlane,
}

impl Setup {
    async fn start() -> Self {
        let plane = ControlPlane::start().await.unwrap();
        let client = plane.client().await.unwrap();
        install_crds(&client).await.unwrap();
        create(&client, &Namespace::default(), "kubernest-system").await;
        create(&client, &Namespace::default(), "org-acme").await;
        let (api, port) = start_api(&plane, "api.log");
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
        webhooks
            .create(&PostParams::default(), &configuration(port))
            .await
            .unwrap();
        let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
        mutating.create(&PostParams::default(), &mutation(port)).await.unwrap();
        lead_conversion(&client, port).await;
        let setup = Self {
            api,
            port,
            client,
            plane,
        };
        let trusted = wait_until(LIMIT, || async {
            setup.bundles().await.iter().all(|bundle| !bundle.is_empty())
        })
        .await;
        assert!(
            trusted,
            "no caBundle was set; kubernest-api said\n{}",
            setup.api.tail(20)
        );
        // The API server learns of the configuration by watching it.
        let probe = manifest(
            "kind: TenantCluster\napiVersion: kubernest.io/v1alpha1\nmetadata: {name: probe}\nspec: {version: v0.0.0}",
        );
        let asked = wait_until(LIMIT, || async {
            matches!(setup.dry_run(&probe).await, Err(status) if status.message.contains("unknown version"))
        });
        assert!(
            asked.await,
            "the webhook is not asked; kubernest-api said\n{}",
            setup.api.tail(20)
        );
        // Mutation, conversion and validation at once; each definition has a bundle of its own.
        for (kind, spec) in every_spec() {
            let probe = manifest(&format!(
                "kind: {kind}\napiVersion: kubevirt.io/v1alpha3\nmetadata: {{name: probe}}\nspec: {spec}"
            ));
            let converted = wait_until(LIMIT, || async { setup.dry_run(&probe).await.is_ok() });
            assert!(
                converted.await,
                "{:?}; kubernest-api said\n{}",
                setup.dry_run(&probe).await,
                setup.api.tail(20)
            );
        }
        setup
    }

    async fn bundles(&self) -> Vec<Vec<u8>> {
        let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let configuration = webhooks.get("kubernest").await.unwrap();
        let bundle = |webhook: k8s_openapi::api::admissionregistration::v1::ValidatingWebhook| {
            webhook.client_config.ca_bundle.unwrap_or_default().0
        };
        configuration
            .webhooks
            .unwrap_or_default()
            .into_iter()
            .map(bundle)
            .collect()
    }

    fn objects(&self, object: &DynamicObject) -> Api<DynamicObject> {
        let types = object.types.as_ref().unwrap();
        let kind = GroupVersionKind::try_from(types).unwrap();
        let namespace = object.namespace().unwrap_or_else(|| "org-acme".to_owned());
        Api::namespaced_with(self.client.clone(), &namespace, &ApiResource::from_gvk(&kind))
    }

    async fn dry_run(&self, object: &DynamicObject) -> Result<DynamicObject, Box<Status>> {
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        self.objects(object).create(&params, object).await.map_err(status)
    }

    async fn create(&self, object: &DynamicObject) -> Result<DynamicObject, Box<Status>> {
        self.objects(object)
            .create(&PostParams::default(), object)
            .await
            .map_err(status)
    }

    async fn update(&self, object: &DynamicObject) -> Result<DynamicObject, Box<Status>> {
        let patch = Patch::Merge(object);
        self.objects(object)
            .patch(&object.name_any(), &PatchParams::default(), &patch)
            .await
            .map_err(status)
    }

    async fn stored(&self, object: &DynamicObject) -> Option<DynamicObject> {
        self.objects(object).get_opt(&object.name_any()).await.unwrap()
    }
}

fn start_api(plane: &ControlPlane, log: &str) -> (Process, u16) {
    let (port, metrics) = (free_port().unwrap(), free_port().unwrap());
    let arguments = [
        format!("--addr=127.0.0.1:{port}"),
        format!("--metrics-addr=127.0.0.1:{metrics}"),
        "--san=127.0.0.1".to_owned(),
        "--log-format=text".to_owned(),
        format!("--node-images={NODE_IMAGES}"),
    ];
    let kubeconfig = plane.kubeconfig();
    let environment: [(&str, &OsStr); 1] = [("KUBECONFIG", kubeconfig.as_os_str())];
    let program = Path::new(env!("CARGO_BIN_EXE_kubernest-api"));
    (
        Process::start(program, arguments, &environment, &plane.directory().join(log)).unwrap(),
        port,
    )
}

/// The webhooks as the chart has them, but reached by address: no Service exists here.
fn configuration(port: u16) -> ValidatingWebhookConfiguration {
    let webhook = |name: &str, group: &str, version: &str, resource: &str| {
        json!({
            "name": name, "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Fail", "timeoutSeconds": 5,
            "clientConfig": {"url": format!("https://127.0.0.1:{port}/validate/{resource}")},
            "rules": [{"apiGroups": [group], "apiVersions": [version], "operations": ["CREATE", "UPDATE"], "resources": [resource]}],
        })
    };
    serde_json::from_value(json!({
        "metadata": {"name": "kubernest"},
        "webhooks": [
            webhook("tenantcluster-validator.kubernest.io", "kubernest.io", "v1alpha1", "tenantclusters"),
            webhook("virtualmachine-validator.kubevirt.io", "kubevirt.io", "v1", "virtualmachines"),
            webhook("virtualmachineinstance-validator.kubevirt.io", "kubevirt.io", "v1", "virtualmachineinstances"),
            webhook("virtualmachineinstancepreset-validator.kubevirt.io", "kubevirt.io", "v1", "virtualmachineinstancepresets"),
            webhook("virtualmachinereplicaset-validator.kubevirt.io", "kubevirt.io", "v1", "virtualmachineinstancereplicasets"),
        ],
    }))
    .unwrap()
}

fn mutation(port: u16) -> MutatingWebhookConfiguration {
    let webhook = |resource: &str, operations: &[&str]| {
        json!({
            "name": format!("{resource}-mutator.kubevirt.io"), "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "failurePolicy": "Fail", "timeoutSeconds": 5,
            "clientConfig": {"url": format!("https://127.0.0.1:{port}/mutate/{resource}")},
            "rules": [{"apiGroups": ["kubevirt.io"], "apiVersions": ["v1"], "operations": operations, "resources": [resource]}],
        })
    };
    serde_json::from_value(json!({
        "metadata": {"name": "kubernest"},
        "webhooks": [webhook("virtualmachineinstances", &["CREATE"]), webhook("virtualmachines", &["CREATE", "UPDATE"])],
    }))
    .unwrap()
}

/// Has the CRDs' conversion reached by address.
async fn lead_conversion(client: &Client, port: u16) {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let config = json!({"url": format!("https://127.0.0.1:{port}/convert")});
    let patch = json!([{"op": "replace", "path": "/spec/conversion/webhook/clientConfig", "value": config}]);
    let patch = Patch::<()>::Json(serde_json::from_value(patch).unwrap());
    for plural in kubernest_crds::kubevirt::PLURALS {
        let name = format!("{plural}.kubevirt.io");
        definitions.patch(&name, &PatchParams::default(), &patch).await.unwrap();
    }
}

async fn create(client: &Client, namespace: &Namespace, name: &str) {
    let mut namespace = namespace.clone();
    namespace.metadata.name = Some(name.to_owned());
    Api::all(client.clone())
        .create(&PostParams::default(), &namespace)
        .await
        .unwrap();
}

fn status(error: kube::Error) -> Box<Status> {
    match error {
        kube::Error::Api(status) => status,
        other => panic!("no answer of the API server: {other}"),
    }
}

fn manifest(text: &str) -> DynamicObject {
    manifests(text).remove(0)
}

fn manifests(text: &str) -> Vec<DynamicObject> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    documents
        .into_iter()
        .map(|document| serde_json::from_value(document).unwrap())
        .collect()
}

fn examples(kind: &str) -> Vec<(PathBuf, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../crds/examples")
        .join(kind);
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|file| (file.clone(), std::fs::read_to_string(file).unwrap()))
        .collect()
}

/// `<field>: <part>` stands in the message, or a cause of that field says the part.
fn says(status: &Status, expected: &str) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let in_causes = |(field, part): (&str, &str)| {
        causes
            .clone()
            .any(|cause| cause.field == field && cause.message.contains(part))
    };
    status.message.contains(expected) || expected.split_once(": ").is_some_and(in_causes)
}

#[tokio::test]
async fn integration_examples_get_the_answers_beside_them() {
    let setup = Setup::start().await;
    let mut wrong = Vec::new();
    for (file, text) in examples("valid") {
        for object in manifests(&text) {
            if let Err(status) = setup.create(&object).await {
                wrong.push(format!("{}: refused: {}", file.display(), status.message));
            }
        }
    }
    for (file, text) in examples("invalid") {
        let expected: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# error: ")).collect();
        assert!(!expected.is_empty(), "{} does not say its error", file.display());
        let objects = manifests(&text);
        let (before, answer) = match objects.as_slice() {
            [object] => (None, setup.create(object).await),
            [object, changed] => {
                let created = setup.create(object).await;
                (
                    Some(created.unwrap_or_else(|status| panic!("{}: {}", file.display(), status.message))),
                    setup.update(changed).await,
                )
            }
            other => panic!("{} has {} manifests", file.display(), other.len()),
        };
        match answer {
            Ok(_) => wrong.push(format!("{}: accepted", file.display())),
            Err(status) => {
                for expected in expected.iter().filter(|expected| !says(&status, expected)) {
                    wrong.push(format!(
                        "{}: wanted {expected:?}, got {:?}",
                        file.display(),
                        status.message
                    ));
                }
                if status.code != 422 {
                    wrong.push(format!("{}: code {} instead of 422", file.display(), status.code));
                }
            }
        }
        let after = setup.stored(&objects[0]).await;
        if after.as_ref().map(|object| &object.data) != before.as_ref().map(|object| &object.data) {
            wrong.push(format!("{}: refused, but something changed", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn integration_replicas_share_one_ca_and_repair_its_bundle() {
    let setup = Setup::start().await;
    let first = setup.bundles().await;
    let secrets: Api<Secret> = Api::namespaced(setup.client.clone(), "kubernest-system");
    let ca = secrets.get("kubernest-api-ca").await.unwrap();

    // A second replica finds the CA and changes nothing.
    let (second, port) = start_api(&setup.plane, "second.log");
    let ready = wait_until(LIMIT, || async { second.tail(50).contains("serves a new certificate") }).await;
    assert!(ready, "{}", second.tail(20));
    assert_eq!(setup.bundles().await, first);
    assert_eq!(
        secrets.get("kubernest-api-ca").await.unwrap().metadata.resource_version,
        ca.metadata.resource_version
    );

    // Someone puts the configuration back as it was without a bundle, and points it at the other replica.
    let webhooks: Api<ValidatingWebhookConfiguration> = Api::all(setup.client.clone());
    let mut reset = configuration(port);
    reset.metadata.resource_version = webhooks.get("kubernest").await.unwrap().metadata.resource_version;
    webhooks
        .replace("kubernest", &PostParams::default(), &reset)
        .await
        .unwrap();
    let repaired = wait_until(LIMIT, || async { setup.bundles().await == first }).await;
    assert!(repaired, "the bundle was not put back");
    let invalid = manifest(
        "kind: TenantCluster\napiVersion: kubernest.io/v1alpha1\nmetadata: {name: a}\nspec: {version: v0.0.0}",
    );
    let asked = wait_until(LIMIT, || async {
        matches!(setup.dry_run(&invalid).await, Err(status) if status.message.contains("unknown version"))
    });
    assert!(asked.await, "the second replica is not trusted");
    assert_ne!(setup.port, port);
}

#[tokio::test]
async fn integration_new_instances_are_completed_and_served_in_two_versions() {
    let setup = Setup::start().await;
    let preset = |name: &str, label: &str, cores: u32| {
        manifest(&format!(
            "kind: VirtualMachineInstancePreset\napiVersion: kubevirt.io/v1\nmetadata: {{name: {name}}}\n\
             spec: {{selector: {{matchLabels: {{{label}: x}}}}, domain: {{cpu: {{cores: {cores}}}, devices: {{}}}}}}"
        ))
    };
    let instance = |version: &str, name: &str, labels: &str, cpu: &str| {
        manifest(&format!(
            "kind: VirtualMachineInstance\napiVersion: kubevirt.io/{version}\n\
             metadata: {{name: {name}, labels: {{{labels}}}}}\n\
             spec: {{domain: {{devices: {{}}, {cpu}resources: {{requests: {{memory: 64Mi}}}}}}}}"
        ))
    };
    for (name, label, cores) in [("two", "a", 2), ("three", "b", 3)] {
        setup.create(&preset(name, label, cores)).await.unwrap();
    }
    // kubernest-api learns of presets by watching them.
    let probe = instance("v1", "probe", "a: x", "");
    let seen = wait_until(LIMIT, || async {
        setup.dry_run(&probe).await.unwrap().data["spec"]["domain"]["cpu"]["cores"] == 2
    });
    assert!(
        seen.await,
        "no preset is applied; kubernest-api said\n{}",
        setup.api.tail(20)
    );

    // A user of the former version gets all of it, in that version; it is stored in the current one.
    let former = setup.create(&instance("v1alpha3", "former", "a: x", "")).await.unwrap();
    assert_eq!(former.types.as_ref().unwrap().api_version, "kubevirt.io/v1alpha3");
    let stored = setup.stored(&instance("v1", "former", "", "")).await.unwrap();
    assert_eq!(stored.data, former.data);
    assert_eq!(stored.data["spec"]["domain"]["cpu"]["cores"], 2);
    assert_eq!(stored.data["spec"]["domain"]["memory"]["guest"], "64Mi");
    assert_eq!(stored.data["spec"]["networks"], json!([{"name": "default", "pod": {}}]));
    assert!(stored.data["spec"]["domain"]["firmware"]["uuid"].is_string());
    assert_eq!(stored.finalizers(), ["kubevirt.io/foregroundDeleteVirtualMachine"]);
    assert_eq!(
        stored.annotations()["virtualmachinepreset.kubevirt.io/two"],
        "kubevirt.io/v1"
    );

    let own = setup
        .create(&instance("v1", "own", "a: x", "cpu: {cores: 1}, "))
        .await
        .unwrap();
    assert_eq!(own.data["spec"]["domain"]["cpu"]["cores"], 1);
    assert!(own.annotations()["kubernest.io/preset-conflicts"].starts_with("two: spec.cpu"));

    let both = setup.dry_run(&instance("v1", "both", "a: x, b: x", "")).await;
    let refused = both.unwrap_err();
    assert_eq!(refused.code, 422);
    assert!(
        refused.message.contains("cannot be applied due to conflicts"),
        "{}",
        refused.message
    );
}

#[tokio::test]
async fn integration_machines_are_completed_and_do_not_drift() {
    let setup = Setup::start().await;
    let text = |name: &str, devices: &str, machine: &str| {
        format!(
            "kind: VirtualMachine\napiVersion: kubevirt.io/v1\nmetadata: {{name: {name}, namespace: org-acme}}\n\
             spec: {{runStrategy: Halted, template: {{spec: {{domain: {{\
             {machine}devices: {{{devices}}}, memory: {{guest: 64Mi}}}}}}}}}}\n"
        )
    };
    // Server-side apply, the same again, a change of one's own, and a gap that is filled by oneself: without force.
    let params = PatchParams::apply("gitops");
    let apply = async |text: &str| {
        let object = manifest(text);
        let patch = Patch::Apply(&object);
        setup.objects(&object).patch("applied", &params, &patch).await.unwrap()
    };
    let plain = text("applied", "", "");
    let first = apply(&plain).await;
    let domain = &first.data["spec"]["template"]["spec"]["domain"];
    assert_eq!(first.data["spec"]["template"]["spec"]["architecture"], "amd64");
    assert_eq!(domain["machine"]["type"], "q35");
    assert!(domain["firmware"]["uuid"].is_string() && domain["firmware"]["serial"].is_string());
    assert_eq!(domain.get("cpu"), None, "the rest is for its instances");
    assert_eq!(apply(&plain).await.resource_version(), first.resource_version());
    let changed = apply(&text("applied", "rng: {}", "")).await;
    let firmware = |machine: &DynamicObject| machine.data["spec"]["template"]["spec"]["domain"]["firmware"].clone();
    assert_eq!(firmware(&changed), domain["firmware"]);
    let chosen = apply(&text("applied", "rng: {}", "machine: {type: pc-q35-7.2}, ")).await;
    assert_eq!(
        chosen.data["spec"]["template"]["spec"]["domain"]["machine"]["type"],
        "pc-q35-7.2"
    );

    // The same with kubectl, whose apply is a patch of its own making.
    let file = setup.plane.directory().join("machine.yaml");
    let file = file.to_str().unwrap();
    let kubectl = |arguments: &[&str]| {
        let output = setup.plane.kubectl(arguments).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    std::fs::write(file, text("patched", "", "")).unwrap();
    assert!(kubectl(&["apply", "-f", file]).contains("created"));
    assert!(kubectl(&["apply", "-f", file]).contains("unchanged"));
    let created = setup.stored(&manifest(&text("patched", "", ""))).await.unwrap();
    // A whole object without what was filled is still the same computer.
    std::fs::write(file, text("patched", "rng: {}", "")).unwrap();
    kubectl(&["replace", "-f", file]);
    let replaced = setup.stored(&created).await.unwrap();
    assert_eq!(firmware(&replaced), firmware(&created));
    assert_eq!(replaced.data["spec"]["template"]["spec"]["architecture"], "amd64");
    // Nothing about the template changes with a label.
    kubectl(&["label", "-n", "org-acme", "virtualmachine/patched", "a=b"]);
    assert_eq!(setup.stored(&created).await.unwrap().data, replaced.data);
}

/// A spec of each kind that has two versions.
fn every_spec() -> [(&'static str, String); 4] {
    let instance = "{domain: {devices: {}, memory: {guest: 64Mi}}}";
    let labelled = format!("{{metadata: {{labels: {{app: a}}}}, spec: {instance}}}");
    let selector = "selector: {matchLabels: {app: a}}";
    [
        ("VirtualMachineInstance", instance.to_owned()),
        (
            "VirtualMachine",
            format!("{{runStrategy: Halted, template: {{spec: {instance}}}}}"),
        ),
        (
            "VirtualMachineInstanceReplicaSet",
            format!("{{{selector}, template: {labelled}}}"),
        ),
        (
            "VirtualMachineInstancePreset",
            format!("{{{selector}, domain: {{devices: {{}}, cpu: {{cores: 2}}}}}}"),
        ),
    ]
}

#[tokio::test]
async fn integration_every_kind_is_served_in_two_versions() {
    let setup = Setup::start().await;
    let of = |kind: &str, version: &str, name: &str, spec: &str| {
        manifest(&format!(
            "kind: {kind}\napiVersion: kubevirt.io/{version}\nmetadata: {{name: {name}}}\nspec: {spec}"
        ))
    };
    for (kind, spec) in every_spec() {
        for (first, second) in [("v1alpha3", "v1"), ("v1", "v1alpha3")] {
            let of = |version: &str| of(kind, version, &format!("made-as-{first}"), &spec);
            let made = setup.create(&of(first)).await;
            let made = made.unwrap_or_else(|status| panic!("{kind} {first}: {}", status.message));
            let read = setup.stored(&of(second)).await.unwrap();
            assert_eq!(
                read.types.as_ref().unwrap().api_version,
                format!("kubevirt.io/{second}")
            );
            assert_eq!((&read.data, read.uid()), (&made.data, made.uid()), "{kind} {first}");
            // A change by a client of the other version is there in the first.
            let mut changed = of(second);
            changed.labels_mut().insert("changed".to_owned(), "yes".to_owned());
            setup.update(&changed).await.unwrap();
            let read = setup.stored(&of(first)).await.unwrap();
            assert_eq!(
                (&read.data, read.labels()["changed"].as_str()),
                (&made.data, "yes"),
                "{kind} {first}"
            );
        }
    }
}

/// The roles that the chart adds to Kubernetes' role `edit`, which a controller puts together that is not there here.
async fn bind_edit_to(setup: &Setup, user: &str) {
    let images = r#"nodeImages={"v1.35.4":{"image":"registry.example/node@sha256:0"}}"#;
    let output = std::process::Command::new(Binaries::locate().helm().unwrap())
        .args([
            "template",
            "kubernest",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/kubernest"),
        ])
        .args([
            "--namespace",
            "kubernest-system",
            "--kube-version",
            "1.35.4",
            "--set-json",
            images,
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rendered: Vec<Value> = serde_saphyr::from_multiple(&String::from_utf8(output.stdout).unwrap()).unwrap();
    let edit = |object: &Value| {
        object
            .pointer("/metadata/labels/rbac.authorization.k8s.io~1aggregate-to-edit")
            .is_some()
    };
    let roles: Vec<ClusterRole> = rendered
        .into_iter()
        .filter(edit)
        .map(|role| serde_json::from_value(role).unwrap())
        .collect();
    assert_eq!(roles.len(), 2, "TenantClusters' and machines'");
    let params = PostParams::default();
    let bindings: Api<RoleBinding> = Api::namespaced(setup.client.clone(), "org-acme");
    for role in roles {
        Api::all(setup.client.clone()).create(&params, &role).await.unwrap();
        let name = role.name_any();
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        bindings
            .create(&params, &serde_json::from_value(binding).unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn integration_editors_write_specs_and_no_status() {
    let setup = Setup::start().await;
    bind_edit_to(&setup, "editor").await;
    let kubectl = |arguments: &[&str]| {
        let as_editor = ["--as=editor", "-n", "org-acme"];
        let output = setup.plane.kubectl([&as_editor[..], arguments].concat()).unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let instance = "{domain: {devices: {}, memory: {guest: 64Mi}}}";
    for (resource, kind, version, spec) in [
        (
            "tenantclusters",
            "TenantCluster",
            "kubernest.io/v1alpha1",
            "{version: v1.35.4}".to_owned(),
        ),
        (
            "virtualmachines",
            "VirtualMachine",
            "kubevirt.io/v1",
            format!("{{runStrategy: Halted, template: {{spec: {instance}}}}}"),
        ),
        (
            "virtualmachineinstances",
            "VirtualMachineInstance",
            "kubevirt.io/v1",
            instance.to_owned(),
        ),
        (
            "virtualmachineinstancereplicasets",
            "VirtualMachineInstanceReplicaSet",
            "kubevirt.io/v1",
            format!(
                "{{selector: {{matchLabels: {{app: a}}}}, template: {{metadata: {{labels: {{app: a}}}}, spec: {instance}}}}}"
            ),
        ),
    ] {
        let file = setup.plane.directory().join(format!("{resource}.yaml"));
        let text = format!(
            "kind: {kind}\napiVersion: {version}\nmetadata: {{name: edited}}\nspec: {spec}\n\
             status: {{conditions: [{{type: Ready, status: \"True\"}}]}}\n"
        );
        std::fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let made = wait_until(LIMIT, || async { kubectl(&["apply", "-f", file]).0 });
        assert!(made.await, "{resource}: {:?}", kubectl(&["apply", "-f", file]));
        let status = r#"{"status": {"conditions": [{"type": "Ready", "status": "True"}]}}"#;
        let patch = ["patch", resource, "edited", "--type=merge", "-p", status];
        // The status beside a spec is passed over, and of its own it is not theirs to write.
        let beside = kubectl(&patch);
        assert!(beside.0, "{resource}: {beside:?}");
        // `kubectl patch --subresource` would read it first, which is not theirs either.
        let path = format!("/apis/{version}/namespaces/org-acme/{resource}/edited/status");
        let own = kubectl(&["replace", "--raw", &path, "-f", file]);
        let forbidden = format!("User \"editor\" cannot update resource \"{resource}/status\"");
        assert!(!own.0 && own.1.contains(&forbidden), "{resource}: {own:?}");
        let found = kubectl(&["get", resource, "edited", "-o", "jsonpath={.status}"]);
        assert!(found.0 && !found.1.contains("Ready"), "{resource}: {found:?}");
    }
}

/// The text of an object may be small and its values many: one user's writes must not cost everybody's webhooks their
/// process.
#[tokio::test]
async fn integration_objects_of_many_values_are_refused_in_little_memory() {
    let setup = Setup::start().await;
    let instance = |annotation: &str, item: &str, count: usize| {
        let items = vec![item; count].join(",");
        format!(
            r#"{{"apiVersion":"kubevirt.io/v1","kind":"VirtualMachineInstance","metadata":{{"name":"many","annotations":{{"a":"{annotation}"}}}},"spec":{{"domain":{{"devices":{{}},"memory":{{"guest":"64Mi"}}}},"volumes":[{items}]}}}}"#
        )
    };
    let path = "/apis/kubevirt.io/v1/namespaces/org-acme/virtualmachineinstances";
    let ask = async |body: &str| loop {
        let request = http::Request::post(path).header("content-type", "application/json");
        let request = request.body(body.as_bytes().to_vec()).unwrap();
        let refused = status(setup.client.request::<Value>(request).await.unwrap_err());
        // Of a webhook's answer the API server waits for some seconds, which a slow machine may take for its own part.
        if !refused.message.contains("deadline exceeded") {
            return refused;
        }
    };
    let few = ask(&instance("", r#"{"name":""}"#, 1)).await;
    assert!(few.message.contains("volumes[0]"), "{}", few.message);
    let before = setup.api.peak_kib().unwrap();
    for (body, expected) in [
        (
            instance("", r#"{"name":""}"#, 250_000),
            "more than 16384 values are no VirtualMachineInstance",
        ),
        // Text is no values, and completing an object makes more of them.
        (instance(&"[,".repeat(100_000), r#"{"name":""}"#, 2_500), ", and more"),
    ] {
        let answers = futures::future::join_all((0..3).map(|_| ask(&body))).await;
        for answer in answers {
            assert_eq!(answer.code, 422, "{}", answer.message);
            assert!(answer.message.contains(expected), "{}", answer.message);
        }
    }
    let more = setup.api.peak_kib().unwrap() - before;
    assert!(more < 60 << 10, "{more} KiB");
}
