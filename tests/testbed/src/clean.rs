//! Takes a bed down and finds what is left of one, also after a crash and without its directory.
//!
//! Everything a bed makes carries its name: cgroups, namespaces, the alias of the link, the mark in /etc/hosts. It
//! deliberately asks the kernel, not the bed's own files, and never touches what carries another name.

use std::{fs, path::Path};

use crate::{
    cgroup, group, hosts, net,
    plan::{self, Group},
    run::{self, sh},
    state::{self, Dir},
};

/// Why something could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Processes or cgroups.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// Namespaces.
    #[error(transparent)]
    Network(#[from] net::Error),
    /// The link in the machine's namespace.
    #[error("cannot remove the link {link}")]
    Link {
        /// Its name.
        link: String,
        /// Why.
        #[source]
        source: run::Error,
    },
    /// /etc/hosts.
    #[error(transparent)]
    Hosts(#[from] hosts::Error),
    /// The directory.
    #[error(transparent)]
    State(#[from] state::Error),
}

/// What kubelets set for the whole machine (pkg/kubelet/cm setupKernelTunables).
const SYSCTLS: &[&str] = &[
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
/// Kubelets, containerds and pods each hold a few inotify instances; the kernel's 128 per user is soon used up.
const INOTIFY: &str = "fs/inotify/max_user_instances";
/// Where the settings that the first bed found are kept, in each bed's directory.
const SAVED: &str = "sysctls.json";
const INOTIFY_NEEDED: u32 = 8192;

/// Notes the settings that kubelets change for the whole machine, once, and raises the number of inotify instances.
pub(crate) fn save_sysctls(dir: &Dir) -> Result<(), state::Error> {
    let file = dir.path().join(SAVED);
    if !file.exists() {
        // A bed beside this one was first to change them: what it found is what the last one shall put back.
        let beside = state::all()?
            .iter()
            .find_map(|p| fs::read(Dir::of(p.name()).ok()?.path().join(SAVED)).ok());
        let now = || {
            let old: Vec<(&str, String)> = SYSCTLS
                .iter()
                .chain([&INOTIFY])
                .filter_map(|s| Some((*s, fs::read_to_string(Path::new("/proc/sys").join(s)).ok()?)))
                .collect();
            serde_json::to_vec_pretty(&old).unwrap_or_default()
        };
        state::write_if_changed(&file, &beside.unwrap_or_else(now))?;
    }
    let inotify = Path::new("/proc/sys").join(INOTIFY);
    let now = fs::read_to_string(&inotify)
        .ok()
        .and_then(|v| v.trim().parse::<u32>().ok());
    if now.is_some_and(|now| now < INOTIFY_NEEDED) {
        fs::write(&inotify, INOTIFY_NEEDED.to_string()).map_err(state::io_error("raise", &inotify))?;
    }
    Ok(())
}

/// The last bed to go puts the settings back that the first found; settings that are gone cannot be put back.
fn restore_sysctls(dir: &Dir, name: &str) {
    let others = cgroup::beds().into_iter().any(|bed| bed != name);
    let Ok(text) = fs::read(dir.path().join(SAVED)) else {
        return;
    };
    let old: Vec<(String, String)> = serde_json::from_slice(&text).unwrap_or_default();
    for (sysctl, value) in old
        .iter()
        .filter(|(s, _)| !others && (s == INOTIFY || SYSCTLS.contains(&s.as_str())))
    {
        fs::write(Path::new("/proc/sys").join(sysctl), value.trim()).ok();
    }
}

/// Removes all of a bed; nothing to do is success.
pub async fn down(name: &str) -> Result<(), Error> {
    let dir = Dir::of(name)?;
    let _lock = state::lock()?;
    cgroup::kill_all(name, "").await?;
    for netns in net::namespaces(name) {
        net::remove_netns(&netns).await?;
    }
    for link in net::host_links(name) {
        sh(&format!("ip link del {link}"))
            .await
            .map_err(|source| Error::Link { link, source })?;
    }
    cgroup::remove(name, "").await?;
    hosts::remove(name)?;
    restore_sysctls(&dir, name);
    match fs::remove_dir_all(dir.path()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(state::io_error("remove", dir.path())(e).into()),
        _ => Ok(()),
    }
}

/// What of a bed is still there, a line each.
pub fn leftovers(name: &str) -> Vec<String> {
    let mut left = Vec::new();
    for pid in cgroup::processes(name, "") {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        left.push(format!(
            "process {pid}: {}",
            String::from_utf8_lossy(&command).replace('\0', " ").trim()
        ));
    }
    left.extend(
        net::namespaces(name)
            .into_iter()
            .map(|n| format!("network namespace {n}")),
    );
    left.extend(net::host_links(name).into_iter().map(|l| format!("link {l}")));
    left.extend(
        cgroup::all(name, "")
            .into_iter()
            .map(|c| format!("cgroup {}", c.display())),
    );
    left.extend(hosts::of(name).into_iter().map(|l| format!("line of /etc/hosts: {l}")));
    let Ok(dir) = Dir::of(name) else { return left };
    let inside = format!(" {}/", dir.path().display());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(
        mounts
            .lines()
            .filter(|m| m.contains(&inside))
            .map(|m| format!("mount {m}")),
    );
    if dir.path().exists() {
        left.push(format!("directory {}", dir.path().display()));
    }
    left
}

/// All beds that have a directory or cgroups, by name.
pub fn beds() -> Vec<String> {
    let mut names: Vec<String> = state::all()
        .unwrap_or_default()
        .iter()
        .map(|p| p.name().to_owned())
        .collect();
    names.extend(cgroup::beds());
    names.retain(|n| plan::check_name(n).is_ok());
    names.sort();
    names.dedup();
    names
}

/// One line per group: what runs of it.
pub async fn summary(name: &str) -> Vec<String> {
    let Some((dir, plan)) = Dir::of(name).ok().and_then(|d| d.load().ok().map(|p| (d, p))) else {
        return vec![format!(
            "only remains of it are left: `kubernest-testbed down --name {name}`"
        )];
    };
    let mut lines = Vec::new();
    for group in plan.groups() {
        let state = match (group::supervisor(&plan, group), group::running(&plan, &dir, group)) {
            (None, _) => "off".to_owned(),
            (Some(_), tasks) if tasks.is_empty() => "killed".into(),
            (Some(_), tasks) => format!("runs {}", tasks.join(", ")),
        };
        let cut = match group {
            Group::Node(i) if net::has_netns(&plan, group) && !net::port_joined(&plan, i).await => {
                ", cut off the network"
            }
            _ => "",
        };
        let (title, ip) = match group {
            Group::Control => ("control plane".to_owned(), plan.control_ip()),
            Group::Node(i) => (plan.node_name(i), plan.node_ip(i)),
        };
        lines.push(format!("{title:<16} {ip:<14} {state}{cut}"));
    }
    lines
}
