//! Everything of an instance that is neither device nor size: names, DNS, machine type, strategies.

use kubernest_crds::kubevirt::v1::{VirtualMachineInstanceSpec, start_strategy};

use super::unsupported;
use crate::{
    decision::{Report, reasons},
    names,
};

/// Kubernetes' limits of a pod's DNS settings.
const NAME_SERVERS: usize = 3;
const SEARCH_PATHS: usize = 6;
const SEARCH_CHARACTERS: usize = 256;
const STRATEGIES: [&str; 3] = ["LiveMigrate", "LiveMigrateIfPossible", "External"];

/// Checks the rest of the spec.
pub fn check(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let text = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let hostname = text(&spec.hostname);
    let why = hostname.as_deref().and_then(|name| match name.contains('.') {
        true => Some("must not contain dots".to_owned()),
        false => names::dns_label(name),
    });
    if let Some(why) = why {
        let field = format!("{f}.hostname");
        let message = format!("{field} does not conform to the kubernetes DNS_LABEL rules : {why}");
        report.invalid(field, message);
    }
    if let Some(why) = text(&spec.subdomain).as_deref().and_then(names::dns_subdomain) {
        let field = format!("{f}.subdomain");
        let message = format!("{field} does not conform to the kubernetes DNS_SUBDOMAIN rules : {why}");
        report.invalid(field, message);
    }
    if spec.subdomain.as_deref().is_some_and(|name| name.contains('.')) {
        // A pod's is one label.
        let field = format!("{f}.subdomain");
        let message = format!("{field}: names with dots are not supported");
        report.not_supported(field, message);
    }
    match spec.start_strategy.as_deref() {
        None => {}
        // The kubelet would end a guest that stands still and so does not answer.
        Some(start_strategy::PAUSED) if spec.liveness_probe.is_some() => report.invalid(
            format!("{f}.startStrategy"),
            format!(
                "either {f}.startStrategy or {f}.livenessProbe should be provided.Pausing VMI with LivenessProbe is not \
                 supported"
            ),
        ),
        Some(start_strategy::PAUSED) => {}
        Some(other) => report.invalid(
            format!("{f}.startStrategy"),
            format!("{f}.startStrategy is set with an unrecognized option: {other}"),
        ),
    }
    machine_type(report, f, spec);
    spread(report, f, spec);
    probes(report, f, spec);
    let field = format!("{f}.evictionStrategy");
    match spec.eviction_strategy.as_deref() {
        None | Some("None") => {}
        Some(other) if STRATEGIES.contains(&other) => {
            let message = format!("{field}: {other} is not supported");
            report.not_supported(field, message);
        }
        Some(other) => report.invalid(&field, format!("{field} is set with an unrecognized option: {other}")),
    }
    match spec.architecture.as_deref() {
        None | Some("" | "amd64") => {}
        Some(other) => report.invalid(
            format!("{f}.architecture"),
            format!("unsupported architecture: {other}"),
        ),
    }
    affinity(report, f, spec);
    dns(report, f, spec);
}

fn probes(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let devices = &spec.domain.devices;
    let by_default = spec.networks.as_ref().is_none_or(Vec::is_empty)
        && devices.interfaces.as_ref().is_none_or(Vec::is_empty)
        && devices.autoattach_pod_interface != Some(false);
    let on_pod_network = by_default || spec.networks.iter().flatten().any(|network| network.pod.is_some());
    for (name, probe) in [
        ("readinessProbe", &spec.readiness_probe),
        ("livenessProbe", &spec.liveness_probe),
    ] {
        let Some(probe) = probe else { continue };
        let at = format!("{f}.{name}");
        let set = [
            (format!("{at}.httpGet"), probe.http_get.is_some()),
            (format!("{at}.tcpSocket"), probe.tcp_socket.is_some()),
        ];
        let set: Vec<_> = set.into_iter().filter(|(_, set)| *set).collect();
        let through_the_agent = usize::from(probe.exec.is_some()) + usize::from(probe.guest_agent_ping.is_some());
        let kinds = set.len() + through_the_agent;
        if kinds > 1 {
            report.invalid(&at, format!("{at} must have exactly one probe type set"));
        }
        if kinds == 0 && !report.mentions_below(&at) {
            let message =
                format!("either {at}.tcpSocket, {at}.exec or {at}.httpGet must be set if a {at} is specified");
            report.add(reasons::REQUIRED, &at, message);
        }
        // KubeVirt leaves it to the API server, which refuses the pod.
        if probe.exec.as_ref().is_some_and(|exec| exec.command.is_empty()) {
            let field = format!("{at}.exec.command");
            report.add(reasons::REQUIRED, &field, format!("{field}: Required value"));
        }
        // The kubelet would ask it from the node's own network, past all that keeps tenants apart.
        let hosts = [
            ("httpGet", probe.http_get.as_ref().and_then(|get| get.host.as_deref())),
            (
                "tcpSocket",
                probe.tcp_socket.as_ref().and_then(|socket| socket.host.as_deref()),
            ),
        ];
        for (kind, _) in hosts
            .iter()
            .filter(|(_, host)| host.is_some_and(|host| !host.is_empty()))
        {
            unsupported(report, format!("{at}.{kind}.host"));
        }
        for (field, _) in set.iter().filter(|_| !on_pod_network) {
            report.invalid(field, format!("{field} is only allowed if the Pod Network is attached"));
        }
    }
}

