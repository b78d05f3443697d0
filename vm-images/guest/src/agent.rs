//! The guest's one loop: carry out the bootstrap share, then look every second at what may have changed.
//!
//! ```text
//! mount share → names, addresses → data disk → files → stage 1 → … → stage n → at rest
//!                                       ▲                                        │
//!                                       └──────────── share changed ─────────────┘
//! ```
//!
//! It keeps no state of its own: what is done is seen from the files, mounts and units themselves, so that it can be
//! killed and started again at any point.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kubernest_bootstrap::{DATA_PATH, NodeConfig, SHARE_PATH};

use crate::console::{Console, chain};
use crate::files::{self, FileError};
use crate::probe::{Answer, Probe, ProbeError};
use crate::share::{Bootstrap, Share, ShareError, Stamp};
use crate::units::{self, UnitError};
use crate::{cni, disk, network, power, store, system};

/// Between two looks; a look is a system call or two.
const TICK: Duration = Duration::from_secs(1);
/// Between two looks at the share, in ticks. The kubelet of the outer node itself takes up to a minute.
const SHARE_TICKS: u64 = 10;
/// Between two looks at the units, in ticks: while a stage waits, and at rest.
const UNITS_TICKS_WAITING: u64 = 15;
const UNITS_TICKS_RESTING: u64 = 60;
/// Between two lines about the same thing that is waited for, in ticks.
const REPEAT_TICKS: u64 = 30;

/// Exists once files were written since boot: before that no unit runs that would have to be restarted.
const APPLIED: &str = "/run/kubernest/applied";

/// Makes this machine the node that its bootstrap share describes.
#[derive(Parser)]
#[command(version, about)]
pub struct Args {
    /// Where the bootstrap share is mounted.
    #[arg(long, env = "KUBERNEST_SHARE", default_value = SHARE_PATH)]
    share: PathBuf,
    /// Where the data disk is mounted.
    #[arg(long, env = "KUBERNEST_DATA", default_value = DATA_PATH)]
    data: PathBuf,
    /// Preloaded container images, as a containerd root prepared when the node image was built.
    #[arg(long, env = "KUBERNEST_IMAGES", default_value = "/usr/share/kubernest/containerd")]
    images: PathBuf,
    /// Terminal that progress is told on.
    #[arg(long, env = "KUBERNEST_CONSOLE", default_value = "/dev/ttyS0")]
    console: PathBuf,
}

/// Which step failed.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    System(#[from] system::SystemError),
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error("cannot write the node's files")]
    Files(#[from] FileError),
    #[error("stage {stage:?} cannot be waited for")]
    Probe { stage: String, source: ProbeError },
    #[error(transparent)]
    Units(#[from] UnitError),
}

/// Runs until the machine goes down; returns only when a step failed, for systemd to start it again.
pub fn run(args: Args) -> ExitCode {
    let console = Console::open(&args.console);
    power::watch(console.clone());
    let Err(error) = boot(&args, &console);
    console.complain("agent", &error);
    ExitCode::FAILURE
}

fn boot(args: &Args, console: &Console) -> Result<Infallible, AgentError> {
    let share = Share::mount(&args.share)?;
    let (stamp, bootstrap) = share.read()?;
    let config = &bootstrap.config;
    console.say(
        "share",
        &format!(
            "node {}, {} files, {} s after boot",
            config.hostname,
            config.files.len(),
            uptime()
        ),
    );

    system::set_hostname(&config.hostname)?;
    network::write_hosts(config)?;
    let dynamic = network::configure(config)?;
    let addresses: Vec<&str> = config
        .interfaces
        .iter()
        .map(|interface| interface.address.as_str())
        .collect();
    console.say("network", &addresses.join(", "));

    let blank = disk::prepare(&args.data)?;
    console.say(
        "disk",
        if blank {
            "blank data disk formatted"
        } else {
            "data disk mounted"
        },
    );
    store::seed(&args.images, &args.data.join("containerd"))?;
    system::prepare()?;

    let mut agent = Agent {
        console,
        share,
        stamp,
        stages: Stages::default(),
        watch: units::Watch::default(),
        config: None,
    };
    agent.apply(bootstrap)?;
    if dynamic {
        units::start(&[network::DHCP_UNIT.to_owned()])?;
    }
    agent.serve()
}

/// What the loop carries from look to look.
struct Agent<'a> {
    console: &'a Console,
    share: Share,
    stamp: Stamp,
    config: Option<NodeConfig>,
    stages: Stages,
    watch: units::Watch,
}

