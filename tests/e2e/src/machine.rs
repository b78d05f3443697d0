//! A virtual machine with the small guest of the launcher's tests, used as its owner uses it: through the API server, with
//! the rights of an ordinary user of one namespace.

use std::path::Path;

use anyhow::{Context, Result, bail};
use kube::api::{Api, DeleteParams, PostParams};
use kube::{Client, ResourceExt};
use kubernest_crds::kubevirt::v1::{VirtualMachine, VirtualMachineInstance};
use kubernest_integration::{PlainStream, StreamError};
use serde_json::{Value, json};

use crate::outer::Outer;
use crate::wait::until;

/// User of the namespace, who has Kubernetes' ClusterRole `edit` there.
pub const USER: &str = "ada";
const BASE: &str = "/apis/subresources.kubevirt.io/v1";

/// A machine.
pub struct Machine<'a> {
    outer: &'a Outer,
    namespace: String,
    name: String,
}

/// Makes a namespace in which [`USER`] may edit. What a story that failed left of it goes first.
pub fn namespace(outer: &Outer, name: &str) -> Result<()> {
    outer.kubectl(&["delete", "namespace", name, "--ignore-not-found"])?;
    outer.kubectl(&["create", "namespace", name])?;
    let user = format!("--user={USER}");
    outer.kubectl(&["create", "rolebinding", "edit", "-n", name, "--clusterrole=edit", &user])?;
    Ok(())
}

/// The template of a machine whose guest does `then` once it is up; the claim `data`, if named, is its second disk.
pub fn template(then: &str, claim: Option<&str>) -> Result<Value> {
    let image = std::env::var("KUBERNEST_TEST_GUEST").context("run this test with `make e2e`")?;
    let mut disks = vec![json!({"name": "root", "disk": {"bus": "virtio"}})];
    let mut volumes = vec![json!({"name": "root", "containerDisk": {"image": image}})];
    if let Some(claim) = claim {
        disks.push(json!({"name": "data", "serial": "data", "disk": {"bus": "virtio"}}));
        volumes.push(json!({"name": "data", "persistentVolumeClaim": {"claimName": claim}}));
    }
    Ok(json!({"spec": {
        "terminationGracePeriodSeconds": 60,
        "domain": {
            "memory": {"guest": "128Mi"},
            "firmware": {"kernelBoot": {
                "kernelArgs": format!("console=ttyS0,115200 quiet no_timer_check then={then}"),
                "container": {"image": image, "kernelPath": "/boot/vmlinuz", "initrdPath": "/boot/initrd.img"},
            }},
            "devices": {"disks": disks, "interfaces": [{"name": "default", "masquerade": {}}]},
        },
        "networks": [{"name": "default", "pod": {}}],
        "volumes": volumes,
    }}))
}

