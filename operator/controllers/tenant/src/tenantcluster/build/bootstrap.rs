//! A slot's bootstrap Secret: the node configuration that the guest carries out, and the files that it names.
//! Pure; reads neither clock nor random numbers, so that equal input gives an equal Secret and nothing is written.

use std::{collections::BTreeMap, net::Ipv4Addr};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use kubernest_bootstrap::{API_VERSION, Cni, File, HostEntry, Interface, NODE_CONFIG_KEY, NodeConfig, Stage, WaitFor};
use kubernest_pki::{Credential, Kubeconfig, KubeconfigAuth};
use serde_json::Value;

use super::{
    flags::{self, CONFIG, PKI, crt, key},
    network::{API_PORT, MTU, NODE_PREFIX, Network},
    pki::{Authorities, Authority},
    policies,
    slots::{Slot, secret_name, slot_metadata},
};
use crate::tenantcluster::validate::Validated;

/// Restarted when its command line changes.
const ETCD: &str = "etcd.service";
const APISERVER: &str = "kube-apiserver.service";
const CONTROLLER_MANAGER: &str = "kube-controller-manager.service";
const SCHEDULER: &str = "kube-scheduler.service";
const KUBELET: &str = "kubelet.service";
const PROXY: &str = "kube-proxy.service";
const CONTAINERD: &str = "containerd.service";

/// What a slot's files are made from.
pub struct Input<'a> {
    /// The cluster.
    pub valid: &'a Validated,
    /// Its network.
    pub network: &'a Network,
    /// The slot.
    pub slot: &'a Slot,
    /// Address of the first control-plane slot on the tenant network.
    pub control_plane_ip: Ipv4Addr,
    /// CAs and keys.
    pub authorities: &'a Authorities,
    /// The slot's certificates by profile name.
    pub credentials: &'a BTreeMap<&'static str, Credential>,
}

/// The document and its files as a Secret.
///
/// # Errors
/// When the document can't be serialised.
pub fn secret(input: &Input<'_>) -> Result<Secret, serde_json::Error> {
    let mut files = Files::default();
    input.common(&mut files);
    if input.slot.is_control_plane() {
        input.control_plane(&mut files);
    }
    let config = input.config(files.list);
    files
        .data
        .insert(NODE_CONFIG_KEY.to_owned(), serde_json::to_vec_pretty(&config)?);
    Ok(Secret {
        metadata: slot_metadata(input.valid, input.slot, secret_name(&input.slot.name)),
        type_: Some("Opaque".to_owned()),
        data: Some(
            files
                .data
                .into_iter()
                .map(|(key, value)| (key, ByteString(value)))
                .collect(),
        ),
        ..Secret::default()
    })
}

#[derive(Default)]
struct Files {
    list: Vec<File>,
    data: BTreeMap<String, Vec<u8>>,
}

impl Files {
    /// Certificates reload by themselves; what does not names its unit.
    fn add(&mut self, path: String, mode: &str, content: impl Into<Vec<u8>>, restart: &[&str]) {
        let key = path.rsplit('/').next().unwrap_or(&path).to_owned();
        self.add_as(key, path, mode, content, restart);
    }

    fn add_as(&mut self, key: String, path: String, mode: &str, content: impl Into<Vec<u8>>, restart: &[&str]) {
        self.data.insert(key.clone(), content.into());
        let restart = restart.iter().map(|unit| (*unit).to_owned()).collect();
        self.list.push(File {
            path,
            key,
            mode: mode.to_owned(),
            restart,
        });
    }

    fn credential(&mut self, name: &str, credential: &Credential) {
        self.add(crt(name), "0644", credential.chain_pem.as_str(), &[]);
        self.add(key(name), "0600", credential.key_pem.as_str(), &[]);
    }

    fn config(&mut self, name: &str, content: &Value, unit: &str) {
        // JSON is YAML; serde_json keeps keys sorted, so the text is stable.
        self.add(format!("{CONFIG}/{name}"), "0600", format!("{content:#}\n"), &[unit]);
    }

    fn args(&mut self, component: &str, args: &[String], unit: &str) {
        let text = format!("ARGS=\"{}\"\n", args.join(" "));
        self.add_as(
            format!("{component}.env"),
            format!("/etc/kubernest/env/{component}"),
            "0600",
            text,
            &[unit],
        );
    }
}

