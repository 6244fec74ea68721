//! The name of a GPU or an instance type -> its usable memory and its speed: the one table of GPUs.

use crate::fault::{Fault, Kind, Result};

use super::machine::{Limit, Machine, Place, Rates, SHARE_OF_GPU};

/// A GPU as a process finds it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Card {
    /// The name in `--gpu`.
    pub name: &'static str,
    /// Memory in GiB as CUDA reports it, which is less than the advertised size.
    pub memory_gib: f64,
    /// Highest rate of dense bf16 products, in TFLOP/s. `None`: the card has no bf16.
    pub matrix: Option<f64>,
    /// Rate of copies inside the card, in TB/s; reads and writes both count.
    pub copy: f64,
    /// Rate of page-locked copies between a card and its host, in GB/s.
    pub link: f64,
    /// Rate at which a card receives from the others of its machine, in GB/s: 80 % of NVLink's one direction, or PCIe.
    /// The form of the card in PCIe slots is taken if there are both.
    pub peer: f64,
    /// Whether the first two rates were measured on such a card. If not, they are 85 % of its data sheet, or less if
    /// the card's power is known to be the limit.
    pub measured: bool,
}

/// The cards, in order of memory.
#[rustfmt::skip]
pub const CARDS: [Card; 17] = [
    card("t4", 14.6, None, 0.24, PCIE_3, PCIE_3),
    card("v100-16", 15.8, None, 0.77, PCIE_3, 120.0),
    card("l4", 22.0, Some(62.0), 0.26, PCIE_4, PCIE_4),
    card("a10g", 22.0, Some(60.0), 0.50, PCIE_4, PCIE_4),
    card("a10", 22.0, Some(80.0), 0.50, PCIE_4, PCIE_4),
    card("rtx-4090", 23.5, Some(150.0), 0.88, PCIE_4, PCIE_4),
    card("rtx-3090", 23.6, Some(60.0), 0.80, PCIE_4, PCIE_4),
    card("rtx-5090", 31.3, Some(180.0), 1.50, PCIE_5, PCIE_5),
    card("v100-32", 31.7, None, 0.77, PCIE_3, 120.0),
    card("a100-40", 39.4, Some(265.0), 1.32, PCIE_4, 240.0),
    card("l40s", 44.4, Some(250.0), 0.73, PCIE_4, PCIE_4),
    card("a6000", 47.4, Some(120.0), 0.65, PCIE_4, PCIE_4),
    Card { measured: true, ..card("h100", 79.1, Some(800.0), 3.00, PCIE_5, 360.0) },
    card("a100-80", 79.1, Some(265.0), 1.75, PCIE_4, PCIE_4),
    card("h100-nvl", 93.0, Some(600.0), 3.30, PCIE_5, 240.0),
    Card { measured: true, ..card("h200", 139.8, Some(790.0), 4.30, PCIE_5, 360.0) },
    card("b200", 178.0, Some(1500.0), 6.80, PCIE_5, 720.0),
];

/// Instance types of Azure and AWS, as KAITO lists them: (instance type, card, number of cards, GiB of the machine).
#[rustfmt::skip]
pub const INSTANCES: [(&str, &str, usize, f64); 31] = [
    ("Standard_NC6s_v3", "v100-16", 1, 112.0),
    ("Standard_NC12s_v3", "v100-16", 2, 224.0),
    ("Standard_NC24s_v3", "v100-16", 4, 448.0),
    ("Standard_NC24rs_v3", "v100-16", 4, 448.0),
    ("Standard_NC4as_T4_v3", "t4", 1, 28.0),
    ("Standard_NC8as_T4_v3", "t4", 1, 56.0),
    ("Standard_NC16as_T4_v3", "t4", 1, 110.0),
    ("Standard_NC64as_T4_v3", "t4", 4, 440.0),
    ("Standard_NV36ads_A10_v5", "a10", 1, 440.0),
    ("Standard_NV36adms_A10_v5", "a10", 1, 880.0),
    ("Standard_NV72ads_A10_v5", "a10", 2, 880.0),
    ("Standard_NC24ads_A100_v4", "a100-80", 1, 220.0),
    ("Standard_NC48ads_A100_v4", "a100-80", 2, 440.0),
    ("Standard_NC96ads_A100_v4", "a100-80", 4, 880.0),
    ("Standard_ND96asr_v4", "a100-40", 8, 900.0),
    ("Standard_ND96asr_A100_v4", "a100-40", 8, 900.0),
    ("Standard_ND96amsr_A100_v4", "a100-80", 8, 1900.0),
    ("Standard_NC40ads_H100_v5", "h100-nvl", 1, 320.0),
    ("Standard_NC80adis_H100_v5", "h100-nvl", 2, 640.0),
    ("Standard_ND96isr_H100_v5", "h100", 8, 1900.0),
    ("Standard_ND96isr_H200_v5", "h200", 8, 1850.0),
    ("g4dn.xlarge", "t4", 1, 16.0),
    ("g5.xlarge", "a10g", 1, 16.0),
    ("g5.12xlarge", "a10g", 4, 192.0),
    ("g6.xlarge", "l4", 1, 16.0),
    ("g6e.xlarge", "l40s", 1, 32.0),
    ("p3.2xlarge", "v100-16", 1, 61.0),
    ("p4d.24xlarge", "a100-40", 8, 1152.0),
    ("p4de.24xlarge", "a100-80", 8, 1152.0),
    ("p5.48xlarge", "h100", 8, 2048.0),
    ("p5en.48xlarge", "h200", 8, 2048.0),
];

