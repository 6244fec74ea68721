//! This machine's GPUs (from NVIDIA's management library), or its processor -> one sample.
//!
//! The library is opened at the first request. It comes with the driver; a container gets it with the capability
//! `utility`. A value that the library does not give is null, never a guess.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use serde_json::{Value, json};

const GIB: f64 = (1u64 << 30) as f64;

/// State of a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Index of the GPU.
    pub id: u32,
    /// Name of the product.
    pub name: String,
    /// Share of time in which a kernel ran.
    pub load_percent: Option<u32>,
    /// Temperature of the GPU.
    pub temperature_celsius: Option<u32>,
    /// Bytes of memory in use.
    pub memory_used_bytes: u64,
    /// Bytes of memory in all.
    pub memory_bytes: u64,
}

/// State of the processor and of the machine's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpu {
    /// Load since the sample before; `None` in the first sample.
    pub load_percent: Option<f64>,
    /// Cores that this process may use.
    pub cores: usize,
    /// Bytes of memory in use.
    pub memory_used_bytes: u64,
    /// Bytes of memory in all.
    pub memory_bytes: u64,
}

/// Either GPUs or the processor: as in KAITO's server, a machine with GPUs does not report its processor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// The GPUs, if there are any.
    pub gpus: Option<Vec<Gpu>>,
    /// The processor, if there is no GPU.
    pub cpu: Option<Cpu>,
}

impl Sample {
    /// Returns the sample in KAITO's form. KAITO's own server divides mebibytes by gibibytes and always says 0.00 GB;
    /// these sizes are right.
    pub fn json(&self) -> Value {
        let memory = |used: u64, total: u64| {
            let size = |bytes: u64| format!("{:.2} GB", bytes as f64 / GIB);
            json!({"used": size(used), "total": size(total)})
        };
        let gpu = |gpu: &Gpu| {
            json!({
                "id": gpu.id.to_string(),
                "name": gpu.name,
                "load": gpu.load_percent.map(|load| format!("{:.2}%", f64::from(load))),
                "temperature": gpu.temperature_celsius.map(|degrees| format!("{degrees} C")),
                "memory": memory(gpu.memory_used_bytes, gpu.memory_bytes),
            })
        };
        let cpu = |cpu: &Cpu| {
            json!({
                "load_percentage": cpu.load_percent,
                "physical_cores": null,
                "total_cores": cpu.cores,
                "memory": memory(cpu.memory_used_bytes, cpu.memory_bytes),
            })
        };
        let gpus = self.gpus.as_ref().map(|gpus| gpus.iter().map(gpu).collect::<Vec<_>>());
        json!({"gpu_info": gpus, "cpu_info": self.cpu.as_ref().map(cpu)})
    }
}

/// Takes samples; keeps the counters that the next sample is compared with.
#[derive(Default)]
pub struct Sampler {
    library: Option<Option<Nvml>>,
    before: Option<(u64, u64)>,
}

impl Sampler {
    /// Returns the state at this moment.
    pub fn take(&mut self) -> Sample {
        let library = self.library.get_or_insert_with(Nvml::open);
        match library.as_ref().map(Nvml::gpus).filter(|gpus| !gpus.is_empty()) {
            Some(gpus) => Sample { gpus: Some(gpus), cpu: None },
            None => Sample { gpus: None, cpu: self.cpu() },
        }
    }

    /// Returns the number of bytes of the first GPU's memory in use, or of this process on a machine without one;
    /// `None` if nobody says.
    pub fn memory_used(&mut self) -> Option<u64> {
        let library = self.library.get_or_insert_with(Nvml::open);
        match library.as_ref().and_then(|nvml| nvml.gpu(0)) {
            Some(gpu) => Some(gpu.memory_used_bytes),
            None => crate::machine::memory_resident(),
        }
    }

    fn cpu(&mut self) -> Option<Cpu> {
        let now = busy_and_all(&std::fs::read_to_string("/proc/stat").ok()?)?;
        let before = self.before.replace(now);
        let (memory_used_bytes, memory_bytes) =
            used_and_all(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Some(Cpu {
            load_percent: before.and_then(|before| load(before, now)),
            cores,
            memory_used_bytes,
            memory_bytes,
        })
    }
}

fn load(before: (u64, u64), now: (u64, u64)) -> Option<f64> {
    let (busy, all) = (now.0.checked_sub(before.0)?, now.1.checked_sub(before.1)?);
    (all > 0).then(|| (1000.0 * busy as f64 / all as f64).round() / 10.0)
}

/// Returns the busy ticks and all ticks of all processors together, from the first line of /proc/stat. The 4th and 5th
/// numbers are idle time and waiting for disks.
fn busy_and_all(stat: &str) -> Option<(u64, u64)> {
    let ticks: Vec<u64> = stat
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|tick| tick.parse().ok())
        .collect();
    let all: u64 = ticks.iter().sum();
    Some((all - ticks.get(3)? - ticks.get(4)?, all))
}

fn used_and_all(meminfo: &str) -> Option<(u64, u64)> {
    let bytes = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
    };
    let all = bytes("MemTotal:")?;
    Some((all.saturating_sub(bytes("MemAvailable:")?), all))
}

