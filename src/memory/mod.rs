//! Facts, adapter and available memory -> the level of each layer and the tokens of a pass. If nothing fits, the fault
//! gives the numbers.
//!
//! The weights of the layers lie on the device if they fit. If not, the ranks share them, or they are streamed from
//! host memory (`Residency`). A pass needs memory for values that are always there (`terms::fixed`), for values that
//! the layers keep (`Keep`, layer by layer), and for one layer at work. A GPU may also keep the 4-bit weights of layers
//! expanded, so that their products need not expand them. Among the combinations that fit, the plan takes the number of
//! tokens, the levels and the kept weights with the most tokens per second (`cost`), since memory should go to the use
//! that saves the most time. Results do not depend on it: an optimizer step has the same examples and the same sum of
//! gradients.

pub mod card;
pub mod cost;
mod machine;
mod plan;
pub mod serving;
pub mod show;
mod task;
mod terms;

use std::sync::Arc;

use candle_core::Device;

use crate::device;
use crate::facts::{Keep, Precision, Quantization, Residency};
use crate::fault::{Fault, Result};
use crate::model::residency::Home;
use crate::model::shape;
use crate::ranks::Collective;
use crate::words;

use crate::ops::change::Change;

use cost::{Counter, Work, efficiency};
use plan::GROWING;
use terms::{Kept, Layers};

pub use machine::{Limit, Machine, Place};
pub use plan::Plan;
pub use task::{Options, Task};
pub use terms::Term;

/// Share of the growing lines that is added for gaps, because blocks have many sizes.
const GAPS: f64 = 1.0 / 32.0;
/// Share of the free host memory that weights may take.
const SHARE_OF_HOST: f64 = 0.8;
/// After a failure, the next plan may use this share of the memory of the growing lines.
const SMALLER: f64 = 0.75;

/// A plan in use. It shrinks if memory still runs out.
#[derive(Clone, Debug)]
pub struct Running {
    /// The training run.
    pub task: Task,
    /// The device.
    pub machine: Machine,
    /// The plan in use.
    pub plan: Plan,
}

impl Running {
    /// Starts with the fastest plan that fits; if none does, this is a capacity fault.
    pub fn start(task: Task, machine: Machine) -> Result<Running> {
        let plan = solve(&task, &machine)?;
        Ok(Running { task, machine, plan })
    }

    /// Changes to the next smaller plan. Returns false if there is none.
    pub fn shrink(&mut self) -> bool {
        match next_smaller(&self.task, &self.machine, &self.plan) {
            Some(plan) => self.plan = plan,
            None => return false,
        }
        true
    }

    /// Returns the place of the layers' weights in a decoder for this plan. `ranks` train together.
    pub fn home(&self, ranks: Arc<dyn Collective>) -> Home {
        match self.plan.residency {
            Residency::Resident => Home::Device,
            Residency::Shared => Home::Ranks(ranks),
            Residency::Streamed => Home::Host,
        }
    }

    /// Returns the plan as a table for people.
    pub fn table(&self) -> String {
        self.plan.table(&self.task, &self.machine)
    }
}

impl Machine {
    /// Returns the opened device with the memory that is free on it now.
    pub fn of(device: &Device, limit: Option<Limit>) -> Machine {
        let name = device::name(device);
        let place = match device {
            Device::Cpu => Place::Cpu { threads: rayon::current_num_threads() },
            _ => Place::Gpu,
        };
        // If the system does not report free memory, nothing is refused.
        let free = device::memory_free(device).unwrap_or(u64::MAX / 2);
        let rates = match place {
            Place::Cpu { threads } => card::cpu_rates(threads),
            Place::Gpu => card::like(&name),
        };
        let host = machine_memory().filter(|_| place == Place::Gpu);
        let capability = device::capability(device);
        Machine { name, place, memory: free, taken: 0, capability, rates, ranks: 1, host }.limited(limit)
    }
}

/// The first GPUs with products in 8 bits.
const EIGHT_BITS_MIN: (i32, i32) = (8, 9);

