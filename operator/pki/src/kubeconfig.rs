//! Kubeconfig files. Reads none.

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::Credential;

/// How the user of a kubeconfig proves who it is.
#[derive(Clone, Copy, Debug)]
pub enum KubeconfigAuth<'a> {
    /// Certificate and key in the file.
    Inline(&'a Credential),
    /// Certificate and key in files of the machine that reads it, so that they can change beneath it.
    Files {
        /// PEM certificate path.
        certificate: &'a str,
        /// PEM key path.
        key: &'a str,
    },
}

/// A kubeconfig with one cluster, one user and one context.
#[derive(Clone, Copy, Debug)]
pub struct Kubeconfig<'a> {
    /// Name of cluster and context.
    pub cluster: &'a str,
    /// Name of the user entry.
    pub user: &'a str,
    /// `https://host:port`.
    pub server: &'a str,
    /// PEM of the CAs that sign the server's certificate.
    pub ca_pem: &'a str,
    /// Who speaks.
    pub auth: KubeconfigAuth<'a>,
}

impl Kubeconfig<'_> {
    /// The file's text: YAML whose scalars are JSON strings, so that nothing needs escaping by hand.
    pub fn render(&self) -> String {
        let Kubeconfig {
            cluster, user, server, ..
        } = self;
        let ca = STANDARD.encode(self.ca_pem);
        let auth = match self.auth {
            KubeconfigAuth::Inline(credential) => format!(
                "    client-certificate-data: {}\n    client-key-data: {}\n",
                STANDARD.encode(&credential.chain_pem),
                STANDARD.encode(&credential.key_pem)
            ),
            KubeconfigAuth::Files { certificate, key } => {
                format!("    client-certificate: {certificate:?}\n    client-key: {key:?}\n")
            }
        };
        format!(
            "apiVersion: v1\nkind: Config\n\
             clusters:\n- name: {cluster:?}\n  cluster:\n    certificate-authority-data: {ca}\n    server: {server:?}\n\
             users:\n- name: {user:?}\n  user:\n{auth}\
             contexts:\n- name: {cluster:?}\n  context:\n    cluster: {cluster:?}\n    user: {user:?}\n\
             current-context: {cluster:?}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubeconfig_renders_one_context() {
        let text = Kubeconfig {
            cluster: "a",
            user: "admin",
            server: "https://a.example:6443",
            ca_pem: "CA",
            auth: KubeconfigAuth::Files {
                certificate: "/c.crt",
                key: "/c.key",
            },
        }
        .render();
        assert_eq!(
            text,
            r#"apiVersion: v1
kind: Config
clusters:
- name: "a"
  cluster:
    certificate-authority-data: Q0E=
    server: "https://a.example:6443"
users:
- name: "admin"
  user:
    client-certificate: "/c.crt"
    client-key: "/c.key"
contexts:
- name: "a"
  context:
    cluster: "a"
    user: "admin"
current-context: "a"
"#
        );
    }
}
