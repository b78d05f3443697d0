//! Finds the upstream programs that a bed runs and says which build or package brings a missing one.
//!
//! It deliberately builds and installs nothing: `vm-images/components/build` and the machine's package manager do.

use std::path::{Path, PathBuf};

/// Why a bed cannot run on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An upstream program has not been built.
    #[error("{program} is not in {dir}: run `vm-images/components/build {component}` (or `make components`)")]
    NotBuilt {
        /// The program.
        program: &'static str,
        /// The component that brings it.
        component: &'static str,
        /// Where it was looked for.
        dir: String,
    },
    /// A Debian package is missing.
    #[error("{program} is not on this machine: install the Debian package {package}")]
    NoPackage {
        /// The program or file.
        program: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// The caller is not root.
    #[error("the test bed makes network namespaces, mounts and cgroups: run it as root")]
    NotRoot,
    /// There is no directory to keep beds in.
    #[error("neither KUBERNEST_CACHE, XDG_CACHE_HOME nor HOME is set: there is no place to keep the bed")]
    NoCache,
    /// The `kubernest-testbed` program is needed to supervise the bed and was not found.
    #[error(
        "the program kubernest-testbed is not beside {0}: run `cargo build -p kubernest-testbed` or set KUBERNEST_TESTBED_BIN"
    )]
    NoSelf(String),
}

/// The Kubernetes version of the outer cluster.
pub const KUBERNETES: &str = "kubernetes-v1.35.4";

/// Programs that are built from source: (component, program).
const BUILT: &[(&str, &str)] = &[
    ("etcd", "etcd"),
    (KUBERNETES, "kube-apiserver"),
    (KUBERNETES, "kube-controller-manager"),
    (KUBERNETES, "kube-scheduler"),
    (KUBERNETES, "kubelet"),
    (KUBERNETES, "kube-proxy"),
    (KUBERNETES, "kubectl"),
    ("containerd", "containerd"),
    ("containerd", "containerd-shim-runc-v2"),
    ("containerd", "ctr"),
    ("multus", "multus"),
    ("coredns", "coredns"),
];

/// Programs of Debian packages: (program, package).
const PACKAGED: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("runc", "runc"),
    ("catatonit", "catatonit"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("setsid", "util-linux"),
    ("mount", "mount"),
    ("tar", "tar"),
];

/// Debian's directories of CNI plugins; other distributions use the second.
const CNI_DIRS: &[&str] = &["/usr/lib/cni", "/opt/cni/bin"];

/// Where the programs are. Building one proves that all are there.
#[derive(Debug, Clone)]
pub struct Components {
    root: PathBuf,
    cni: PathBuf,
    own: PathBuf,
}

impl Components {
    /// Looks for every program that a bed needs.
    pub fn find() -> Result<Self, Error> {
        if !nix::unistd::Uid::effective().is_root() {
            return Err(Error::NotRoot);
        }
        let root = cache_dir()?.join("components");
        for (component, program) in BUILT {
            let dir = root.join(component).join("bin");
            if !dir.join(program).exists() {
                return Err(Error::NotBuilt {
                    program,
                    component,
                    dir: dir.display().to_string(),
                });
            }
        }
        for (program, package) in PACKAGED {
            if which(program).is_none() {
                return Err(Error::NoPackage { program, package });
            }
        }
        let cni = CNI_DIRS
            .iter()
            .map(Path::new)
            .find(|d| d.join("ptp").exists() && d.join("host-local").exists());
        let cni = cni.ok_or(Error::NoPackage {
            program: "the CNI plugin ptp",
            package: "containernetworking-plugins",
        })?;
        Ok(Self {
            root,
            cni: cni.into(),
            own: own_program()?,
        })
    }

    /// The absolute path of a built program.
    pub fn path(&self, component: &str, program: &str) -> PathBuf {
        self.root.join(component).join("bin").join(program)
    }

    /// The absolute path of a program of Kubernetes.
    pub fn kubernetes(&self, program: &str) -> PathBuf {
        self.path(KUBERNETES, program)
    }

    /// The directory of the CNI reference plugins.
    pub fn cni(&self) -> &Path {
        &self.cni
    }

    /// The program `kubernest-testbed` itself.
    pub fn own(&self) -> &Path {
        &self.own
    }

    /// The PATH of a bed's processes: containerd finds its shim and runc there, kube-proxy nft.
    pub fn search_path(&self) -> String {
        let shim = self.root.join("containerd/bin");
        format!(
            "{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            shim.display()
        )
    }
}

/// `$KUBERNEST_CACHE`, `$XDG_CACHE_HOME/kubernest` or `~/.cache/kubernest`.
pub fn cache_dir() -> Result<PathBuf, Error> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("KUBERNEST_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("kubernest")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/kubernest")))
        .ok_or(Error::NoCache)
}

/// The absolute path of a program on the PATH or in the directories of system programs.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}

/// A test that uses the library is another program, so the supervisor is looked for beside it, where cargo puts it.
fn own_program() -> Result<PathBuf, Error> {
    const NAME: &str = "kubernest-testbed";
    if let Some(path) = std::env::var_os("KUBERNEST_TESTBED_BIN")
        .map(PathBuf::from)
        .filter(|p| p.is_file())
    {
        return Ok(path);
    }
    let me = std::env::current_exe().unwrap_or_default();
    let beside = me.parent().map(|d| d.join(NAME));
    let above = me.parent().and_then(Path::parent).map(|d| d.join(NAME));
    [Some(me.clone()).filter(|p| p.ends_with(NAME)), beside, above]
        .into_iter()
        .flatten()
        .find(|p| p.is_file())
        .ok_or_else(|| Error::NoSelf(me.display().to_string()))
}
