//! The name of a GPU or an instance type -> its usable memory and its speed: the one table of GPUs.

use crate::fault::{Fault, Kind, Result};

use super::machine::{Limit, Machine, Place, Rates};

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
    /// Whether both rates were measured on such a card. If not, they are 85 % of its data sheet, or less if the
    /// card's power is known to be the limit.
    pub measured: bool,
}

/// The cards, in order of memory.
#[rustfmt::skip]
pub const CARDS: [Card; 17] = [
    card("t4", 14.6, None, 0.24),
    card("v100-16", 15.8, None, 0.77),
    card("l4", 22.0, Some(62.0), 0.26),
    card("a10g", 22.0, Some(60.0), 0.50),
    card("a10", 22.0, Some(80.0), 0.50),
    card("rtx-4090", 23.5, Some(150.0), 0.88),
    card("rtx-3090", 23.6, Some(60.0), 0.80),
    card("rtx-5090", 31.3, Some(180.0), 1.50),
    card("v100-32", 31.7, None, 0.77),
    card("a100-40", 39.4, Some(265.0), 1.32),
    card("l40s", 44.4, Some(250.0), 0.73),
    card("a6000", 47.4, Some(120.0), 0.65),
    card("h100", 79.1, Some(680.0), 2.85),
    card("a100-80", 79.1, Some(265.0), 1.75),
    card("h100-nvl", 93.0, Some(600.0), 3.30),
    Card { name: "h200", memory_gib: 139.8, matrix: Some(790.0), copy: 4.3, measured: true },
    card("b200", 178.0, Some(1500.0), 6.80),
];

/// Instance types of Azure and AWS, as KAITO lists them: (instance type, card, number of cards).
#[rustfmt::skip]
pub const INSTANCES: [(&str, &str, usize); 31] = [
    ("Standard_NC6s_v3", "v100-16", 1),
    ("Standard_NC12s_v3", "v100-16", 2),
    ("Standard_NC24s_v3", "v100-16", 4),
    ("Standard_NC24rs_v3", "v100-16", 4),
    ("Standard_NC4as_T4_v3", "t4", 1),
    ("Standard_NC8as_T4_v3", "t4", 1),
    ("Standard_NC16as_T4_v3", "t4", 1),
    ("Standard_NC64as_T4_v3", "t4", 4),
    ("Standard_NV36ads_A10_v5", "a10", 1),
    ("Standard_NV36adms_A10_v5", "a10", 1),
    ("Standard_NV72ads_A10_v5", "a10", 2),
    ("Standard_NC24ads_A100_v4", "a100-80", 1),
    ("Standard_NC48ads_A100_v4", "a100-80", 2),
    ("Standard_NC96ads_A100_v4", "a100-80", 4),
    ("Standard_ND96asr_v4", "a100-40", 8),
    ("Standard_ND96asr_A100_v4", "a100-40", 8),
    ("Standard_ND96amsr_A100_v4", "a100-80", 8),
    ("Standard_NC40ads_H100_v5", "h100-nvl", 1),
    ("Standard_NC80adis_H100_v5", "h100-nvl", 2),
    ("Standard_ND96isr_H100_v5", "h100", 8),
    ("Standard_ND96isr_H200_v5", "h200", 8),
    ("g4dn.xlarge", "t4", 1),
    ("g5.xlarge", "a10g", 1),
    ("g5.12xlarge", "a10g", 4),
    ("g6.xlarge", "l4", 1),
    ("g6e.xlarge", "l40s", 1),
    ("p3.2xlarge", "v100-16", 1),
    ("p4d.24xlarge", "a100-40", 8),
    ("p4de.24xlarge", "a100-80", 8),
    ("p5.48xlarge", "h100", 8),
    ("p5en.48xlarge", "h200", 8),
];

/// Device memory that the driver, the context and hone's kernels take before the first tensor.
const CONTEXT_BYTES: u64 = 600 << 20;
/// Rate of pinned copies between a card and its host, in bytes/s: PCIe 4 x16 in practice.
const LINK: f64 = 22e9;

const fn card(name: &'static str, memory_gib: f64, matrix: Option<f64>, copy: f64) -> Card {
    Card { name, memory_gib, matrix, copy, measured: false }
}

impl Card {
    /// Memory in bytes.
    pub fn bytes(&self) -> u64 {
        (self.memory_gib * (1u64 << 30) as f64) as u64
    }

    /// The card with nothing on it but hone's own context, limited to `limit`. A card without bf16 is a capacity
    /// fault.
    pub fn machine(&self, limit: Option<Limit>) -> Result<Machine> {
        let Some(matrix) = self.matrix else {
            return Err(Fault::new(
                Kind::Capacity,
                format!("{} cannot compute in bf16, which the CUDA engine needs", self.name),
            )
            .help("use a card of the Ampere generation or later: l4, a10, a100-80, h100, ..."));
        };
        let rates =
            Rates { matrix: matrix * 1e12, copy: self.copy * 1e12, link: LINK, measured: self.measured };
        let (name, memory) = (self.name.into(), self.bytes());
        let machine = Machine { name, place: Place::Gpu, memory, taken: CONTEXT_BYTES, rates };
        Ok(machine.limited(limit))
    }
}

/// (card, number of cards) of a card's name or an instance type. An unknown name is a usage fault.
pub fn find(name: &str) -> Result<(Card, usize)> {
    let same = |other: &str| other.eq_ignore_ascii_case(name);
    let instance = INSTANCES.iter().find(|(instance, _, _)| same(instance));
    let (wanted, count) = instance.map_or((name, 1), |(_, card, count)| (*card, *count));
    let card = CARDS.into_iter().find(|card| card.name.eq_ignore_ascii_case(wanted));
    card.map(|card| (card, count)).ok_or_else(|| {
        let names: Vec<&str> = CARDS.iter().map(|card| card.name).collect();
        Fault::usage(format!("--gpu {name}: expected one of {}", names.join(", ")))
            .help("an instance type such as Standard_NC24ads_A100_v4 works too")
    })
}

/// The rates of a device by the name that it reports (`NVIDIA A100-SXM4-80GB`). A device that is not in the table
/// gets those of a small card.
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
    let card = found.copied().unwrap_or(card("", 0.0, Some(60.0), 0.3));
    Rates {
        matrix: card.matrix.unwrap_or(60.0) * 1e12,
        copy: card.copy * 1e12,
        link: LINK,
        measured: card.measured,
    }
}

/// Assumed rates of a server's CPU. They only serve to compare levels.
pub fn cpu_rates(threads: usize) -> Rates {
    let threads = threads as f64;
    Rates { matrix: 150e9 * threads, copy: 10e9 * threads.min(16.0), link: 10e9, measured: false }
}

/// The cards that can train and have at least `bytes` of memory, smallest first.
pub fn at_least(bytes: u64) -> impl Iterator<Item = &'static Card> {
    CARDS.iter().filter(move |card| card.matrix.is_some() && card.bytes() >= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_types_are_aliases_of_cards() {
        for (instance, name, count) in INSTANCES {
            let (card, found) = find(&instance.to_lowercase()).unwrap();
            assert_eq!((card.name, found), (name, count));
        }
        assert_eq!(find("a100-80").unwrap().1, 1);
        assert!(find("h900").unwrap_err().message.contains("h100-nvl"));
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
