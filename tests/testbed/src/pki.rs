//! The bed's certificates and kubeconfigs: one ECDSA CA, one front-proxy CA, a key of its own for every component.
//!
//! It deliberately renews nothing: certificates of a bed do not expire, the bed does.

use std::{fs, net::IpAddr, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use crate::{plan::Plan, state};

/// Why the certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key or certificate could not be made.
    #[error("cannot make the certificate {name}")]
    Make {
        /// Its file name without extension.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] state::Error),
}

/// A certificate to make: (file name, common name, organization, whom it serves).
struct Leaf {
    name: String,
    common_name: String,
    organization: Option<&'static str>,
    serves: Vec<SanType>,
}

/// Clients of the API server and the files of their kubeconfigs: (kubeconfig, common name, organization).
/// `system:masters` needs no binding; the API server's own client for kubelets is bound as kubeadm does.
const CLIENTS: &[(&str, &str, Option<&str>)] = &[
    ("admin", "kubernest-testbed", Some("system:masters")),
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("kube-proxy", "system:kube-proxy", None),
    ("multus", "kubernest-testbed:multus", None),
];

/// Makes what is missing below `dir` for `plan`, in the layout of kubeadm's /etc/kubernetes/pki.
pub fn ensure(dir: &Path, plan: &Plan) -> Result<(), Error> {
    let ca = authority(dir, "ca", "kubernest-testbed")?;
    let front = authority(dir, "front-proxy-ca", "kubernest-testbed-front-proxy")?;
    if !dir.join("sa.key").exists() {
        let key = KeyPair::generate().map_err(make("sa"))?;
        write(&dir.join("sa.pub"), &key.public_key_pem())?;
        write(&dir.join("sa.key"), &key.serialize_pem())?;
    }
    leaf(
        dir,
        &front,
        &Leaf {
            name: "front-proxy-client".into(),
            common_name: "front-proxy-client".into(),
            organization: None,
            serves: vec![],
        },
    )?;
    leaf(dir, &ca, &api_server(plan))?;
    let kubelet_client = Leaf {
        name: "apiserver-kubelet-client".into(),
        common_name: "kube-apiserver-kubelet-client".into(),
        organization: Some("kubeadm:cluster-admins"),
        serves: vec![],
    };
    leaf(dir, &ca, &kubelet_client)?;
    for &(name, common_name, organization) in CLIENTS {
        client(dir, &ca, plan, name, common_name.into(), organization)?;
    }
    for i in 0..plan.nodes() {
        let node = plan.node_name(i);
        client(
            dir,
            &ca,
            plan,
            &format!("kubelet-{i}"),
            format!("system:node:{node}"),
            Some("system:nodes"),
        )?;
        let serves = vec![dns(&node)?, SanType::IpAddress(IpAddr::V4(plan.node_ip(i)))];
        leaf(
            dir,
            &ca,
            &Leaf {
                name: format!("kubelet-serving-{i}"),
                common_name: format!("system:node:{node}"),
                organization: Some("system:nodes"),
                serves,
            },
        )?;
    }
    Ok(())
}

fn api_server(plan: &Plan) -> Leaf {
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ];
    let ips = [plan.control_ip(), plan.api_service_ip(), std::net::Ipv4Addr::LOCALHOST];
    let serves = names
        .iter()
        .filter_map(|n| dns(n).ok())
        .chain(ips.map(|ip| SanType::IpAddress(IpAddr::V4(ip))))
        .collect();
    Leaf {
        name: "apiserver".into(),
        common_name: "kube-apiserver".into(),
        organization: None,
        serves,
    }
}

fn dns(name: &str) -> Result<SanType, Error> {
    name.try_into().map(SanType::DnsName).map_err(make(name))
}

fn make(name: &str) -> impl FnOnce(rcgen::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Make { name, source }
}

fn authority(dir: &Path, name: &str, common_name: &str) -> Result<Issuer<'static, KeyPair>, Error> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
    ];
    params.distinguished_name.push(DnType::CommonName, common_name);
    let (cert_file, key_file) = (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
    // The certificate is written last, so it is there only if its key is.
    if !cert_file.exists() {
        let key = KeyPair::generate().map_err(make(name))?;
        let cert = params.self_signed(&key).map_err(make(name))?;
        write(&key_file, &key.serialize_pem())?;
        write(&cert_file, &cert.pem())?;
    }
    let key = KeyPair::from_pem(&read(&key_file)?).map_err(make(name))?;
    Ok(Issuer::new(params, key))
}

fn leaf(dir: &Path, issuer: &Issuer<'_, KeyPair>, leaf: &Leaf) -> Result<(), Error> {
    let cert_file = dir.join(format!("{}.crt", leaf.name));
    if cert_file.exists() {
        return Ok(());
    }
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, leaf.common_name.as_str());
    if let Some(organization) = leaf.organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = if leaf.serves.is_empty() {
        vec![ExtendedKeyUsagePurpose::ClientAuth]
    } else {
        vec![ExtendedKeyUsagePurpose::ServerAuth]
    };
    params.subject_alt_names.clone_from(&leaf.serves);
    let key = KeyPair::generate().map_err(make(&leaf.name))?;
    let cert = params.signed_by(&key, issuer).map_err(make(&leaf.name))?;
    write(&dir.join(format!("{}.key", leaf.name)), &key.serialize_pem())?;
    write(&cert_file, &cert.pem())
}

/// A client's kubeconfig with its certificate and key inside, so that it is one file that can be copied anywhere.
fn client(
    dir: &Path,
    ca: &Issuer<'_, KeyPair>,
    plan: &Plan,
    name: &str,
    common_name: String,
    organization: Option<&'static str>,
) -> Result<(), Error> {
    leaf(
        dir,
        ca,
        &Leaf {
            name: name.into(),
            common_name,
            organization,
            serves: vec![],
        },
    )?;
    let file = dir.join(format!("{name}.kubeconfig"));
    if file.exists() {
        return Ok(());
    }
    let inline = |f: String| read(&dir.join(f)).map(|pem| BASE64_STANDARD.encode(pem));
    let bed = format!("kubernest-testbed-{}", plan.name());
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: {bed}\n\
         clusters:\n- name: {bed}\n  cluster:\n    server: {}\n    certificate-authority-data: {}\n\
         users:\n- name: {name}\n  user:\n    client-certificate-data: {}\n    client-key-data: {}\n\
         contexts:\n- name: {bed}\n  context: {{cluster: {bed}, user: {name}}}\n",
        plan.api_url(),
        inline("ca.crt".into())?,
        inline(format!("{name}.crt"))?,
        inline(format!("{name}.key"))?,
    );
    write(&file, &kubeconfig)
}

fn read(path: &Path) -> Result<String, Error> {
    Ok(fs::read_to_string(path).map_err(state::io_error("read", path))?)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    state::write_if_changed(path, text.as_bytes())?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(state::io_error("close", path))?)
}
