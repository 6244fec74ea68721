//! The device that trains: the choice of CPU or GPU, and opening it.

use candle_core::Device;

use crate::fault::{Fault, Result};
use crate::machine;
use crate::report::{Report, Stage};

/// The device that was asked for.
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

/// Bytes that are free on a GPU, or that this process may still take on a CPU; `None` if the system does not say.
pub fn memory_free(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => machine::memory_available(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::ops::cuda::device::memory(device).ok().map(|(free, _)| free as u64),
        _ => None,
    }
}

/// `this CPU`, or the name that the GPU reports.
pub fn name(device: &Device) -> String {
    match device.location() {
        #[cfg(feature = "cuda")]
        candle_core::DeviceLocation::Cuda { gpu_id } => {
            crate::ops::cuda::device::card(gpu_id).map_or_else(|fault| fault.message, |card| card.name)
        }
        _ => "this CPU".into(),
    }
}

/// Most bytes that the process has used of a GPU's memory, or of the machine's on a CPU; `None` if the system does
/// not say.
pub fn memory_peak(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => machine::memory_peak(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::ops::cuda::device::pool(device).ok().map(|(_, most)| most as u64),
        _ => None,
    }
}

/// Kernels and products that this process has launched on a GPU; `None` if there were none.
pub fn launches() -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let count @ 1.. = crate::ops::cuda::launches() {
        return Some(count);
    }
    None
}
