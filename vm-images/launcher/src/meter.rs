//! What the machine uses, as Prometheus metrics under KubeVirt's names (docs/observability/metrics.md of KubeVirt).
//!
//! libvirt is asked when somebody asks, at most once a second: whoever reaches the port can't keep it busy.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kubernest_domain::machine::Machine;
use kubernest_domain::xml;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout};

use crate::hypervisor::{Guest, HypervisorError, Usage};
use crate::queue::Queue;

/// Media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How long an answer of libvirt's is given to others who ask.
const FRESH: Duration = Duration::from_secs(1);
/// How long libvirt may take; Prometheus waits 10 s.
const LIMIT: Duration = Duration::from_secs(8);

type Labels = Vec<(&'static str, String)>;

/// Reads figures of one machine. Clones share what was read.
#[derive(Clone)]
pub struct Meter(Arc<Inner>);

struct Inner {
    /// Of the instance.
    labels: Labels,
    disks: Vec<(String, String)>,
    nics: Vec<(String, String)>,
    guest: OnceLock<Queue<Guest>>,
    /// The last answer, or that there was none, and when it came. Held while libvirt is asked.
    last: Mutex<Option<(Instant, Option<String>)>>,
    /// A question to libvirt without an answer.
    asked: AtomicBool,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum MeterError {
    /// It does not run yet, or not any more.
    #[error("the domain does not run")]
    NotRunning,
    /// Somebody asks already, or nothing was told a moment ago.
    #[error("libvirt is being asked, or did not tell a moment ago: ask again in a second")]
    Busy,
    /// libvirt hangs.
    #[error("libvirt did not answer within {} s", LIMIT.as_secs())]
    Slow,
    /// libvirt refused.
    #[error(transparent)]
    Libvirt(#[from] HypervisorError),
    /// The text could not be written.
    #[error("writing the figures")]
    Encode(#[source] std::fmt::Error),
}

impl Meter {
    /// A meter of a machine that does not run yet.
    pub fn new(machine: &Machine) -> Self {
        let (namespace, name) = machine.name.split_once('_').unwrap_or(("", &machine.name));
        let disks = machine.disks.iter().map(|disk| disk.name.clone());
        let nics = machine.nics.iter().map(|nic| (nic.name.clone(), nic.tap.clone()));
        Self(Arc::new(Inner {
            labels: vec![("namespace", namespace.to_owned()), ("name", name.to_owned())],
            disks: disks.zip(xml::disk_targets(&machine.disks)).collect(),
            nics: nics.collect(),
            guest: OnceLock::new(),
            last: Mutex::default(),
            asked: AtomicBool::default(),
        }))
    }

    /// The machine runs from now on.
    ///
    /// # Errors
    /// When no thread can be started for the questions to libvirt.
    pub(crate) fn attach(&self, guest: Guest) -> std::io::Result<()> {
        let queue = Queue::start("libvirt-usage", guest)?;
        // There is one domain in a launcher's life.
        let _ = self.0.guest.set(queue);
        Ok(())
    }

    /// The figures as OpenMetrics text.
    ///
    /// # Errors
    /// When the domain does not run or libvirt does not tell.
    pub async fn text(&self) -> Result<String, MeterError> {
        // Who comes while libvirt is asked does not wait: whoever reaches the port could pile up.
        let mut last = self.0.last.try_lock().map_err(|_| MeterError::Busy)?;
        if let Some((read, answer)) = &*last
            && read.elapsed() < FRESH
        {
            return answer.clone().ok_or(MeterError::Busy);
        }
        let read = self.read().await;
        let text = read.and_then(|usage| self.encode(&usage).map_err(MeterError::Encode));
        *last = Some((Instant::now(), text.as_ref().ok().cloned()));
        text
    }

    async fn read(&self) -> Result<Usage, MeterError> {
        let guest = self.0.guest.get().ok_or(MeterError::NotRunning)?;
        // libvirt hangs at an earlier question; it gets no further ones.
        if self.0.asked.swap(true, Ordering::AcqRel) {
            return Err(MeterError::Slow);
        }
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        guest.call(move |guest| {
            let targets = |all: &[(String, String)]| all.iter().map(|(_, target)| target.clone()).collect::<Vec<_>>();
            let usage = guest.usage(&targets(&inner.disks), &targets(&inner.nics));
            inner.asked.store(false, Ordering::Release);
            // Who has asked may have gone.
            let _ = reply.send(usage);
        });
        let answered = timeout(LIMIT, answer).await.map_err(|_| MeterError::Slow)?;
        Ok(answered.map_err(|_| MeterError::NotRunning)??)
    }

    fn encode(&self, usage: &Usage) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("kubevirt_vmi");
        let seconds = Family::<Labels, Counter<f64, AtomicU64>>::default();
        let value = Duration::from_nanos(usage.cpu_nanoseconds).as_secs_f64();
        seconds.get_or_create(&self.0.labels).inc_by(value);
        let help = "Processor time of the machine, all of qemu's";
        registry.register_with_unit("cpu_usage", help, Unit::Seconds, seconds);
        for (name, help, kib) in [
            ("memory_domain", "Memory that the guest has", usage.memory_kib),
            ("memory_resident", "Memory that qemu has touched", usage.resident_kib),
        ] {
            let bytes = Family::<Labels, Gauge>::default();
            let value = i64::try_from(kib.saturating_mul(1024)).unwrap_or(i64::MAX);
            bytes.get_or_create(&self.0.labels).set(value);
            registry.register_with_unit(name, help, Unit::Bytes, bytes);
        }
        let of_disks = [
            ("storage_read_traffic_bytes", "Bytes read from a disk"),
            ("storage_write_traffic_bytes", "Bytes written to a disk"),
            ("storage_iops_read", "Requests to read from a disk"),
            ("storage_iops_write", "Requests to write to a disk"),
        ];
        for (index, (name, help)) in of_disks.into_iter().enumerate() {
            let family = Family::<Labels, Counter>::default();
            for ((drive, _), figures) in self.0.disks.iter().zip(&usage.disks) {
                family
                    .get_or_create(&self.labels("drive", drive))
                    .inc_by(figures[index]);
            }
            registry.register(name, help, family);
        }
        for (way, direction) in ["receive", "transmit"].into_iter().enumerate() {
            let of_nics = [
                ("bytes", "Bytes"),
                ("packets", "Packets"),
                ("errors", "Errors"),
                ("packets_dropped", "Drops"),
            ];
            for (index, (name, what)) in of_nics.into_iter().enumerate() {
                let family = Family::<Labels, Counter>::default();
                for ((interface, _), figures) in self.0.nics.iter().zip(&usage.nics) {
                    family
                        .get_or_create(&self.labels("interface", interface))
                        .inc_by(figures[way][index]);
                }
                let help = format!("{what} of an interface, as the guest sees it: {direction}");
                registry.register(format!("network_{direction}_{name}"), help, family);
            }
        }
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }

    /// The instance's labels and one of a device.
    fn labels(&self, key: &'static str, value: &str) -> Labels {
        let mut labels = self.0.labels.clone();
        labels.push((key, value.to_owned()));
        labels
    }
}