/// The beginnings of names of cards, and their compute capability.
const CAPABILITIES: [(&str, (i32, i32)); 10] = [
    ("t4", (7, 5)),
    ("v100", (7, 0)),
    ("l4", (8, 9)),
    ("a100", (8, 0)),
    ("a", (8, 6)),
    ("rtx-3090", (8, 6)),
    ("rtx-4090", (8, 9)),
    ("rtx-5090", (12, 0)),
    ("h", (9, 0)),
    ("b200", (10, 0)),
];

/// Most cards of a machine that a name may ask for: `64xh100`.
const CARDS_MAX: usize = 64;
/// Share of a machine's memory that a run may use of the host.
const SHARE_OF_HOST: f64 = 0.8;

/// Device memory that the driver, the context and hone's kernels take before the first tensor.
const CONTEXT_BYTES: u64 = 600 << 20;
/// Rates of page-locked copies over 16 lanes of PCIe in practice, in GB/s.
const PCIE_3: f64 = 11.0;
const PCIE_4: f64 = 22.0;
const PCIE_5: f64 = 45.0;

const fn card(
    name: &'static str,
    memory_gib: f64,
    matrix: Option<f64>,
    copy: f64,
    link: f64,
    peer: f64,
) -> Card {
    Card { name, memory_gib, matrix, copy, link, peer, measured: false }
}

/// Returns the machine of a name of `--gpu`: all of its cards, each limited to `limit`.
///
/// # Errors
/// Usage: an unknown name. Capacity: a card without bf16.
pub fn machine(name: &str, limit: Option<Limit>) -> Result<Machine> {
    let (card, ranks) = find(name)?;
    Ok(Machine { ranks, host: host_bytes(name), ..card.machine(limit)? })
}

/// Returns the number of bytes of an instance type's host memory that a run may use; `None` if it is not in the table.
pub fn host_bytes(instance: &str) -> Option<u64> {
    let found = INSTANCES.iter().find(|(name, ..)| name.eq_ignore_ascii_case(instance));
    found.map(|(_, _, _, gib)| (gib * SHARE_OF_HOST * (1u64 << 30) as f64) as u64)
}

impl Card {
    /// Returns the memory in bytes.
    pub fn bytes(&self) -> u64 {
        (self.memory_gib * (1u64 << 30) as f64) as u64
    }

    /// Returns the card with nothing on it but hone's own context, limited to `limit`. A card without bf16 is a
    /// capacity fault.
    pub fn machine(&self, limit: Option<Limit>) -> Result<Machine> {
        let Some(matrix) = self.matrix else {
            return Err(Fault::new(
                Kind::Capacity,
                format!("{} cannot compute in bf16, which the CUDA engine needs", self.name),
            )
            .help("use a card of the Ampere generation or later: l4, a10, a100-80, h100, ..."));
        };
        let (name, memory, rates) = (self.name.into(), self.bytes(), self.rates(matrix));
        let place = Place::Gpu;
        let capability = Some(self.capability());
        let machine =
            Machine { name, place, memory, taken: CONTEXT_BYTES, capability, rates, ranks: 1, host: None };
        Ok(machine.limited(limit))
    }

    /// Returns the compute capability (major, minor).
    pub fn capability(&self) -> (i32, i32) {
        let of = CAPABILITIES.iter().find(|(family, _)| self.name.starts_with(family));
        of.map_or((8, 0), |(_, capability)| *capability)
    }

    fn rates(&self, matrix: f64) -> Rates {
        Rates {
            matrix: matrix * 1e12,
            copy: self.copy * 1e12,
            link: self.link * 1e9,
            peer: self.peer * 1e9,
            measured: self.measured,
        }
    }
}

/// Returns (card, number of cards) of a card's name, of an instance type, or of a number of cards such as `4xl4`. An
/// unknown name is a usage fault.
pub fn find(name: &str) -> Result<(Card, usize)> {
    let same = |other: &str| other.eq_ignore_ascii_case(name);
    let instance = INSTANCES.iter().find(|instance| same(instance.0));
    let several = name.split_once(['x', 'X']).and_then(|(count, card)| Some((card, count.parse().ok()?)));
    let several = several.filter(|(_, count)| (1..=CARDS_MAX).contains(count));
    let (wanted, count) =
        instance.map(|(_, card, count, _)| (*card, *count)).or(several).unwrap_or((name, 1));
    let card = CARDS.into_iter().find(|card| card.name.eq_ignore_ascii_case(wanted));
    card.map(|card| (card, count)).ok_or_else(|| {
        let names: Vec<&str> = CARDS.iter().map(|card| card.name).collect();
        Fault::usage(format!("--gpu {name}: expected one of {}", names.join(", "))).help(
            "several cards of a machine are 4xl4; an instance type such as Standard_NC24ads_A100_v4 works too",
        )
    })
}

