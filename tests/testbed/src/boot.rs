//! Brings one node up: its network namespace, its files, its processes and the images it must have.
//!
//! It deliberately does not ask Kubernetes anything: a node boots while there is no API server yet.

use std::{fs, path::Path, time::Duration};

use crate::{
    bed::{Error, Testbed},
    config, group, images, net, oci,
    plan::Group,
    state,
};

/// The reference plugins that a node has, as an installer of Kubernetes would bring.
const CNI_PLUGINS: &[&str] = &[
    "bridge",
    "host-local",
    "loopback",
    "macvlan",
    "portmap",
    "ptp",
    "static",
    "tuning",
];

impl Testbed {
    /// Brings node `i` up: namespace, files, processes, the bed's own images.
    pub(crate) async fn boot(&self, i: usize) -> Result<(), Error> {
        net::ensure_node(&self.plan, i).await?;
        if group::supervisor(&self.plan, Group::Node(i)).is_none() {
            self.write_node(i)?;
            net::ensure_routes(&self.plan).await?;
        }
        let spec = config::node(&self.plan, &self.dir, &self.components, i);
        group::start(&self.plan, &self.dir, Group::Node(i), &spec).await?;
        self.make_volumes(i)?;
        self.await_containerd(i).await?;
        for archive in images::own(&self.components).await? {
            let image = oci::inspect(&archive).await.map_err(images::Error::from)?;
            images::load_on(&self.plan, &self.components, i, &archive, &image).await?;
        }
        Ok(())
    }

    fn write_node(&self, i: usize) -> Result<(), Error> {
        let root = self.dir.group(Group::Node(i));
        let multus = self.dir.pki().join("multus.kubeconfig");
        let kubeconfig = fs::read_to_string(&multus).map_err(state::io_error("read", &multus))?;
        for (file, text) in config::node_files(&self.plan, &self.dir, i, kubeconfig) {
            state::write_if_changed(&root.join(file), text.as_bytes())?;
        }
        let bin = root.join("opt/cni/bin");
        fs::create_dir_all(&bin).map_err(state::io_error("make", &bin))?;
        let plugins = CNI_PLUGINS.iter().map(|p| self.components.cni().join(p));
        for plugin in plugins.chain([self.components.path("multus", "multus")]) {
            let to = bin.join(plugin.file_name().unwrap_or_default());
            // Copies, not links: pods write to a node's /opt, and see no other directory in it.
            if !to.exists() {
                fs::copy(&plugin, &to).map_err(state::io_error("copy a plugin to", &to))?;
            }
        }
        Ok(())
    }

    fn make_volumes(&self, i: usize) -> Result<(), Error> {
        for v in 0..self.plan.volumes() {
            let dir = self.dir.volumes(i).join(config::volume_dir(v));
            fs::create_dir_all(&dir).map_err(state::io_error("make", &dir))?;
        }
        Ok(())
    }

    async fn await_containerd(&self, i: usize) -> Result<(), Error> {
        let group = Group::Node(i);
        for _ in 0..600 {
            if let Some(pid) = group::supervisor(&self.plan, group) {
                let socket = format!("/proc/{pid}/root{}", config::CONTAINERD_SOCKET);
                if tokio::net::UnixStream::connect(socket).await.is_ok() {
                    return Ok(());
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(self.not_ready(format!("containerd of node {i}"), 30))
    }

    /// A hard link where possible: cargo replaces the file, so the link keeps what it was.
    pub(crate) fn keep_program(&self) -> Result<(), Error> {
        let (from, to) = (self.components.own(), self.dir.program());
        if from != to && !same_file(from, &to) {
            let parent = self.dir.path().join("bin");
            fs::create_dir_all(&parent).map_err(state::io_error("make", &parent))?;
            fs::remove_file(&to).ok();
            if fs::hard_link(from, &to).is_err() {
                fs::copy(from, &to).map_err(state::io_error("copy the program to", &to))?;
            }
        }
        Ok(())
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    matches!((fs::metadata(a), fs::metadata(b)), (Ok(a), Ok(b)) if a.ino() == b.ino() && a.dev() == b.dev())
}
