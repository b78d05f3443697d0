//! [`Testbed`]: raises a bed, step by step; each step looks first whether it is done, so a second `up` is quick.
//!
//! It deliberately keeps nothing in memory that a later process would miss: an opened bed is as good as a raised one.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::try_join_all;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Node};
use kube::{Api, Client, runtime::wait::await_condition};

use crate::{
    clean, client,
    components::{self, Components},
    config, diagnose, fault, group, hosts, images, net,
    plan::{self, Group, Plan},
    progress::Progress,
    run::{self, run_fed},
    state::{self, Dir},
};

/// Why a bed could not be raised or used. Variants are named for the step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan.
    #[error(transparent)]
    Plan(#[from] plan::Error),
    /// Programs and packages.
    #[error(transparent)]
    Components(#[from] components::Error),
    /// The bed's directory.
    #[error(transparent)]
    State(#[from] state::Error),
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] crate::pki::Error),
    /// Namespaces, links and routes.
    #[error(transparent)]
    Network(#[from] net::Error),
    /// Process groups.
    #[error(transparent)]
    Group(#[from] group::Error),
    /// Images.
    #[error(transparent)]
    Images(#[from] images::Error),
    /// The client.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// Taking the bed down.
    #[error(transparent)]
    Clean(#[from] clean::Error),
    /// /etc/hosts.
    #[error(transparent)]
    Hosts(#[from] hosts::Error),
    /// The API server did not become ready.
    #[error("the API server is not ready after {seconds} s: see {log}")]
    ApiServer {
        /// How long was waited.
        seconds: u64,
        /// Its log.
        log: String,
    },
    /// The first objects were refused.
    #[error("cannot apply the cluster's own objects")]
    Apply(#[source] run::Error),
    /// A node could not be given its pod network.
    #[error("cannot set the pod network of {node}")]
    PodCidr {
        /// The node.
        node: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// Something did not become ready.
    #[error("{what} is not ready after {seconds} s: see {logs}")]
    NotReady {
        /// What.
        what: String,
        /// How long was waited.
        seconds: u64,
        /// The directory of logs.
        logs: String,
    },
    /// The API server could not be watched.
    #[error("cannot watch {what}")]
    Watch {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: Box<kube::runtime::wait::Error>,
    },
    /// A command in a node failed.
    #[error("cannot run a command in node {node}")]
    Exec {
        /// The node.
        node: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What bed is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name: a short DNS label. Beds with different names do not meet.
    pub name: String,
    /// How many nodes.
    pub nodes: usize,
    /// How many PersistentVolumes of 16Gi each node offers. They are directories and reserve nothing.
    pub volumes: usize,
    /// The node whose kubelet gives processors to one container alone, all but one; counted from 0. A machine with one
    /// processor has none to give.
    pub static_cpus: Option<usize>,
    /// Whether steps are shown on standard error.
    pub progress: Progress,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "dev".into(),
            nodes: 2,
            volumes: 12,
            static_cpus: Some(1),
            progress: Progress::Silent,
        }
    }
}

/// A bed that has been raised.
#[derive(Debug, Clone)]
pub struct Testbed {
    pub(crate) plan: Plan,
    pub(crate) dir: Dir,
    pub(crate) components: Components,
}

const API_SECONDS: u64 = 90;
const READY_SECONDS: u64 = 180;

impl Testbed {
    /// Raises the bed, or completes it, or finds that nothing is to be done.
    pub async fn up(options: &Options) -> Result<Self, Error> {
        // Boxed, as callers' futures hold it: unoptimized it is larger than some threads' stacks.
        Box::pin(Self::raise(options)).await
    }

    async fn raise(options: &Options) -> Result<Self, Error> {
        let Options {
            name,
            nodes,
            volumes,
            static_cpus,
            progress,
        } = options;
        let several = std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1);
        let static_cpus = static_cpus.filter(|_| several);
        let components = Components::find()?;
        let dir = Dir::of(name)?;
        let busy = net::busy_slots().await;
        let plan = {
            let _lock = state::lock()?;
            dir.claim(name, *nodes, *volumes, static_cpus, |plan| !busy.contains(&plan.slot()))?
        };
        let _bed_lock = dir.lock()?;
        clean::save_sysctls(&dir)?;
        let bed = Self { plan, dir, components };
        let step = *progress;
        step.step("certificates, programs and images of the bed itself", bed.prepare())
            .await?;
        step.step("network of the control plane", async {
            net::ensure_hub(&bed.plan).await
        })
        .await?;
        let spec = config::control(&bed.plan, &bed.dir, &bed.components);
        group::start(&bed.plan, &bed.dir, Group::Control, &spec).await?;
        let boot = async { try_join_all((0..bed.plan.nodes()).map(|i| bed.boot(i))).await };
        let ready = step.step("etcd and API server", bed.await_api());
        let (_, client) = tokio::try_join!(step.step("nodes: network, containerd, images", boot), ready)?;
        net::ensure_routes(&bed.plan).await?;
        step.step("DNS, Multus, storage class, volumes", bed.apply()).await?;
        step.step("nodes ready", bed.await_nodes(&client)).await?;
        step.step("DNS ready", bed.await_dns(&client)).await?;
        Ok(bed)
    }

    /// Opens a bed that was raised before.
    pub fn open(name: &str) -> Result<Self, Error> {
        let dir = Dir::of(name)?;
        let plan = dir.load()?;
        Ok(Self {
            plan,
            dir,
            components: Components::find()?,
        })
    }

    /// The plan: names and addresses.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The administrator's kubeconfig. Its server is reached from this machine, every node and every pod.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.kubeconfig()
    }

    /// The absolute path of `kubectl`, of the bed's own version.
    pub fn kubectl(&self) -> PathBuf {
        self.components.kubernetes("kubectl")
    }

    /// What service accounts wrote to the API server: one audit event, without bodies, a line.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.audit_log()
    }

    /// A client with all rights.
    pub async fn client(&self) -> Result<Client, Error> {
        Ok(client::connect(&self.kubeconfig()).await?)
    }

    /// Loads an OCI archive into every node that lacks it; returns `name@sha256:…`, by which pods refer to it.
    pub async fn load_image(&self, archive: &Path) -> Result<String, Error> {
        let _lock = self.dir.lock()?;
        Ok(Box::pin(images::load(&self.plan, &self.components, archive)).await?)
    }

    /// Loads the image for pods of tests (a shell, coreutils, perl); returns its digest reference.
    pub async fn load_testbox(&self) -> Result<String, Error> {
        self.load_image(&images::testbox().await?).await
    }

    /// Kills kubelet, containerd and kube-proxy of node `i`; its pods run on, its network works.
    pub async fn kill_node(&self, i: usize) -> Result<(), Error> {
        Box::pin(fault::kill(self, i)).await
    }

    /// Pulls the plug of node `i`: every process dies at once, its links and /run are gone; its disk stays.
    pub async fn power_off(&self, i: usize) -> Result<(), Error> {
        Box::pin(fault::power_off(self, i)).await
    }

    /// Cuts node `i` off the network; everything on it runs on.
    pub async fn cut_network(&self, i: usize) -> Result<(), Error> {
        Box::pin(fault::cut(self, i)).await
    }

    /// Undoes whatever was done to node `i` and returns when it is Ready.
    pub async fn restore(&self, i: usize) -> Result<(), Error> {
        Box::pin(fault::restore(self, i)).await
    }

    /// Ends the bed and removes all of it.
    pub async fn down(self) -> Result<(), Error> {
        Ok(Box::pin(clean::down(self.plan.name())).await?)
    }

    /// What of this bed is still there: processes, namespaces, links, mounts, cgroups, lines of /etc/hosts, files.
    pub fn leftovers(&self) -> Vec<String> {
        clean::leftovers(self.plan.name())
    }

    /// Conditions, events and logs of whatever is not well, for the output of a failing test.
    pub async fn diagnose(&self) -> String {
        Box::pin(diagnose::report(self)).await
    }

    /// Lets `host` mean `ip` on this machine until the bed is taken down.
    pub fn add_host(&self, ip: std::net::IpAddr, host: &str) -> Result<(), Error> {
        Ok(hosts::add(self.plan.name(), ip, host)?)
    }

    /// The command line that runs `argv` inside node `i`: its files, network, processes and host name.
    pub fn node_command(&self, i: usize, argv: &[String]) -> Result<Vec<String>, Error> {
        self.plan.check_node(i)?;
        let pid = group::supervisor(&self.plan, Group::Node(i)).ok_or_else(|| group::Error::NotRunning {
            group: Group::Node(i).dir(),
        })?;
        let enter = [
            "nsenter",
            "--target",
            &pid.to_string(),
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--wd=/",
            "--",
        ];
        Ok(enter
            .iter()
            .map(|s| (*s).to_owned())
            .chain(argv.iter().cloned())
            .collect())
    }

    async fn prepare(&self) -> Result<(), Error> {
        crate::pki::ensure(&self.dir.pki(), &self.plan)?;
        let admin = self.dir.pki().join("admin.kubeconfig");
        let text = fs::read(&admin).map_err(state::io_error("read", &admin))?;
        state::write_if_changed(&self.dir.kubeconfig(), &text)?;
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(self.dir.kubeconfig(), fs::Permissions::from_mode(0o600))
            .map_err(state::io_error("close", &self.dir.kubeconfig()))?;
        state::write_if_changed(&self.dir.audit_policy(), config::audit_policy().as_bytes())?;
        self.keep_program()?;
        images::own(&self.components).await?;
        Ok(())
    }

    async fn await_api(&self) -> Result<Client, Error> {
        let client = self.client().await?;
        for _ in 0..API_SECONDS * 10 {
            let request = http_get("/readyz");
            if let Ok(request) = request
                && client.request_text(request).await.is_ok()
            {
                return Ok(client);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let log = self.dir.logs().join("kube-apiserver.log").display().to_string();
        Err(Error::ApiServer {
            seconds: API_SECONDS,
            log,
        })
    }

    /// Applies the cluster's own objects once; again only when they differ from what was applied.
    async fn apply(&self) -> Result<(), Error> {
        let manifests = config::manifests(&self.plan, &self.dir);
        let applied = self.dir.path().join("applied.yaml");
        if fs::read(&applied).is_ok_and(|old| old == manifests.as_bytes()) {
            return Ok(());
        }
        let kubectl = self.kubectl().display().to_string();
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        let cache = format!("--cache-dir={}", self.dir.path().join("kubectl").display());
        let argv = [
            &kubectl,
            &kubeconfig,
            &cache,
            "apply",
            "--server-side",
            "--force-conflicts",
            "--field-manager=kubernest-testbed",
            "-f",
            "-",
        ];
        run_fed(&argv, manifests.as_bytes()).await.map_err(Error::Apply)?;
        state::write_if_changed(&applied, manifests.as_bytes())?;
        Ok(())
    }

    async fn await_nodes(&self, client: &Client) -> Result<(), Error> {
        try_join_all((0..self.plan.nodes()).map(|i| self.await_node(client, i)))
            .await
            .map(drop)
    }

    /// Waits until node `i` is Ready and gives it its pod network.
    pub(crate) async fn await_node(&self, client: &Client, i: usize) -> Result<(), Error> {
        let api: Api<Node> = Api::all(client.clone());
        let name = self.plan.node_name(i);
        let ready = await_condition(api.clone(), &name, |node: Option<&Node>| {
            node.is_some_and(diagnose::node_ready)
        });
        let node = self.within(&format!("node {name}"), ready).await?;
        if node.and_then(|n| n.spec?.pod_cidr).is_none() {
            let cidr = self.plan.pod_cidr(i);
            let patch = serde_json::json!({"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}});
            api.patch(
                &name,
                &kube::api::PatchParams::default(),
                &kube::api::Patch::Merge(patch),
            )
            .await
            .map_err(|source| Error::PodCidr {
                node: name,
                source: Box::new(source),
            })?;
        }
        Ok(())
    }

    async fn await_dns(&self, client: &Client) -> Result<(), Error> {
        let api: Api<Deployment> = Api::namespaced(client.clone(), "kube-system");
        let available = await_condition(api, "coredns", |d: Option<&Deployment>| {
            d.is_some_and(diagnose::available)
        });
        self.within("CoreDNS", available).await.map(drop)
    }

    pub(crate) async fn within<T>(
        &self,
        what: &str,
        wait: impl Future<Output = Result<T, kube::runtime::wait::Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(Duration::from_secs(READY_SECONDS), wait).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(source)) => Err(Error::Watch {
                what: what.into(),
                source: Box::new(source),
            }),
            Err(_) => Err(self.not_ready(what.into(), READY_SECONDS)),
        }
    }

    pub(crate) fn not_ready(&self, what: String, seconds: u64) -> Error {
        Error::NotReady {
            what,
            seconds,
            logs: self.dir.logs().display().to_string(),
        }
    }
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>, http::Error> {
    http::Request::get(path).body(Vec::new())
}