/// Refuses products in 8 bits on a device that has none.
///
/// # Errors
/// Config: the device is a CPU, or a GPU of before Ada.
pub fn check_precision(precision: Precision, machine: &Machine) -> Result<()> {
    let found = match (precision, machine.capability) {
        (Precision::F32 | Precision::Bf16, _) => return Ok(()),
        (Precision::Fp8, Some(found)) if found >= EIGHT_BITS_MIN => return Ok(()),
        (Precision::Fp8, Some((major, minor))) => format!("found compute capability {major}.{minor}"),
        (Precision::Fp8, None) => "found no GPU".into(),
    };
    let (major, minor) = EIGHT_BITS_MIN;
    Err(Fault::config(format!(
        "compute: fp8: {} has no products in 8 bits: {found}, expected a GPU of compute capability {major}.{minor} or later",
        machine.name
    ))
    .help("remove `compute`, or use an L4, L40S, RTX 4090, H100, H200 or newer GPU"))
}

/// Returns the host memory that a plan may take for weights.
fn machine_memory() -> Option<u64> {
    crate::machine::memory_available().map(|bytes| (bytes as f64 * SHARE_OF_HOST) as u64)
}

/// Returns the fastest plan that fits, with the weights of the layers on the device if there is one. If none fits, the
/// capacity fault lists the largest terms and the remedies.
///
/// # Errors
/// Capacity: nothing fits. Config: the task names a residency that the base or the number of ranks does not allow,
/// or products in 8 bits that the device does not have.
pub fn solve(task: &Task, machine: &Machine) -> Result<Plan> {
    check_precision(task.precision, machine)?;
    let choices = residencies(task, machine)?;
    let solvers = || choices.iter().map(|residency| Solver::new(task, machine, *residency));
    let found = solvers().filter(Solver::fits_the_host).find_map(|solver| solver.within(machine.memory));
    found.ok_or_else(|| {
        let fewest = solvers().min_by_key(|solver| (!solver.fits_the_host(), solver.smallest().bytes()));
        refusal(&fewest.expect("at least one choice"))
    })
}

/// Returns the possible places of the layers' weights, from the fastest to the slowest.
fn residencies(task: &Task, machine: &Machine) -> Result<Vec<Residency>> {
    let allowed = |residency: Residency| match (residency, task.quantization) {
        (Residency::Resident, _) => Ok(()),
        (_, Quantization::None) => Err("the base is not quantised: set QuantizationConfig.load_in_4bit"),
        (Residency::Shared, _) if machine.ranks == 1 => Err(
            "one process trains, and nobody holds the other pieces: train on several GPUs, or choose streamed",
        ),
        (Residency::Shared | Residency::Streamed, _) => Ok(()),
    };
    if let Some(wanted) = task.residency {
        let refused = |why| Fault::config(format!("residency: {}: {why}", wanted.name()));
        return allowed(wanted).map(|()| vec![wanted]).map_err(refused);
    }
    // On a CPU, host memory is the same memory.
    let useful = |residency: &Residency| machine.place == Place::Gpu || *residency != Residency::Streamed;
    Ok(Residency::ALL.into_iter().filter(useful).filter(|residency| allowed(*residency).is_ok()).collect())
}

/// Returns the number of bytes of passes of `tokens` tokens with every layer at one level, whether they fit or not.
pub fn needed(task: &Task, machine: &Machine, tokens: usize, keep: Keep) -> u64 {
    Solver::new(task, machine, Residency::Resident)
        .describe(tokens, &vec![keep; task.facts.layers.len()], 0)
        .bytes()
}

/// Returns the FLOPs of a step of `tokens` tokens if nothing is computed again; utilisation is measured by it.
pub fn useful_flops(task: &Task, machine: &Machine, tokens: usize) -> f64 {
    let everything = vec![Keep::Everything; task.facts.layers.len()];
    Solver::new(task, machine, Residency::Resident).work(tokens, &everything, 0).flops()
}

/// Returns the plan to continue with if `plan` ran out of memory; `None` after the smallest. Weights that are kept
/// expanded go first, and do not come back.
pub fn next_smaller(task: &Task, machine: &Machine, plan: &Plan) -> Option<Plan> {
    // The weights lie where they were loaded.
    let solver = Solver { may_expand: false, ..Solver::new(task, machine, plan.residency) };
    if plan.expanded > 0 {
        return Some(solver.describe(plan.tokens, &plan.keep, 0));
    }
    let (all, growing) = (plan.bytes(), plan.growing());
    let room = all - growing + (growing as f64 * SMALLER) as u64;
    let smallest = || Some(solver.smallest()).filter(|smallest| smallest.bytes() < all);
    solver.within(room).or_else(smallest)
}

