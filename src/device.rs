//! The device that trains: the choice of CPU or GPU, and opening it.

use candle_core::Device;

use crate::fault::{Fault, Kind, Result};
use crate::machine;
use crate::report::{Report, Stage};

/// The requested device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The first CUDA device that can train, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

impl Choice {
    /// Parses `auto`, `cpu`, `cuda` or `cuda:N`.
    pub fn parse(text: &str) -> Option<Choice> {
        match text {
            "auto" => Some(Choice::Auto),
            "cpu" => Some(Choice::Cpu),
            "cuda" => Some(Choice::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()).map(Choice::Cuda),
        }
    }
}

/// The GPUs that ranks train on, one each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// All that the driver shows.
    All,
    /// The first so many.
    First(usize),
    /// The GPUs of these numbers.
    List(Vec<usize>),
}

impl Gpus {
    /// Parses `all`, a number of GPUs, or a list of their numbers such as `0,2`.
    pub fn parse(text: &str) -> Option<Gpus> {
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        match parts[..] {
            ["all"] => Some(Gpus::All),
            [count] => count.parse().ok().filter(|count| *count > 0).map(Gpus::First),
            _ => {
                let numbers = parts.iter().map(|part| part.parse().ok()).collect::<Option<Vec<usize>>>()?;
                let is_unique =
                    numbers.iter().enumerate().all(|(at, number)| !numbers[..at].contains(number));
                is_unique.then_some(Gpus::List(numbers))
            }
        }
    }

    /// Returns the numbers of the GPUs that were asked for. `there` is the number of GPUs that can be used.
    ///
    /// # Errors
    /// Device: some of them are not there. Another machine may have them.
    pub fn numbers(&self, there: usize) -> Result<Vec<usize>> {
        let missing = match self {
            Gpus::All if there > 0 => return Ok((0..there).collect()),
            Gpus::All => "all GPUs were asked for".to_owned(),
            Gpus::First(count) if *count <= there => return Ok((0..*count).collect()),
            Gpus::First(count) => format!("{count} GPUs were asked for"),
            Gpus::List(list) => match list.iter().find(|number| **number >= there) {
                None => return Ok(list.clone()),
                Some(number) => format!("GPU {number} was asked for; numbers begin at 0"),
            },
        };
        Err(Fault::new(Kind::Device, format!("gpus: {missing}, and {there} can be used")).help(
            "ask for fewer; CUDA_VISIBLE_DEVICES may hide some, and `nvidia-smi` lists those of this machine",
        ))
    }
}

/// Returns the number of GPUs that training can use: those that the driver shows, or none if the first cannot be used.
#[cfg(feature = "cuda")]
pub fn usable_gpus() -> usize {
    match crate::ops::cuda::device::usable(0) {
        Ok(()) => crate::ops::cuda::device::count(),
        Err(_) => 0,
    }
}

/// Returns the number of GPUs that training can use: none in this build.
#[cfg(not(feature = "cuda"))]
pub fn usable_gpus() -> usize {
    0
}

/// Returns the device of a rank: the GPU that its number on this machine chooses, or what `choice` names.
///
/// # Errors
/// The faults of [`Gpus::numbers`].
pub fn of_rank(choice: Choice, gpus: Option<&Gpus>, local_rank: usize) -> Result<Choice> {
    of_rank_among(choice, gpus, local_rank, usable_gpus())
}

fn of_rank_among(choice: Choice, gpus: Option<&Gpus>, local_rank: usize, there: usize) -> Result<Choice> {
    if choice != Choice::Auto || (there == 0 && gpus.is_none()) {
        return Ok(choice);
    }
    let numbers = gpus.unwrap_or(&Gpus::All).numbers(there)?;
    match numbers.get(local_rank) {
        Some(number) => Ok(Choice::Cuda(*number)),
        // Some launchers show each process a GPU of its own, as the only one.
        None if there == 1 => Ok(Choice::Cuda(0)),
        None => Err(Fault::config(format!(
            "process {local_rank} of this machine has no GPU: there are {} for its processes",
            numbers.len()
        ))
        .help("start one process for each GPU")),
    }
}

/// Opens the device. `Auto` warns why a GPU that is there is not used; for `Cuda`, such a GPU is a fault.
pub fn open(choice: Choice, report: &Report) -> Result<Device> {
    match choice {
        Choice::Cpu => Ok(Device::Cpu),
        Choice::Cuda(number) => {
            let device = cuda(number)?;
            report.note(Stage::Plan, described(number));
            Ok(device)
        }
        Choice::Auto if !any() => Ok(Device::Cpu),
        Choice::Auto => match cuda(0) {
            Ok(device) => {
                report.note(Stage::Plan, described(0));
                Ok(device)
            }
            Err(fault) => {
                report.warn(Stage::Plan, format!("training on the CPU: {}", fault.message));
                Ok(Device::Cpu)
            }
        },
    }
}