impl<'a> Machine<'a> {
    /// Creates it.
    pub async fn create(
        outer: &'a Outer,
        namespace: &str,
        name: &str,
        strategy: &str,
        template: Value,
    ) -> Result<Self> {
        let object = json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": name},
            "spec": {"runStrategy": strategy, "template": template},
        });
        let mut object: VirtualMachine = serde_json::from_value(object)?;
        object.metadata.namespace = Some(namespace.to_owned());
        Self::create_from(outer, object).await
    }

    /// Creates it as it is written, with name and namespace.
    pub async fn create_from(outer: &'a Outer, object: VirtualMachine) -> Result<Self> {
        let machine = Self {
            outer,
            namespace: object.namespace().context("a namespace")?,
            name: object.name_any(),
        };
        machine.api().create(&PostParams::default(), &object).await?;
        Ok(machine)
    }

    /// Machines of the namespace.
    pub fn api(&self) -> Api<VirtualMachine> {
        Api::namespaced(self.outer.client.clone(), &self.namespace)
    }

    /// Instances of the namespace.
    pub fn instances(&self) -> Api<VirtualMachineInstance> {
        Api::namespaced(self.outer.client.clone(), &self.namespace)
    }

    /// Waits until it shows this `printableStatus`.
    pub async fn shows(&self, status: &str) -> Result<()> {
        let shown = |object: Option<&VirtualMachine>| {
            object.and_then(|vm| vm.status.as_ref()?.printable_status.as_deref()) == Some(status)
        };
        until(&self.api(), &self.name, status, shown).await.map(drop)
    }

    /// Waits until its instance, of another uid than `not`, is in `phase`; its uid.
    pub async fn instance_in(&self, phase: &str, not: Option<&str>) -> Result<String> {
        let reached = |object: Option<&VirtualMachineInstance>| {
            object.is_some_and(|vmi| {
                vmi.uid().as_deref() != not
                    && vmi.status.as_ref().and_then(|status| status.phase.as_deref()) == Some(phase)
            })
        };
        let found = until(&self.instances(), &self.name, phase, reached).await?;
        found.and_then(|vmi| vmi.uid()).context("the instance's uid")
    }

    /// The node that its instance runs on.
    pub async fn node(&self) -> Result<String> {
        let instance = self.instances().get(&self.name).await?;
        let node = instance.status.and_then(|status| status.node_name);
        node.context("the instance's node")
    }

    /// PUT of a subresource as the user; the code and message of the answer.
    pub async fn put(&self, resource: &str, verb: &str, user: &str) -> Result<(u16, String)> {
        put(&self.outer.client, &self.path(resource, verb), user).await
    }

    /// GET of a subresource of the instance as the user; code and body of the answer.
    pub async fn told(&self, rest: &str, user: &str) -> Result<(u16, Value)> {
        let request = http::Request::get(self.path("virtualmachineinstances", rest))
            .header("impersonate-user", user)
            .body(kube::client::Body::empty())?;
        let response = self.outer.client.send(request).await?;
        let code = response.status().as_u16();
        let body = response.into_body().collect_bytes().await?;
        Ok((code, serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// The same, which must succeed.
    pub async fn ask(&self, resource: &str, verb: &str) -> Result<()> {
        println!("-- {}: {verb}", self.name);
        match self.put(resource, verb, USER).await? {
            (200 | 202, _) => Ok(()),
            (code, message) => bail!("{verb}: {code} {message}"),
        }
    }

    /// GET of a subresource of the instance as the user, which must succeed.
    pub async fn download(&self, path: &str) -> Result<Vec<u8>> {
        println!("-- {}: {path}", self.name);
        let request = http::Request::get(self.path("virtualmachineinstances", path)).header("impersonate-user", USER);
        let response = self
            .outer
            .client
            .send(request.body(kube::client::Body::empty())?)
            .await?;
        let code = response.status();
        let body = response.into_body().collect_bytes().await?;
        match code.is_success() {
            true => Ok(body.to_vec()),
            false => bail!("{path}: {code} {}", String::from_utf8_lossy(&body)),
        }
    }

    /// Opens a stream to the instance as this user.
    pub async fn stream(&self, path: &str, user: &str) -> Result<PlainStream, StreamError> {
        let path = self.path("virtualmachineinstances", path);
        let kubeconfig = self.outer.bed.kubeconfig();
        PlainStream::open(Path::new(&kubeconfig), &path, Some(user)).await
    }

    /// Waits until its guest says this on its console, or has said it in this run.
    pub async fn says(&self, text: &str) -> Result<()> {
        println!("-- {}: waiting: {text}", self.name);
        let launchers = self.outer.launchers(&self.namespace, &self.name).await?;
        // One that is left of a lost node still has a log there, which nobody answers for.
        let mut living = launchers.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        let launcher = living.next().context("a launcher")?.name_any();
        let logs = ["logs", "-n", &self.namespace, &launcher, "--tail=-1", "-f"];
        self.outer.follow(&logs, text).await
    }

    fn path(&self, resource: &str, rest: &str) -> String {
        format!("{BASE}/namespaces/{}/{resource}/{}/{rest}", self.namespace, self.name)
    }

    /// Deletes it and waits until it is gone.
    pub async fn delete(&self) -> Result<()> {
        let uid = self.api().get(&self.name).await?.uid().context("uid")?;
        self.api().delete(&self.name, &DeleteParams::default()).await?;
        let gone = kube::runtime::conditions::is_deleted(&uid);
        until(&self.api(), &self.name, "gone", gone).await.map(drop)
    }
}

async fn put(client: &Client, path: &str, user: &str) -> Result<(u16, String)> {
    let request = http::Request::put(path)
        .header("impersonate-user", user)
        .body(kube::client::Body::empty())?;
    let response = client.send(request).await?;
    let code = response.status().as_u16();
    let body = response.into_body().collect_bytes().await?;
    let status: Value = serde_json::from_slice(&body).unwrap_or_default();
    Ok((code, status["message"].as_str().unwrap_or_default().to_owned()))
}