struct Solver<'a> {
    task: &'a Task,
    machine: &'a Machine,
    /// Values per token that each layer keeps.
    kept: Vec<Kept>,
    /// The lowest adapted layer. The backward pass needs nothing below it.
    lowest: usize,
    /// The place of the layers' weights.
    weights: Layers,
    /// Whether weights may be kept expanded.
    may_expand: bool,
    /// Bytes of the terms that do not grow with the tokens, if the weights of the upper 0, 1, 2, ... layers are kept
    /// expanded.
    fixed_bytes: Vec<u64>,
}

impl<'a> Solver<'a> {
    fn new(task: &'a Task, machine: &'a Machine, residency: Residency) -> Solver<'a> {
        let layers = task.facts.layers.len();
        let kept = (0..layers).map(|layer| Kept::of(task, machine.place, layer)).collect();
        let lowest = task.lowest();
        let weights = Layers { residency, ranks: machine.ranks };
        let may_expand = machine.place == Place::Gpu
            && residency == Residency::Resident
            && task.quantization != Quantization::None
            && Change::Expanded.is_on();
        let without: u64 = fixed(task, machine, weights, 0).iter().map(|term| term.bytes).sum();
        let added = |kept| without.saturating_add_signed(terms::added_by_expanded(task, machine.place, kept));
        let fixed_bytes = (0..=layers).map(added).collect();
        Solver { task, machine, kept, lowest, weights, may_expand, fixed_bytes }
    }

    /// Returns whether the hosts have room for the weights that lie there, over all ranks.
    fn fits_the_host(&self) -> bool {
        let bytes = self.weights.host_bytes(self.task, self.machine.place);
        self.machine.host.is_none_or(|host| bytes.saturating_mul(self.machine.ranks as u64) <= host)
    }

    /// Returns the fastest plan within `room` bytes, over passes of the most tokens, half as many, and so on. Passes
    /// are not made shorter to make room for expanded weights, because the roofline does not count the time that many
    /// short passes lose between launches.
    fn within(&self, room: u64) -> Option<Plan> {
        let (least, most) =
            (self.task.tokens_min.max(1), self.task.tokens_max.max(self.task.tokens_min).max(1));
        let halves = std::iter::successors(Some(most), |tokens| Some(tokens / 2));
        let passes = halves.take_while(|tokens| *tokens > least).chain([least]);
        let plans = passes.filter_map(|tokens| self.without_expanded(tokens, room));
        // Of equal plans the first wins, which has the most tokens.
        let plain =
            plans.reduce(
                |best, plan| if plan.tokens_per_second() > best.tokens_per_second() { plan } else { best },
            );
        plain.map(|plain| self.with_expanded(plain, room))
    }

    /// Returns the fastest plan within `room` bytes for passes of `tokens` tokens.
    #[cfg(test)]
    fn levels(&self, tokens: usize, room: u64) -> Option<Plan> {
        self.without_expanded(tokens, room).map(|plain| self.with_expanded(plain, room))
    }

    fn without_expanded(&self, tokens: usize, room: u64) -> Option<Plan> {
        let keep = self.levels_of(tokens, room, 0)?;
        Some(self.describe(tokens, &keep, 0))
    }

    /// Returns a plan with expanded weights, if there is a faster one. Two orders are tried: memory goes to the levels
    /// first, and to expanded weights if all levels are the best; or to all weights first and to levels with the rest,
    /// which is faster in narrow layers.
    fn with_expanded(&self, plain: Plan, room: u64) -> Plan {
        if !self.may_expand {
            return plain;
        }
        let (best, all) = (self.task.keep.unwrap_or(Keep::Everything), self.kept.len());
        let is_best = plain.keep.iter().all(|keep| *keep == best);
        let expanded = if is_best { self.expanded_within(plain.tokens, &plain.keep, room) } else { 0 };
        let behind = (expanded > 0).then(|| self.describe(plain.tokens, &plain.keep, expanded));
        let before = self.levels_of(plain.tokens, room, all);
        let before = before.map(|keep| self.describe(plain.tokens, &keep, all));
        let faster = |best: Plan, plan: Plan| if plan.seconds < best.seconds { plan } else { best };
        [behind, before].into_iter().flatten().fold(plain, faster)
    }

    /// Returns the most layers whose weights can be kept expanded beside these levels.
    fn expanded_within(&self, tokens: usize, keep: &[Keep], room: u64) -> usize {
        let growing = self.growing(tokens, keep).iter().sum::<u64>();
        (0..=self.kept.len())
            .rev()
            .find(|expanded| self.fixed_bytes[*expanded] + growing <= room)
            .unwrap_or(0)
    }

    /// Returns the levels that recompute least within `room` bytes beside `expanded` layers of expanded weights.
    ///
    /// Layers have the same shape, so the best mixture has two levels and, in one layer between them, a third. All
    /// such mixtures are tried. Upper layers keep more, because the backward pass frees them first.
    fn levels_of(&self, tokens: usize, room: u64, expanded: usize) -> Option<Vec<Keep>> {
        let choices = match self.task.keep {
            Some(keep) => vec![keep],
            None => Keep::ALL.into_iter().filter(|keep| *keep <= self.least()).collect(),
        };
        let fixed = self.fixed_bytes[expanded];
        let fits = |keep: &Vec<Keep>| {
            fixed + self.growing(tokens, keep).iter().sum::<u64>() <= room && self.inputs_fit(tokens, keep)
        };
        let counter = Counter { task: self.task, machine: self.machine, tokens, expanded };
        // With the layer's own work, beside which inputs of layers move to the host and back.
        let seconds =
            |keep: Keep| (counter.layer(0, true) + counter.again(0, keep)).seconds(&self.machine.rates);
        let costs: Vec<(Keep, f64)> = choices.into_iter().map(|keep| (keep, seconds(keep))).collect();
        let mut best: Option<(f64, Vec<Keep>)> = None;
        for low in &costs {
            for high in costs.iter().filter(|high| high.0 <= low.0) {
                let Some(keep) = self.mixture(*low, *high, &costs, fits) else { continue };
                let seconds = self.describe(tokens, &keep, expanded).seconds;
                if best.as_ref().is_none_or(|best| seconds < best.0) {
                    best = Some((seconds, keep));
                }
            }
        }
        best.map(|(_, keep)| keep)
    }

    /// Returns levels with as many layers at `high` as fit and the others at `low`. The highest of the others gets the
    /// best level that fits.
    fn mixture(
        &self,
        low: (Keep, f64),
        high: (Keep, f64),
        costs: &[(Keep, f64)],
        fits: impl Fn(&Vec<Keep>) -> bool,
    ) -> Option<Vec<Keep>> {
        let layers = self.kept.len();
        let mixed = |at_low: usize| {
            (0..layers).map(|layer| if layer < at_low { low.0 } else { high.0 }).collect::<Vec<_>>()
        };
        let at_low = (self.lowest..=layers).find(|at_low| fits(&mixed(*at_low)))?;
        let mut keep = mixed(at_low);
        if at_low > self.lowest {
            let between = costs.iter().filter(|cost| cost.0 < low.0 && cost.1 < low.1);
            for (level, _) in between {
                let before = std::mem::replace(&mut keep[at_low - 1], *level);
                if fits(&keep) {
                    break; // the levels are in order, so the first that fits saves the most
                }
                keep[at_low - 1] = before;
            }
        }
        Some(keep)
    }

    /// Returns the level with the fewest bytes.
    fn least(&self) -> Keep {
        self.task.keep.unwrap_or(match self.machine.place {
            // On a CPU, host memory is the same memory.
            Place::Cpu { .. } => Keep::LayerInputs,
            Place::Gpu => Keep::HostInputs,
        })
    }

    /// Returns the plan with the fewest bytes.
    fn smallest(&self) -> Plan {
        self.describe(self.task.tokens_min.max(1), &vec![self.least(); self.kept.len()], 0)
    }

    /// Returns the number of bytes of host memory for inputs of layers.
    fn host_inputs(&self, tokens: usize, keep: &[Keep]) -> u64 {
        let away = keep[self.lowest..].iter().filter(|keep| **keep == Keep::HostInputs).count();
        let bytes = self.task.facts.width * self.task.activation_bytes(self.machine.place);
        match self.machine.place {
            Place::Gpu => (away * tokens * bytes) as u64,
            // On a CPU, host memory is the same memory.
            Place::Cpu { .. } => 0,
        }
    }

    /// Returns whether the host has room for inputs of layers beside the weights that lie there.
    fn inputs_fit(&self, tokens: usize, keep: &[Keep]) -> bool {
        let weights = self.weights.host_bytes(self.task, self.machine.place);
        let bytes = weights + self.host_inputs(tokens, keep);
        self.machine.host.is_none_or(|host| bytes.saturating_mul(self.machine.ranks as u64) <= host)
    }

    /// Returns the bytes of three terms: values that the layers keep, one layer at work, and gaps between blocks.
    fn growing(&self, tokens: usize, keep: &[Keep]) -> [u64; GROWING] {
        let (mut kept, mut missing) = (0, 0);
        for (layer, (values, keep)) in self.kept.iter().zip(keep).enumerate() {
            let has = if layer >= self.lowest { values.at(*keep) } else { 0 };
            kept += has;
            missing = missing.max(values.whole() - has);
        }
        // While a layer is computed, the next input comes from the host.
        let away = keep[self.lowest..].contains(&Keep::HostInputs);
        let coming = if away && self.machine.place == Place::Gpu { self.task.facts.width } else { 0 };
        let worked = missing + coming + terms::working(self.task, self.machine.place);
        // Passes on a GPU are filled up to few shapes.
        let filled = self.machine.place == Place::Gpu && Change::Steps.is_on();
        let rows = if filled { shape::rows(tokens) } else { tokens };
        let a_value = rows * self.task.activation_bytes(self.machine.place);
        let gaps = ((kept + worked) * a_value) as f64 * GAPS;
        [(kept * a_value) as u64, (worked * a_value) as u64, gaps as u64]
    }

    /// Returns the plan with these levels and the weights of so many layers expanded, whether it fits or not.
    fn describe(&self, tokens: usize, keep: &[Keep], expanded: usize) -> Plan {
        let mut terms = fixed(self.task, self.machine, self.weights, expanded);
        let names: [&str; GROWING] = ["kept by the layers", "one layer at work", "gaps between blocks"];
        let growing = names.into_iter().zip(self.growing(tokens, keep));
        terms.extend(growing.map(|(what, bytes)| Term { what: what.into(), bytes }));
        let work = self.work(tokens, keep, expanded);
        let (busy, flops) = (work.seconds(&self.machine.rates), work.flops());
        let otherwise = self.work(tokens, keep, 0);
        let (brought, waits) = self.brought(tokens, busy);
        let seconds = busy + waits;
        let mut plan = Plan {
            keep: keep.to_vec(),
            expanded,
            expanded_saves: otherwise.seconds(&self.machine.rates) - busy,
            tokens,
            terms,
            memory: self.machine.memory,
            seconds,
            flops,
            residency: self.weights.residency,
            host_bytes: self.weights.host_bytes(self.task, self.machine.place),
            host_inputs: self.host_inputs(tokens, keep),
            brought,
            waits,
            ranks: self.machine.ranks,
            efficiency: efficiency(self.task, self.machine, self.weights.residency, seconds),
        };
        if self.machine.place == Place::Gpu && plan.graph_bytes() > 0 {
            let seconds = |work: &Work| work.seconds_by_graph(&self.machine.rates);
            plan.seconds = seconds(&work);
            plan.expanded_saves = seconds(&otherwise) - plan.seconds;
            plan.efficiency = efficiency(self.task, self.machine, self.weights.residency, plan.seconds);
        }
        plan
    }

    /// Returns the bytes of weights that a pass copies to the device, and the seconds that it waits for them. It is
    /// `busy` seconds long without waiting. Weights come while the layer before computes, so each direction of the pass
    /// takes as long as the longer of both.
    fn brought(&self, tokens: usize, busy: f64) -> (u64, f64) {
        let (rates, ranks) = (&self.machine.rates, self.machine.ranks as f64);
        let (share, rate) = match self.weights.residency {
            Residency::Resident => return (0, 0.0),
            Residency::Shared => ((ranks - 1.0) / ranks, rates.peer),
            Residency::Streamed => (1.0, rates.link),
        };
        let buffers = self.weights.buffers(self.task);
        let sum = |layers: &[usize]| layers.iter().sum::<usize>() as f64 * share;
        // The pass turns at two layers that are there; if it ends at the first two, the next one begins with them.
        let (last, first) = (buffers.len().saturating_sub(2), if self.lowest == 0 { 2 } else { 0 });
        let up = sum(&buffers[first.min(buffers.len())..]);
        let down = sum(&buffers[self.lowest.min(last)..last]);
        let counter = Counter { task: self.task, machine: self.machine, tokens, expanded: 0 };
        let forward = (0..buffers.len()).map(|layer| counter.layer(layer, false)).sum::<Work>();
        let forward = forward.seconds(rates).min(busy);
        let waits = (up / rate - forward).max(0.0) + (down / rate - (busy - forward)).max(0.0);
        ((up + down) as u64, waits)
    }

    fn work(&self, tokens: usize, keep: &[Keep], expanded: usize) -> Work {
        let counter = Counter { task: self.task, machine: self.machine, tokens, expanded };
        let layers = keep.iter().enumerate().map(|(layer, keep)| match layer >= self.lowest {
            true => counter.layer(layer, true) + counter.again(layer, *keep),
            false => counter.layer(layer, false),
        });
        layers.sum::<Work>() + counter.head() + counter.update()
    }
}