impl Input<'_> {
    fn ca(&self, authority: Authority) -> &str {
        self.authorities.issuer(authority).certificate_pem()
    }

    fn kubeconfig(&self, user: &str, server: &str, profile: &str) -> String {
        Kubeconfig {
            cluster: &self.valid.name,
            user,
            server,
            ca_pem: self.ca(Authority::Cluster),
            auth: KubeconfigAuth::Files {
                certificate: &crt(profile),
                key: &key(profile),
            },
        }
        .render()
    }

    fn common(&self, files: &mut Files) {
        let (valid, slot) = (self.valid, self.slot);
        let server = format!("https://{}:{API_PORT}", self.control_plane_ip);
        files.add(crt("ca"), "0644", self.ca(Authority::Cluster), &[KUBELET]);
        for (name, credential) in self.credentials {
            files.credential(name, credential);
        }
        let bootstrap = self.kubeconfig("kubelet-bootstrap", &server, "kubelet-bootstrap");
        files.add(format!("{CONFIG}/kubelet-bootstrap.conf"), "0600", bootstrap, &[]);
        files.config("kubelet.yaml", &flags::kubelet_config(valid, slot), KUBELET);
        files.args("kubelet", &flags::kubelet(slot), KUBELET);
        let proxy = self.kubeconfig("kube-proxy", &server, "kube-proxy");
        files.add(format!("{CONFIG}/kube-proxy.conf"), "0600", proxy, &[PROXY]);
        files.config("kube-proxy.yaml", &flags::proxy_config(valid, slot), PROXY);
        files.args("kube-proxy", &flags::proxy(), PROXY);
    }

    fn control_plane(&self, files: &mut Files) {
        let (valid, slot, authorities) = (self.valid, self.slot, self.authorities);
        files.add(crt("etcd-ca"), "0644", self.ca(Authority::Etcd), &[ETCD, APISERVER]);
        files.add(crt("front-proxy-ca"), "0644", self.ca(Authority::FrontProxy), &[]);
        let tokens = &authorities.service_account;
        files.add(
            format!("{PKI}/sa.pub"),
            "0644",
            tokens.public_pem.as_str(),
            &[APISERVER],
        );
        files.add(
            format!("{PKI}/sa.key"),
            "0600",
            tokens.private_pem.as_str(),
            &[APISERVER, CONTROLLER_MANAGER],
        );

        files.config("authentication.yaml", &policies::authentication(), APISERVER);
        files.config(
            "encryption.yaml",
            &policies::encryption(&authorities.encryption_key),
            APISERVER,
        );
        files.config("audit.yaml", &policies::audit(), APISERVER);
        for (component, user, unit) in [
            ("controller-manager", "kube-controller-manager", CONTROLLER_MANAGER),
            ("scheduler", "kube-scheduler", SCHEDULER),
        ] {
            let text = self.kubeconfig(user, &format!("https://127.0.0.1:{API_PORT}"), component);
            files.add(format!("{CONFIG}/{component}.conf"), "0600", text, &[unit]);
        }
        files.args("etcd", &flags::etcd(slot), ETCD);
        files.args("kube-apiserver", &flags::apiserver(valid, slot), APISERVER);
        files.args(
            "kube-controller-manager",
            &flags::controller_manager(valid),
            CONTROLLER_MANAGER,
        );
        files.args("kube-scheduler", &flags::scheduler(), SCHEDULER);
    }

    fn config(&self, files: Vec<File>) -> NodeConfig {
        let slot = self.slot;
        NodeConfig {
            api_version: API_VERSION.to_owned(),
            hostname: slot.name.clone(),
            interfaces: vec![Interface {
                name: "eth1".to_owned(),
                mac: slot.mac.clone(),
                address: format!("{}/{NODE_PREFIX}", slot.ip),
                mtu: MTU,
            }],
            hosts: Vec::<HostEntry>::new(),
            files,
            stages: if slot.is_control_plane() {
                control_plane_stages()
            } else {
                worker_stages(self.control_plane_ip)
            },
            cni: Cni::Flannel,
        }
    }
}

fn stage(name: &str, units: &[&str], wait_for: Option<WaitFor>) -> Stage {
    Stage {
        name: name.to_owned(),
        units: units.iter().map(|unit| (*unit).to_owned()).collect(),
        wait_for,
    }
}