/// How far the stages are.
#[derive(Default)]
struct Stages {
    done: usize,
    started: bool,
    probe: Option<Probe>,
    /// Why the present stage is not done.
    waiting: Option<String>,
}

impl Agent<'_> {
    /// Carries out one state of the share: writes what differs, restarts who reads it, and starts what is new.
    fn apply(&mut self, bootstrap: Bootstrap) -> Result<(), AgentError> {
        let restart = write(&bootstrap)?;
        let first = !Path::new(APPLIED).exists();
        files::write(Path::new(APPLIED), b"", 0o600)?;
        if let Some(before) = self.config.as_ref() {
            network::write_hosts(&bootstrap.config)?;
            if before.hostname != bootstrap.config.hostname || before.interfaces != bootstrap.config.interfaces {
                self.console
                    .say("share", "host name and interfaces change at the next boot");
            }
        }
        if !first && !restart.is_empty() {
            self.console.say("restart", &restart.join(", "));
            units::restart(&restart)?;
        }
        if self
            .config
            .as_ref()
            .is_none_or(|before| before.stages != bootstrap.config.stages)
        {
            self.stages = Stages::default();
        }
        self.config = Some(bootstrap.config);
        self.advance()
    }

    fn serve(&mut self) -> Result<Infallible, AgentError> {
        let mut complaint = String::new();
        let mut tick = 0_u64;
        loop {
            tick += 1;
            std::thread::sleep(TICK);
            let refreshed = if tick.is_multiple_of(SHARE_TICKS) {
                self.refresh()
            } else {
                Ok(())
            };
            if let Err(error) = refreshed.and_then(|()| self.advance()) {
                // The document may be mended at any time, so a bad one is no reason to end.
                let text = chain(&error);
                if text != complaint {
                    self.console.complain("share", &error);
                }
                complaint = text;
            } else {
                complaint.clear();
            }
            self.refresh_cni(tick);
            self.look_at_units(tick);
        }
    }

    fn refresh(&mut self) -> Result<(), AgentError> {
        if self.share.stamp() == self.stamp {
            return Ok(());
        }
        let (stamp, bootstrap) = self.share.read()?;
        self.console.say("share", "changed");
        self.apply(bootstrap)?;
        self.stamp = stamp;
        Ok(())
    }

    fn refresh_cni(&self, tick: u64) {
        let Some(config) = &self.config else { return };
        match cni::refresh(&config.cni) {
            Ok(true) => self.console.say("cni", "pod network configured"),
            Ok(false) => {}
            Err(error) if tick.is_multiple_of(REPEAT_TICKS) => self.console.complain("cni", &error),
            Err(_) => {}
        }
    }

    fn look_at_units(&mut self, tick: u64) {
        let period = if self.stages.waiting.is_some() {
            UNITS_TICKS_WAITING
        } else {
            UNITS_TICKS_RESTING
        };
        if let Some(why) = self
            .stages
            .waiting
            .as_ref()
            .filter(|_| tick.is_multiple_of(REPEAT_TICKS))
        {
            self.console.say("waiting", why);
        }
        let Some(config) = self.config.as_ref().filter(|_| tick.is_multiple_of(period)) else {
            return;
        };
        let started = self.stages.done + usize::from(self.stages.started);
        let units: Vec<String> = config
            .stages
            .iter()
            .take(started)
            .flat_map(|stage| stage.units.clone())
            .collect();
        match self.watch.look(&units) {
            Ok(failures) => {
                for failure in failures {
                    self.console.say(&failure.unit, &format!("FAILED: {}", failure.what));
                    for line in units::last_words(&failure.unit) {
                        self.console.say(&failure.unit, &line);
                    }
                }
            }
            Err(error) => self.console.complain("units", &error),
        }
    }

    /// Starts stages until one has to be waited for.
    fn advance(&mut self) -> Result<(), AgentError> {
        let Some(config) = &self.config else { return Ok(()) };
        while let Some(stage) = config.stages.get(self.stages.done) {
            if !self.stages.started {
                self.console
                    .say("stage", &format!("{}: starting {}", stage.name, stage.units.join(", ")));
                units::start(&stage.units)?;
                self.stages.started = true;
            }
            if let Some(wait) = &stage.wait_for {
                let probe = match &mut self.stages.probe {
                    Some(probe) => probe,
                    none => none.insert(Probe::new(wait).map_err(|source| AgentError::Probe {
                        stage: stage.name.clone(),
                        source,
                    })?),
                };
                if let Answer::NotYet(why) = probe.ask() {
                    self.stages.waiting = Some(format!("{}: {} does not answer yet: {why}", stage.name, wait.url));
                    return Ok(());
                }
                self.console
                    .say("stage", &format!("{}: ready, {} s after boot", stage.name, uptime()));
            }
            self.stages = Stages {
                done: self.stages.done + 1,
                ..Stages::default()
            };
            if self.stages.done == config.stages.len() {
                self.console
                    .say("done", &format!("all stages started, {} s after boot", uptime()));
            }
        }
        Ok(())
    }
}

