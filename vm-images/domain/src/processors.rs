//! Dedicated processors: which of those that the container got each virtual CPU runs on.
//!
//! Only the running launcher knows what it got, so that is an input here. Whether nobody else uses them is the kubelet's
//! word: it gives a container either as many as it asked for, its own, or all that are shared.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::machine::Topology;

/// Linux's own limit of processors (NR_CPUS) on the architectures that matter.
const MAX_PROCESSORS: u32 = 8192;

/// A set of the node's processors, written as Linux writes them: `0-3,8` (cpuset(7), list format).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuSet(BTreeSet<u32>);

/// A text that is no list of processors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no list of processors")]
pub struct ParseCpuSetError(String);

impl CpuSet {
    /// The numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

impl FromStr for CpuSet {
    type Err = ParseCpuSetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseCpuSetError(text.chars().take(64).collect());
        let number = |text: &str| {
            let number = text.parse::<u32>().ok();
            number.filter(|number| *number < MAX_PROCESSORS).ok_or_else(wrong)
        };
        let part = |part: &str| -> Result<RangeInclusive<u32>, ParseCpuSetError> {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() { Err(wrong()) } else { Ok(range) }
        };
        let parts = text.trim().split(',').filter(|part| !part.is_empty());
        let parts = parts.map(part).collect::<Result<Vec<_>, _>>()?;
        Ok(parts.into_iter().flatten().collect())
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<RangeInclusive<u32>> = Vec::new();
        for number in self.iter() {
            match runs.last_mut() {
                Some(run) if run.end() + 1 == number => *run = *run.start()..=number,
                _ => runs.push(number..=number),
            }
        }
        for (index, run) in runs.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match run.start() == run.end() {
                true => write!(f, "{comma}{}", run.start())?,
                false => write!(f, "{comma}{}-{}", run.start(), run.end())?,
            }
        }
        Ok(())
    }
}

/// The processors that a container may use, by the cores that they are threads of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processors {
    allowed: CpuSet,
    /// Each with those of its threads that are allowed.
    cores: BTreeSet<CpuSet>,
}

impl Processors {
    /// `siblings` are the threads of a processor's core, itself among them; one that is not known is a core of its own.
    pub fn new(allowed: CpuSet, siblings: impl Fn(u32) -> Option<CpuSet>) -> Self {
        let core = |number: u32| -> CpuSet {
            let threads = siblings(number).unwrap_or_default();
            let threads = threads.iter().filter(|thread| allowed.0.contains(thread));
            threads.chain([number]).collect()
        };
        let cores = allowed.iter().map(core).collect();
        Self { allowed, cores }
    }

    /// All of them.
    pub fn allowed(&self) -> &CpuSet {
        &self.allowed
    }

    /// All of them, in the order in which a guest's are taken: the threads of a guest's core from one core as long as there
    /// are whole ones, then what is left over of others.
    fn in_order(&self, threads: usize) -> Vec<u32> {
        let (mut whole, mut rest) = (Vec::new(), Vec::new());
        for core in &self.cores {
            let core: Vec<u32> = core.iter().collect();
            let (first, last) = core.split_at(core.len() - core.len() % threads.max(1));
            whole.extend_from_slice(first);
            rest.extend_from_slice(last);
        }
        whole.extend(rest);
        whole
    }
}

/// What runs on which of the node's processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinning {
    /// The processor of each virtual CPU, by its number.
    pub vcpus: Vec<u32>,
    /// Those of qemu's other threads.
    pub emulator: CpuSet,
    /// All of the container's.
    pub all: CpuSet,
    /// What runs beside qemu keeps to `emulator` too.
    pub isolated: bool,
}

/// One processor a virtual CPU, and one more for qemu if `isolated`; `None` if the container has not got exactly so many,
/// which then are no processors of its own.
pub fn pin(topology: Topology, isolated: bool, processors: &Processors) -> Option<Pinning> {
    let vcpus = usize::try_from(topology.vcpus()).ok()?;
    if processors.allowed.len() != vcpus + usize::from(isolated) {
        return None;
    }
    let mut order = processors.in_order(usize::try_from(topology.threads).ok()?);
    let emulator = order.split_off(vcpus);
    Some(Pinning {
        emulator: if isolated {
            emulator.into_iter().collect()
        } else {
            processors.allowed.clone()
        },
        vcpus: order,
        all: processors.allowed.clone(),
        isolated,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn set(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[rstest]
    #[case("0", "0", 1)]
    #[case("0-3,8\n", "0-3,8", 5)]
    #[case("3,1,2", "1-3", 3)]
    #[case("", "", 0)]
    fn processors_are_read_and_written_as_linux_does(#[case] text: &str, #[case] written: &str, #[case] count: usize) {
        let set = set(text);
        assert_eq!(
            (set.to_string().as_str(), set.len(), set.is_empty()),
            (written, count, count == 0)
        );
    }

    #[rstest]
    #[case("a")]
    #[case("1-")]
    #[case("3-1")]
    #[case("0-4294967295")]
    fn processors_that_are_none(#[case] text: &str) {
        assert!(text.parse::<CpuSet>().is_err());
    }

    /// A node of two threads a core, `n` and `n + 4`.
    fn processors(allowed: &str) -> Processors {
        Processors::new(set(allowed), |number| {
            Some([number % 4, number % 4 + 4].into_iter().collect())
        })
    }

    fn topology(cores: u32, threads: u32) -> Topology {
        let sockets = 1;
        Topology {
            sockets,
            cores,
            threads,
        }
    }

    #[rstest]
    #[case::one(topology(1, 1), false, "3", &[3], "3")]
    #[case::each_its_own(topology(2, 1), false, "1-2", &[1, 2], "1-2")]
    #[case::threads_of_one_core(topology(2, 2), false, "0-1,4-5", &[0, 4, 1, 5], "0-1,4-5")]
    #[case::whole_cores_first(topology(2, 2), false, "0-2,5", &[1, 5, 0, 2], "0-2,5")]
    #[case::emulator_apart(topology(1, 2), true, "0-1,5", &[1, 5], "0")]
    #[case::emulator_on_the_last(topology(2, 1), true, "0-2", &[0, 1], "2")]
    fn pin_gives_each_virtual_cpu_one(
        #[case] topology: Topology,
        #[case] isolated: bool,
        #[case] allowed: &str,
        #[case] vcpus: &[u32],
        #[case] emulator: &str,
    ) {
        let pinning = pin(topology, isolated, &processors(allowed)).unwrap();
        assert_eq!((&pinning.vcpus[..], pinning.emulator), (vcpus, set(emulator)));
        assert_eq!(pinning.all, set(allowed));
    }

    #[rstest]
    #[case::shared(topology(2, 1), false, "0-7")]
    #[case::too_few(topology(2, 1), true, "0-1")]
    fn pin_refuses_processors_that_are_not_its_own(
        #[case] topology: Topology,
        #[case] isolated: bool,
        #[case] allowed: &str,
    ) {
        assert_eq!(pin(topology, isolated, &processors(allowed)), None);
    }
}
