//! The console tail: the guest's last serial lines, read from the launcher's log when somebody asks, once per request.
//!
//! The container's log holds the serial console (stdout) and the launcher's own JSON lines (stderr) in one; the latter
//! are left out. Reads are bounded in lines and bytes, and only printable text is kept: a guest writes it.

use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;
use kube::{Api, ResourceExt};
use kubernest_crds::kubevirt::v1::{ConsoleTail, VirtualMachineInstance};

use super::build::CONTAINER;
use super::dereference::Observed;
use super::status;
use crate::Context;

/// Lines asked of the log: the launcher's own are among them.
const LOG_LINES: i64 = 80;
/// Bytes asked of the log.
const LOG_BYTES: i64 = 32 << 10;

/// The request that should be answered now: a new one, and the launcher has begun to write a log.
pub fn wanted<'a>(instance: &VirtualMachineInstance, observed: &'a Observed) -> Option<(&'a str, &'a Pod)> {
    let request = observed.tail_request.as_deref()?;
    let answered = instance.status.as_ref().and_then(|status| status.console_tail.as_ref());
    let pod = observed.pod.as_ref()?;
    let state = status::compute(pod)?.state.as_ref()?;
    let wrote = state.running.is_some() || state.terminated.is_some();
    (wrote && answered.is_none_or(|tail| tail.request != request)).then_some((request, pod))
}

/// Reads the tail.
///
/// # Errors
/// When the API server, or the kubelet behind it, does not give the log.
pub async fn read(request: &str, pod: &Pod, ctx: &Context) -> Result<ConsoleTail, kube::Error> {
    let params = LogParams {
        container: Some(CONTAINER.to_owned()),
        tail_lines: Some(LOG_LINES),
        limit_bytes: Some(LOG_BYTES),
        ..LogParams::default()
    };
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), pod.namespace().as_deref().unwrap_or_default());
    let log = api.logs(&pod.name_any(), &params).await?;
    Ok(ConsoleTail {
        request: request.to_owned(),
        lines: serial_lines(&log),
    })
}

fn serial_lines(log: &str) -> Vec<String> {
    let own = |line: &&str| line.starts_with("{\"") && line.contains("\"level\":");
    status::bounded(log.lines().filter(|line| !own(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_tail_is_the_guests_own_and_bounded() {
        let mut log =
            String::from("{\"timestamp\":\"t\",\"level\":\"INFO\",\"message\":\"started\"}\n\u{1b}[31mred\r\n\n");
        for line in 0..30 {
            log.push_str(&format!("line {line} {}\n", "ä".repeat(200)));
        }
        let lines = serial_lines(&log);
        assert_eq!(lines.len(), 20);
        assert!(lines[0].starts_with("line 10 ") && lines[0].len() <= 200);
        assert_eq!(serial_lines("\u{1b}[31mred\r\n{\"level\":1}"), ["[31mred"]);
    }
}