type Device = *mut c_void;

/// The functions of libnvidia-ml that are called, as `nvml.h` declares them. 0 is success.
struct Nvml {
    count: unsafe extern "C" fn(*mut c_uint) -> c_int,
    handle: unsafe extern "C" fn(c_uint, *mut Device) -> c_int,
    name: unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int,
    utilization: unsafe extern "C" fn(Device, *mut [c_uint; 2]) -> c_int,
    temperature: unsafe extern "C" fn(Device, c_int, *mut c_uint) -> c_int,
    memory: unsafe extern "C" fn(Device, *mut [u64; 3]) -> c_int,
}

impl Nvml {
    /// Opens and starts the library; `None` if there is no library or no driver.
    fn open() -> Option<Nvml> {
        // SAFETY: opening the library runs its constructors. It is never closed, so that its functions stay valid.
        // Each symbol is cast to the type that nvml.h, whose names and versions are ABI, gives it.
        unsafe {
            let library = libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            if library.is_null() {
                return None;
            }
            let find = |name: &CStr| {
                let symbol = libc::dlsym(library, name.as_ptr());
                (!symbol.is_null()).then_some(symbol)
            };
            let start: unsafe extern "C" fn() -> c_int = std::mem::transmute(find(c"nvmlInit_v2")?);
            let nvml = Nvml {
                count: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_uint) -> c_int>(find(
                    c"nvmlDeviceGetCount_v2",
                )?),
                handle: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_uint, *mut Device) -> c_int>(
                    find(c"nvmlDeviceGetHandleByIndex_v2")?,
                ),
                name: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int,
                >(find(c"nvmlDeviceGetName")?),
                utilization: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(Device, *mut [c_uint; 2]) -> c_int,
                >(find(c"nvmlDeviceGetUtilizationRates")?),
                temperature: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(Device, c_int, *mut c_uint) -> c_int,
                >(find(c"nvmlDeviceGetTemperature")?),
                memory: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(Device, *mut [u64; 3]) -> c_int,
                >(find(c"nvmlDeviceGetMemoryInfo")?),
            };
            (start() == 0).then_some(nvml)
        }
    }

    fn gpus(&self) -> Vec<Gpu> {
        let mut count = 0;
        // SAFETY: the library is started; the pointer is to a number of ours.
        match unsafe { (self.count)(&raw mut count) } {
            0 => (0..count).filter_map(|id| self.gpu(id)).collect(),
            _ => Vec::new(),
        }
    }

    fn gpu(&self, id: u32) -> Option<Gpu> {
        const NAME_BYTES_MAX: usize = 96; // NVML_DEVICE_NAME_V2_BUFFER_SIZE
        const TEMPERATURE_GPU: c_int = 0;
        let mut device: Device = std::ptr::null_mut();
        let mut name = [0 as c_char; NAME_BYTES_MAX];
        // gpu and memory; total, free and used: the fields of nvmlUtilization_t and nvmlMemory_t.
        let (mut rates, mut degrees, mut memory) = ([0; 2], 0, [0; 3]);
        // SAFETY: as above. `device` is used only if the library gave it, the name's length goes with the name, and
        // the arrays have the layout of the library's structures.
        unsafe {
            if (self.handle)(id, &raw mut device) != 0 || (self.memory)(device, &raw mut memory) != 0 {
                return None;
            }
            let named = (self.name)(device, name.as_mut_ptr(), NAME_BYTES_MAX as c_uint) == 0;
            let loaded = (self.utilization)(device, &raw mut rates) == 0;
            let measured = (self.temperature)(device, TEMPERATURE_GPU, &raw mut degrees) == 0;
            let name = if named { CStr::from_ptr(name.as_ptr()).to_string_lossy() } else { "".into() };
            Some(Gpu {
                id,
                name: name.into_owned(),
                load_percent: loaded.then_some(rates[0]),
                temperature_celsius: measured.then_some(degrees),
                memory_used_bytes: memory[2],
                memory_bytes: memory[0],
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_told_in_kaitos_words_with_right_sizes() {
        let gpu = Gpu {
            id: 0,
            name: "NVIDIA H200".into(),
            load_percent: Some(25),
            temperature_celsius: None,
            memory_used_bytes: 1 << 30,
            memory_bytes: 3 << 29,
        };
        assert_eq!(
            Sample { gpus: Some(vec![gpu]), cpu: None }.json().to_string(),
            "{\"gpu_info\":[{\"id\":\"0\",\"name\":\"NVIDIA H200\",\"load\":\"25.00%\",\"temperature\":null,\
             \"memory\":{\"used\":\"1.00 GB\",\"total\":\"1.50 GB\"}}],\"cpu_info\":null}"
        );
    }

    #[test]
    fn a_processors_load_is_that_between_two_samples() {
        let ticks = |text: &str| busy_and_all(text).unwrap();
        let before = ticks("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1");
        let now = ticks("cpu  150 0 125 750 175 0 0 0 0 0\n");
        assert_eq!((before, load(before, now)), ((200, 1000), Some(37.5)));
        let memory = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n";
        assert_eq!(used_and_all(memory), Some((600 * 1024, 1000 * 1024)));
    }
}