/// Returns the terms that do not grow with the tokens of a pass, if the weights of the upper `expanded` layers are kept
/// expanded.
fn fixed(task: &Task, machine: &Machine, weights: Layers, expanded: usize) -> Vec<Term> {
    let taken = Term { what: "context and kernels".into(), bytes: machine.taken };
    let taken = Some(taken).filter(|term| term.bytes > 0);
    taken.into_iter().chain(terms::fixed(task, machine.place, weights, expanded)).collect()
}

fn refusal(solver: &Solver) -> Fault {
    let (task, machine) = (solver.task, solver.machine);
    let needed = solver.smallest();
    let length = longest_that_fits(task, machine);
    let mut help = Vec::new();
    if length > 0 {
        help.push(format!("TrainingArguments.max_length {length} would fit"));
    }
    if task.residency.is_some() {
        help.push("leave `residency` out".into());
    }
    if !solver.fits_the_host() {
        let host = solver.weights.host_bytes(task, machine.place).saturating_mul(machine.ranks as u64);
        help.push(format!("give the machine {} of host memory for the weights", words::size(host)));
    } else if !solver.inputs_fit(needed.tokens, &needed.keep) {
        let host = (needed.host_bytes + needed.host_inputs).saturating_mul(machine.ranks as u64);
        help.push(format!("give the machine {} of host memory for inputs of layers", words::size(host)));
    }
    if task.keep.is_some() {
        help.push("leave `keep` and gradient_checkpointing out".into());
    }
    if task.quantization == Quantization::None {
        help.push("set QuantizationConfig.load_in_4bit".into());
    } else if length == 0 {
        help.push("lower LoraConfig.r".into());
    }
    let cards: Vec<&str> = card::at_least(needed.bytes()).map(|card| card.name).collect();
    match (machine.place, cards.first()) {
        (Place::Cpu { .. }, _) => {
            help.push(format!("give the container {} of memory", words::size(needed.bytes())))
        }
        (_, Some(card)) => help.push(format!("use a larger card, such as {card}")),
        (_, None) => help.push("no card in hone's table is large enough".into()),
    }
    Fault::capacity(format!(
        "training needs at least {}, but only {} can be used on {}: {}",
        words::size(needed.bytes()),
        words::size(machine.memory),
        machine.name,
        show::list(&needed)
    ))
    .help(help.join("; "))
}

/// Returns the longest example with which the smallest plan fits; 0 if there is none.
fn longest_that_fits(task: &Task, machine: &Machine) -> usize {
    let fits = |tokens: usize| {
        let task = Task { tokens_min: tokens, ..task.clone() };
        let choices = residencies(&task, machine).unwrap_or_default();
        let solvers = choices.into_iter().map(|residency| Solver::new(&task, machine, residency));
        let smallest = |solver: Solver| solver.smallest().bytes();
        solvers.filter(Solver::fits_the_host).any(|solver| smallest(solver) <= machine.memory)
    };
    let (mut low, mut high) = (0, task.tokens_min);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests;