/// Refuses a device that this binary can never use, without asking the driver.
pub fn check(choice: Choice) -> Result<()> {
    match choice {
        Choice::Cuda(number) if !cfg!(feature = "cuda") => Err(not_built(number)),
        _ => Ok(()),
    }
}

fn not_built(number: usize) -> Fault {
    Fault::config(format!("device cuda:{number}: this build of hone trains on the CPU only"))
        .help("use the CUDA image, build with --features cuda, or remove `device`")
}

#[cfg(feature = "cuda")]
fn any() -> bool {
    crate::ops::cuda::device::count() > 0
}

#[cfg(not(feature = "cuda"))]
fn any() -> bool {
    false
}

#[cfg(feature = "cuda")]
fn cuda(number: usize) -> Result<Device> {
    crate::ops::cuda::device::open(number)
}

#[cfg(not(feature = "cuda"))]
fn cuda(number: usize) -> Result<Device> {
    Err(not_built(number))
}

#[cfg(feature = "cuda")]
fn described(number: usize) -> String {
    match crate::ops::cuda::device::card(number) {
        Ok(card) => format!(
            "cuda:{number}: {}, {:.1} GiB, compute capability {}.{}",
            card.name,
            card.memory_bytes as f64 / (1u64 << 30) as f64,
            card.capability.0,
            card.capability.1
        ),
        Err(fault) => fault.message,
    }
}

#[cfg(not(feature = "cuda"))]
fn described(number: usize) -> String {
    format!("cuda:{number}")
}

/// Returns the number of bytes that are free on a GPU, or that this process may still take on a CPU; `None` if the
/// system does not say.
pub fn memory_free(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => machine::memory_available(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::ops::cuda::device::memory(device).ok().map(|(free, _)| free as u64),
        _ => None,
    }
}

/// Returns the compute capability of a GPU (major, minor); `None` for a CPU.
pub fn capability(device: &Device) -> Option<(i32, i32)> {
    match device.location() {
        #[cfg(feature = "cuda")]
        candle_core::DeviceLocation::Cuda { gpu_id } => {
            crate::ops::cuda::device::card(gpu_id).ok().map(|card| card.capability)
        }
        _ => None,
    }
}

/// Returns `this CPU`, or the name that the GPU reports.
pub fn name(device: &Device) -> String {
    match device.location() {
        #[cfg(feature = "cuda")]
        candle_core::DeviceLocation::Cuda { gpu_id } => {
            crate::ops::cuda::device::card(gpu_id).map_or_else(|fault| fault.message, |card| card.name)
        }
        _ => "this CPU".into(),
    }
}

/// Returns the most bytes that the process has used of a GPU's memory, or of the machine's on a CPU; `None` if the
/// system does not say.
pub fn memory_peak(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => machine::memory_peak(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let (_, most) = crate::ops::cuda::device::pool(device).ok()?;
            Some((most + crate::ops::cuda::device::graphs_peak(device).unwrap_or(0)) as u64)
        }
        _ => None,
    }
}

/// Returns the number of kernels and products that this process launched on a GPU; `None` if there were none.
pub fn launches() -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let count @ 1.. = crate::ops::cuda::launches() {
        return Some(count);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_all_a_number_or_a_list() {
        assert_eq!(Gpus::parse("all"), Some(Gpus::All));
        assert_eq!(Gpus::parse("2"), Some(Gpus::First(2)));
        assert_eq!(Gpus::parse("3, 1"), Some(Gpus::List(vec![3, 1])));
        for text in ["", "0", "none", "1,1", "1,", "-1", "1,x"] {
            assert_eq!(Gpus::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_ranks_number_chooses_its_gpu() {
        let list = Gpus::List(vec![3, 1]);
        let of = |gpus: Option<&Gpus>, rank, there| of_rank_among(Choice::Auto, gpus, rank, there);
        assert_eq!(of(Some(&list), 1, 4).unwrap(), Choice::Cuda(1));
        assert_eq!(of(None, 2, 4).unwrap(), Choice::Cuda(2));
        assert_eq!(of(None, 2, 1).unwrap(), Choice::Cuda(0), "the launcher shows each process one GPU");
        assert_eq!(of(None, 2, 0).unwrap(), Choice::Auto);
        assert_eq!(of_rank_among(Choice::Cpu, None, 1, 4).unwrap(), Choice::Cpu);
        assert_eq!(of(None, 4, 4).unwrap_err().kind, Kind::Config);
        assert_eq!(of(Some(&list), 0, 2).unwrap_err().kind, Kind::Device);
    }
}