fn ready(host: &str) -> Option<WaitFor> {
    Some(WaitFor {
        url: format!("https://{host}:{API_PORT}/readyz"),
        ca_file: crt("ca"),
        client: None,
    })
}

/// Nothing but etcd and the API server runs until the latter answers: under TCG every program that retries meanwhile
/// delays it.
fn control_plane_stages() -> Vec<Stage> {
    vec![
        stage("API server", &[ETCD, APISERVER], ready("127.0.0.1")),
        stage("control plane", &[CONTROLLER_MANAGER, SCHEDULER, CONTAINERD], None),
        stage("node", &[KUBELET, PROXY], None),
    ]
}

/// A kubelet without API server exits and is started again; it waits instead.
fn worker_stages(control_plane_ip: Ipv4Addr) -> Vec<Stage> {
    vec![
        stage("container runtime", &[CONTAINERD], ready(&control_plane_ip.to_string())),
        stage("node", &[KUBELET, PROXY], None),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::Timestamp;
    use serde_json::json;

    use super::*;
    use crate::tenantcluster::{
        build::{
            pki::{credentials, profiles, tests::authorities},
            slots::{plan, tests::network},
        },
        validate::{
            tests::{cluster, options},
            validate,
        },
    };

    async fn secrets(version: &str) -> Vec<(NodeConfig, BTreeMap<String, ByteString>)> {
        let valid = validate(&cluster(json!({"version": version})), &options()).unwrap();
        let network = network();
        let slots = plan(&valid, &network, &BTreeMap::new()).unwrap();
        let authorities = authorities(&valid);
        let mut all = Vec::new();
        for slot in &slots {
            let profiles = profiles(&valid, slot, "10.96.0.7".parse().unwrap());
            let credentials = credentials(&profiles, &authorities, None, Timestamp::now())
                .await
                .unwrap();
            let secret = secret(&Input {
                valid: &valid,
                network: &network,
                slot,
                control_plane_ip: slots[0].ip,
                authorities: &authorities,
                credentials: &credentials,
            })
            .unwrap();
            let data = secret.data.unwrap();
            all.push((NodeConfig::parse(&data[NODE_CONFIG_KEY].0).unwrap(), data));
        }
        all
    }

    #[tokio::test]
    async fn plan_bootstrap_every_file_has_content_and_every_content_a_file() {
        for (config, data) in secrets("v1.35.4").await {
            let named: BTreeSet<_> = config.files.iter().map(|file| file.key.as_str()).collect();
            let held: BTreeSet<_> = data
                .keys()
                .map(String::as_str)
                .filter(|key| *key != NODE_CONFIG_KEY)
                .collect();
            assert_eq!(named, held);
            assert_eq!(config.files.len(), named.len(), "two files share a key");
        }
    }

    #[tokio::test]
    async fn plan_bootstrap_holds_no_ca_key() {
        for (_, data) in secrets("v1.35.4").await {
            assert!(data.keys().all(|key| !key.ends_with("ca.key")), "{:?}", data.keys());
        }
    }

    #[tokio::test]
    async fn plan_bootstrap_keys_are_readable_by_root_only() {
        for (config, _) in secrets("v1.35.4").await {
            assert!(
                config
                    .files
                    .iter()
                    .filter(|file| file.path.ends_with(".key"))
                    .all(|file| file.mode == "0600")
            );
        }
    }

    /// Flags and files of both roles; certificates differ at each run and are left out.
    #[tokio::test]
    async fn plan_bootstrap_documents() {
        for version in ["v1.35.4", "v1.34.4"] {
            for (config, data) in secrets(version).await {
                let role = if config.files.iter().any(|file| file.key == "etcd.env") {
                    "control_plane"
                } else {
                    "worker"
                };
                let text: BTreeMap<_, _> = data
                    .iter()
                    .filter(|(key, _)| [".env", ".yaml", ".json"].iter().any(|end| key.ends_with(end)))
                    .filter(|(key, _)| *key != "encryption.yaml")
                    .map(|(key, value)| (key, String::from_utf8(value.0.clone()).unwrap().replace(" --", "\n--")))
                    .collect();
                insta::assert_yaml_snapshot!(format!("bootstrap_{role}_{version}"), text);
            }
        }
    }
}