/// Returns the rates of a device by the name that it reports (`NVIDIA A100-SXM4-80GB`). A device that is not in the
/// table gets those of a small card.
pub fn like(device: &str) -> Rates {
    let plain = |text: &str| text.to_lowercase().replace([' ', '-'], "");
    let wanted = plain(device);
    // The longest name contained in the device's name wins, so `l40s` before `l4`. An A100 writes its memory
    // elsewhere.
    let named = |card: &&Card| {
        let family = card.name.split('-').next().unwrap_or(card.name);
        wanted.contains(&plain(card.name)) || (family == "a100" && wanted.contains(family))
    };
    let found = CARDS.iter().filter(named).filter(|card| card.matrix.is_some());
    let found = found.max_by_key(|card| card.name.len());
    let card = found.copied().unwrap_or(card("", 0.0, Some(60.0), 0.3, PCIE_4, PCIE_4));
    card.rates(card.matrix.unwrap_or(60.0))
}

/// Returns the assumed rates of a server's CPU. They only serve to compare levels.
pub fn cpu_rates(threads: usize) -> Rates {
    let threads = threads as f64;
    let copy = 10e9 * threads.min(16.0);
    Rates { matrix: 150e9 * threads, copy, link: 10e9, peer: 1e9, measured: false }
}

/// Returns the cards that can train and of which at least `bytes` may be used, smallest first.
pub fn at_least(bytes: u64) -> impl Iterator<Item = &'static Card> {
    let usable = |card: &Card| (card.bytes() as f64 * SHARE_OF_GPU) as u64;
    CARDS.iter().filter(move |card| card.matrix.is_some() && usable(card) >= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_types_are_aliases_of_cards() {
        for (instance, name, count, gib) in INSTANCES {
            let (card, found) = find(&instance.to_lowercase()).unwrap();
            assert_eq!((card.name, found), (name, count));
            assert!(
                gib >= 16.0 && (card.matrix.is_none() || machine(instance, None).unwrap().host.is_some())
            );
        }
        assert_eq!((find("4xL4").unwrap().0.name, find("4xL4").unwrap().1), ("l4", 4));
        let four = machine("4xrtx-4090", None).unwrap();
        assert_eq!((four.ranks, four.host), (4, None));
        for wrong in ["0xl4", "65xl4", "xl4", "4x", "4xstandard_nc24ads_a100_v4"] {
            assert!(find(wrong).unwrap_err().help.unwrap().contains("4xl4"), "{wrong}");
        }
        assert_eq!(find("a100-80").unwrap().1, 1);
        assert!(find("h900").unwrap_err().message.contains("h100-nvl"));
    }

    #[test]
    fn compute_capabilities_are_those_of_the_families() {
        let of = |name: &str| find(name).unwrap().0.capability();
        assert_eq!(
            (of("l40s"), of("rtx-4090"), of("h100-nvl"), of("h200")),
            ((8, 9), (8, 9), (9, 0), (9, 0))
        );
        assert_eq!(
            (of("a10g"), of("a6000"), of("rtx-3090"), of("a100-40")),
            ((8, 6), (8, 6), (8, 6), (8, 0))
        );
        let known = |card: &Card| CAPABILITIES.iter().any(|(family, _)| card.name.starts_with(family));
        assert!(CARDS.iter().all(known));
    }

    #[test]
    fn devices_are_known_by_the_names_they_give() {
        let rate = |name: &str| like(name).matrix / 1e12;
        assert_eq!(rate("NVIDIA A100-SXM4-80GB"), 265.0);
        assert_eq!(rate("NVIDIA L40S"), 250.0);
        assert_eq!(rate("NVIDIA L4"), 62.0);
        assert_eq!(rate("NVIDIA A10G"), 60.0);
        assert_eq!(rate("NVIDIA GeForce RTX 4090"), 150.0);
        assert_eq!(rate("NVIDIA H100 NVL"), 600.0);
        assert!(like("NVIDIA H200").measured);
        assert_eq!(rate("something new"), 60.0);
    }

    #[test]
    fn cards_stand_in_order_of_memory_and_those_without_bf16_are_refused() {
        assert!(CARDS.is_sorted_by_key(|card| card.bytes()));
        let refused: Vec<&str> =
            CARDS.iter().filter(|card| card.machine(None).is_err()).map(|card| card.name).collect();
        assert_eq!(refused, ["t4", "v100-16", "v100-32"]);
        assert_eq!(at_least(40 << 30).next().map(|card| card.name), Some("l40s"));
    }
}
