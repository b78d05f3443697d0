//! The command line of `kubernest-testbed`.
//!
//! It deliberately holds no logic of its own: each command is a function of the library.

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{Options, Progress, Testbed, bed::Error, clean, images, supervisor};

/// A real Kubernetes cluster of several nodes on this machine, for tests and for trying Kubernest.
///
/// Every node has its own network, processes and files, its own containerd and kubelet; the control plane runs beside
/// them. Nothing is installed on the machine and `down` leaves nothing behind. Needs root and the upstream programs
/// that `vm-images/components/build` makes.
///
///   kubernest-testbed up
///   export KUBECONFIG=$(kubernest-testbed kubeconfig)
///   kubectl get nodes
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
pub struct Args {
    /// The bed's name; beds with different names run side by side.
    #[arg(long, global = true, default_value = "dev", env = "KUBERNEST_TESTBED_NAME")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Raise the bed; done already, it changes nothing. Prints the kubeconfig's path.
    Up {
        /// How many nodes; a bed can grow, not shrink.
        #[arg(long, default_value_t = 2, env = "KUBERNEST_TESTBED_NODES")]
        nodes: usize,
        /// How many PersistentVolumes of 16Gi per node.
        #[arg(long, default_value_t = 12, env = "KUBERNEST_TESTBED_VOLUMES")]
        volumes: usize,
        /// The node, counted from 0, whose kubelet gives processors to one container alone; a number that no node has
        /// means none. A bed keeps it for its life.
        #[arg(long, default_value_t = 1, env = "KUBERNEST_TESTBED_STATIC_CPUS")]
        static_cpus: usize,
    },
    /// End the bed and remove all of it, also after a crash.
    Down,
    /// Show which beds there are and what runs of each.
    Status,
    /// Print the path of the administrator's kubeconfig.
    Kubeconfig,
    /// Print what a person would look at first when something is wrong: conditions, events, logs.
    Diagnose,
    /// Load OCI archives into all nodes; prints name@sha256:… of each, for pods to refer to.
    LoadImage {
        /// Files made by `buildah push <image> oci-archive:<file>:<name>` or the like.
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Load a small image for pods of tests (shell, coreutils, perl); prints its name.
    LoadTestbox,
    /// Do something to a node, counted from 0.
    #[command(subcommand)]
    Node(Node),
    /// Host names on this machine.
    #[command(subcommand)]
    Hosts(Hosts),
    /// Run a command inside a node: `exec-node 0 -- ip addr`.
    ExecNode {
        /// The node, counted from 0.
        node: usize,
        /// The command.
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Supervise a group of processes (started by `up`).
    #[command(hide = true)]
    RunGroup {
        /// The group's document.
        spec: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Node {
    /// Kill kubelet, containerd and kube-proxy; pods run on.
    Kill {
        /// The node, counted from 0.
        node: usize,
    },
    /// Pull the plug: everything on the node dies at once; its disk stays.
    Poweroff {
        /// The node, counted from 0.
        node: usize,
    },
    /// Cut the node off the network; everything on it runs on.
    Cut {
        /// The node, counted from 0.
        node: usize,
    },
    /// Undo any of these and wait until the node is Ready.
    Restore {
        /// The node, counted from 0.
        node: usize,
    },
}

#[derive(Debug, Subcommand)]
enum Hosts {
    /// Let a host name mean an address on this machine until `down`.
    Add {
        /// The address.
        ip: IpAddr,
        /// The host name.
        host: String,
    },
}

impl Args {
    /// Does what the command line asks for.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let name = self.name;
        match self.command {
            Command::Up {
                nodes,
                volumes,
                static_cpus,
            } => {
                let bed = Testbed::up(&Options {
                    name,
                    nodes,
                    volumes,
                    static_cpus: Some(static_cpus),
                    progress: Progress::Shown,
                })
                .await?;
                println!("{}", bed.kubeconfig().display());
            }
            Command::Down => {
                let remove = async { clean::down(&name).await.map_err(Error::from) };
                Progress::Shown.step(&format!("remove bed {name}"), remove).await?;
                let left = clean::leftovers(&name);
                anyhow::ensure!(left.is_empty(), "something is left:\n{}", left.join("\n"));
            }
            Command::Status => {
                for bed in clean::beds() {
                    println!("{bed}:\n  {}", clean::summary(&bed).await.join("\n  "));
                }
            }
            Command::Kubeconfig => println!("{}", Testbed::open(&name)?.kubeconfig().display()),
            Command::Diagnose => println!("{}", Testbed::open(&name)?.diagnose().await),
            Command::LoadImage { archives } => {
                let bed = Testbed::open(&name)?;
                for archive in archives {
                    let what = format!("load {}", archive.file_name().unwrap_or_default().to_string_lossy());
                    println!("{}", Progress::Shown.step(&what, bed.load_image(&archive)).await?);
                }
            }
            Command::LoadTestbox => {
                let bed = Testbed::open(&name)?;
                println!("{}", bed.load_image(&images::testbox().await?).await?);
            }
            Command::Node(what) => node(&Testbed::open(&name)?, what).await?,
            Command::Hosts(Hosts::Add { ip, host }) => Testbed::open(&name)?.add_host(ip, &host)?,
            Command::ExecNode { node, command } => return exec(&Testbed::open(&name)?, node, &command).await,
            Command::RunGroup { spec } => supervisor::run(&spec).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn node(bed: &Testbed, what: Node) -> Result<(), Error> {
    let step = Progress::Shown;
    match what {
        Node::Kill { node } => step.step(&format!("kill node {node}"), bed.kill_node(node)).await,
        Node::Poweroff { node } => step.step(&format!("power node {node} off"), bed.power_off(node)).await,
        Node::Cut { node } => {
            step.step(&format!("cut node {node} off the network"), bed.cut_network(node))
                .await
        }
        Node::Restore { node } => step.step(&format!("restore node {node}"), bed.restore(node)).await,
    }
}

/// Passes the command's own exit code on.
async fn exec(bed: &Testbed, node: usize, command: &[String]) -> anyhow::Result<ExitCode> {
    let argv = bed.node_command(node, command)?;
    let (program, args) = argv.split_first().map_or(("", [].as_slice()), |(p, a)| (p.as_str(), a));
    let status = tokio::process::Command::new(program).args(args).status().await;
    let status = status.map_err(|source| Error::Exec { node, source })?;
    Ok(status
        .code()
        .and_then(|c| u8::try_from(c).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