fn spread(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    const ACTIONS: [&str; 2] = ["DoNotSchedule", "ScheduleAnyway"];
    let constraints = spec.topology_spread_constraints.iter().flatten();
    for (index, constraint) in spec.topology_spread_constraints.iter().flatten().enumerate() {
        let at = format!("{f}.topologySpreadConstraints[{index}]");
        if constraint.max_skew <= 0 {
            let field = format!("{at}.maxSkew");
            let message = format!(
                "{field}: Invalid value: {}: must be greater than zero",
                constraint.max_skew
            );
            report.invalid(field, message);
        }
        if constraint.topology_key.is_empty() {
            let field = format!("{at}.topologyKey");
            let message = format!("{field}: Required value: can not be empty");
            report.add(reasons::REQUIRED, field, message);
        }
    }
    for constraint in constraints.filter(|one| !ACTIONS.contains(&one.when_unsatisfiable.as_str())) {
        let field = format!("{f}.topologySpreadConstraints.whenUnsatisfiable");
        let (names, found) = (ACTIONS.join(" "), &constraint.when_unsatisfiable);
        report.add(
            "",
            "",
            format!("{field} in body should be one of [{names}], not {found}"),
        );
    }
}

fn affinity(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let affinity = spec.affinity.as_ref();
    let node = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
    let required = node.and_then(|node| node.required_during_scheduling_ignored_during_execution.as_ref());
    if required.is_some_and(|required| required.node_selector_terms.is_empty()) {
        let field = format!("{f}.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms");
        let message = format!("{field}: Required value: must have at least one node selector term");
        report.add(reasons::REQUIRED, field, message);
    }
    let pods = affinity.and_then(|affinity| affinity.pod_affinity.as_ref());
    let pods = pods.and_then(|pods| pods.preferred_during_scheduling_ignored_during_execution.as_ref());
    let apart = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref());
    let apart = apart.and_then(|apart| apart.preferred_during_scheduling_ignored_during_execution.as_ref());
    for (kind, terms) in [("podAffinity", pods), ("podAntiAffinity", apart)] {
        for (index, term) in terms.into_iter().flatten().enumerate() {
            if !(1..=100).contains(&term.weight) {
                let field = format!("{f}.{kind}.preferredDuringSchedulingIgnoredDuringExecution[{index}].weight");
                let message = format!("{field}: Invalid value: {}: must be in the range 1-100", term.weight);
                report.invalid(field, message);
            }
        }
    }
}

fn tolerations(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    const OPERATORS: [&str; 2] = ["Equal", "Exists"];
    const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];
    for toleration in spec.tolerations.iter().flatten() {
        for (name, value, allowed) in [
            ("operator", &toleration.operator, &OPERATORS[..]),
            ("effect", &toleration.effect, &EFFECTS[..]),
        ] {
            if value
                .as_deref()
                .is_some_and(|value| !value.is_empty() && !allowed.contains(&value))
            {
                let names = allowed.join(" ");
                report.add(
                    "",
                    "",
                    format!("{f}.tolerations.{name} in body should be one of [{names}]"),
                );
            }
        }
    }
}

fn machine_type(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    let Some(type_) = spec
        .domain
        .machine
        .as_ref()
        .and_then(|machine| machine.type_.as_deref())
    else {
        return;
    };
    if !type_.is_empty() && !type_.starts_with("q35") && !type_.starts_with("pc-q35") {
        let field = format!("{f}.domain.machine.type");
        let message = format!("{field} is not supported: {type_} (allowed values: [q35* pc-q35*])");
        report.invalid(field, message);
    }
}

fn dns(report: &mut Report, f: &str, spec: &VirtualMachineInstanceSpec) {
    const POLICIES: [&str; 4] = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    if let Some(policy) = spec.dns_policy.as_deref().filter(|policy| !policy.is_empty())
        && !POLICIES.contains(&policy)
    {
        let names = POLICIES.join(" ");
        report.add("", "", format!("{f}.dnsPolicy in body should be one of [{names}]"));
    }
    let servers = spec
        .dns_config
        .as_ref()
        .and_then(|config| config.nameservers.as_deref())
        .unwrap_or_default();
    for server in servers
        .iter()
        .filter(|server| server.parse::<std::net::IpAddr>().is_err())
    {
        report.invalid("nameservers", format!("must be valid IP address: {server}"));
    }
    let config = spec.dns_config.as_ref();
    let searches = config.and_then(|config| config.searches.as_deref()).unwrap_or_default();
    if searches.len() > SEARCH_PATHS {
        let message = format!("must not have more than {SEARCH_PATHS} search paths");
        report.invalid("searchDomains", message);
    }
    if searches.join(" ").len() > SEARCH_CHARACTERS {
        let message =
            format!("must not have more than {SEARCH_CHARACTERS} characters (including spaces) in the search list");
        report.invalid("searchDomains", message);
    }
    for why in searches.iter().filter_map(|search| names::dns_subdomain(search)) {
        report.invalid("searchDomains", why);
    }
    let options = config.and_then(|config| config.options.as_deref()).unwrap_or_default();
    if options
        .iter()
        .any(|option| option.name.as_deref().unwrap_or_default().is_empty())
    {
        report.invalid("options", "Option.Name must not be empty");
    }
    if servers.len() > NAME_SERVERS {
        let message = format!(
            "must not have more than {NAME_SERVERS} nameservers: [{}]",
            servers.join(" ")
        );
        report.invalid("nameservers", message);
    }
    tolerations(report, f, spec);
    if spec.dns_policy.as_deref() == Some("None") && config.is_none() {
        let message = "must provide `dnsConfig` when `dnsPolicy` is None";
        report.add(reasons::REQUIRED, format!("{f}.dnsConfig"), message);
        return;
    }
    if spec.dns_policy.as_deref() == Some("None") && servers.is_empty() {
        report.add(
            reasons::REQUIRED,
            "nameservers",
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
    }
}