/// Writes the document's files and returns the units that read one that changed.
fn write(bootstrap: &Bootstrap) -> Result<Vec<String>, FileError> {
    // All of the document is understood before any of it is carried out.
    let mut files = Vec::new();
    for file in &bootstrap.config.files {
        let content = bootstrap.contents.get(&file.key).map(Vec::as_slice).unwrap_or_default();
        files.push((
            files::parse_path(&file.path)?,
            files::parse_mode(&file.mode)?,
            content,
            &file.restart,
        ));
    }
    let mut restart = BTreeSet::new();
    for (path, mode, content, units) in files {
        if files::write(&path, content, mode)? {
            restart.extend(units.iter().cloned());
        }
    }
    Ok(restart.into_iter().collect())
}

/// Whole seconds since the kernel started.
fn uptime() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split('.')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kubernest_bootstrap::{API_VERSION, Cni, File};

    use super::*;

    fn bootstrap(folder: &Path, content: &[u8], mode: &str) -> Bootstrap {
        let file = |name: &str, mode: &str, restart: &[&str]| File {
            path: folder.join(name).to_str().unwrap().to_owned(),
            key: name.to_owned(),
            mode: mode.to_owned(),
            restart: restart.iter().map(|&unit| unit.to_owned()).collect(),
        };
        let config = NodeConfig {
            api_version: API_VERSION.to_owned(),
            hostname: "node".to_owned(),
            interfaces: Vec::new(),
            hosts: Vec::new(),
            files: vec![
                file("same", "0644", &["a.service"]),
                file("key", mode, &["b.service", "c.service"]),
                file("ca", "0644", &[]),
            ],
            stages: Vec::new(),
            cni: Cni::Flannel,
        };
        let contents = BTreeMap::from([
            ("same".to_owned(), b"same".to_vec()),
            ("key".to_owned(), content.to_vec()),
            ("ca".to_owned(), content.to_vec()),
        ]);
        Bootstrap { config, contents }
    }

    #[test]
    fn agent_write_restarts_only_readers_of_what_changed() {
        let folder = tempfile::tempdir().unwrap();
        let all = write(&bootstrap(folder.path(), b"one", "0600")).unwrap();
        assert_eq!(all, ["a.service", "b.service", "c.service"]);
        assert!(write(&bootstrap(folder.path(), b"one", "0600")).unwrap().is_empty());
        assert_eq!(
            write(&bootstrap(folder.path(), b"two", "0600")).unwrap(),
            ["b.service", "c.service"]
        );
    }

    #[test]
    fn agent_write_touches_nothing_when_part_of_the_document_is_malformed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write(&bootstrap(folder.path(), b"one", "rw")).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
