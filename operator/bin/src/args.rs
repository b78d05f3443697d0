//! Flags, each also an environment variable. The controllers bring their own.

use std::net::SocketAddr;

use kubernest_runtime::telemetry::Format;

/// Kubernest's operator: TenantClusters become clusters, VirtualMachines become virtual machines.
#[derive(Debug, clap::Parser)]
#[command(name = "kubernest-operator", version)]
pub struct Args {
    /// Where metrics and health are served (HTTP).
    #[arg(long, env = "KUBERNEST_METRICS_ADDR", default_value = "0.0.0.0:8080")]
    pub metrics_addr: SocketAddr,
    /// Namespace that Kubernest runs in; the leader's Lease is there. The pod's own (`POD_NAMESPACE`) when not given.
    #[arg(long, env = "KUBERNEST_NAMESPACE", default_value_t = kubernest_runtime::process::namespace(kubernest_crds::labels::SYSTEM_NAMESPACE))]
    pub namespace: String,
    /// Work only while holding the Lease, so that several replicas can run; `false` for one alone.
    #[arg(long, env = "KUBERNEST_LEADER_ELECT", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true")]
    pub leader_elect: bool,
    /// How log lines look.
    #[arg(long, env = "KUBERNEST_LOG_FORMAT", default_value = "json")]
    pub log_format: Format,
    /// Options of the machine half.
    #[command(flatten)]
    pub machine: kubernest_machine::Options,
    /// Options of the tenant half.
    #[command(flatten)]
    pub tenant: kubernest_tenant::Options,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    /// clap finds clashes between the halves' flags only when a command is built.
    #[test]
    fn args_of_both_halves_fit_together() {
        super::Args::command().debug_assert();
    }
}
