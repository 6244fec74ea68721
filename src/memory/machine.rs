//! The device to train on: its kind, its memory and its rates.

/// The kind of device that trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A CPU.
    Cpu {
        /// Threads that compute.
        threads: usize,
    },
    /// A GPU.
    Gpu,
}

/// The device to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// The name in messages: `h200`, `this CPU`.
    pub name: String,
    /// The kind of device.
    pub place: Place,
    /// Bytes that may be used.
    pub memory: u64,
    /// Bytes of these that are taken before the first tensor.
    pub taken: u64,
    /// Compute capability of a GPU (major, minor).
    pub capability: Option<(i32, i32)>,
    /// Rates of the device.
    pub rates: Rates,
    /// Processes that train together, each on a device like this one.
    pub ranks: usize,
    /// Bytes of host memory that may be used, over the machines of all ranks; `None`: unknown.
    pub host: Option<u64>,
}

/// The rates of a machine, per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// FLOP/s of large bf16 products (f32 products if the run computes in f32).
    pub matrix: f64,
    /// Bytes/s of copies in the machine's memory.
    pub copy: f64,
    /// Bytes/s between device and host.
    pub link: f64,
    /// Bytes/s that a device receives from the others.
    pub peer: f64,
    /// Whether the rates were measured on this machine or one of its kind. If not, they are assumed.
    pub measured: bool,
}

/// Bytes/s that a device receives over a network between machines: 25 Gb/s in practice. It is assumed, because no
/// device reports it; a faster network makes a plan better than it says.
const NETWORK: f64 = 2.8e9;

impl Rates {
    /// Returns the rates of a device whose others are on several machines.
    pub fn over_a_network(self) -> Rates {
        Rates { peer: self.peer.min(NETWORK), ..self }
    }
}

/// The share of the free memory that may be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// A share of the free memory, in (0, 1].
    Share(f64),
    /// Bytes.
    Bytes(u64),
}

/// Share of the free memory that a plan takes by default. Other processes may need the rest.
pub(super) const SHARE_OF_GPU: f64 = 0.96;
const SHARE_OF_CPU: f64 = 0.9;

impl Limit {
    /// Parses `20GiB`, `800MB`, `21474836480`, or a share such as `0.8`.
    pub fn parse(text: &str) -> Option<Limit> {
        const UNITS: [(&str, f64); 8] = [
            ("KiB", 1024.0),
            ("MiB", 1_048_576.0),
            ("GiB", 1_073_741_824.0),
            ("kB", 1e3),
            ("MB", 1e6),
            ("GB", 1e9),
            ("Mi", 1_048_576.0),
            ("Gi", 1_073_741_824.0),
        ];
        let text = text.trim();
        let unit = UNITS.into_iter().find(|(name, _)| text.ends_with(name));
        let number = text.strip_suffix(unit.map_or("", |(name, _)| name))?.trim().parse::<f64>().ok()?;
        match unit {
            _ if !(number > 0.0 && number.is_finite()) => None,
            Some((_, factor)) => Some(Limit::Bytes((number * factor) as u64)),
            None if number <= 1.0 => Some(Limit::Share(number)),
            None => Some(Limit::Bytes(number as u64)),
        }
    }
}

impl Machine {
    /// Returns whether a product in 8 bits scales rows and columns itself, as it does on GPUs of 9.0 alone.
    pub fn scales_8_bits(&self) -> bool {
        self.capability == Some((9, 0))
    }

    /// Returns `machines` machines like this one, whose ranks all train together.
    pub fn times(self, machines: usize) -> Machine {
        if machines <= 1 {
            return self;
        }
        let host = self.host.map(|bytes| bytes.saturating_mul(machines as u64));
        Machine { ranks: self.ranks * machines, host, rates: self.rates.over_a_network(), ..self }
    }

    /// Reduces the memory to `limit`, or to the default share.
    pub(super) fn limited(mut self, limit: Option<Limit>) -> Machine {
        let share = match self.place {
            Place::Cpu { .. } => SHARE_OF_CPU,
            Place::Gpu => SHARE_OF_GPU,
        };
        self.memory = match limit.unwrap_or(Limit::Share(share)) {
            Limit::Share(share) => (self.memory as f64 * share) as u64,
            Limit::Bytes(bytes) => bytes.min(self.memory),
        };
        self
    }
}
