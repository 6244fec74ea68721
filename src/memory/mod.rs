//! Facts, adapter and the room there is -> what each layer keeps and how many tokens a pass takes; refused with
//! numbers when nothing fits.
//!
//! A pass needs what is always there (`terms::fixed`), what the layers keep (`model::Keep`, layer by layer), and what
//! one layer works in. The plan takes the number of tokens and the levels with the most tokens a second (`cost`), among
//! those that fit. Results do not depend on it: an optimizer step has the same examples and the same sum of gradients.

pub mod card;
pub mod cost;
pub mod serving;
pub mod show;
mod terms;

use candle_core::Device;

use crate::device;
use crate::facts::Facts;
use crate::facts::sites::Site;
use crate::facts::{Keep, Precision, Quantization};
use crate::fault::{Fault, Result};
use crate::words;

use cost::{Counter, Rates, Work};
use terms::Kept;
pub use terms::Term;

/// What was asked for. Filled by `plan`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The level of every layer; `None`: as memory allows.
    pub keep: Option<Keep>,
    pub limit: Option<Limit>,
    /// Most tokens of a pass.
    pub tokens_max: Option<usize>,
}

/// How much of the free memory may be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Of what is free.
    Share(f64),
    Bytes(u64),
}

/// What is to be trained, as far as memory and time depend on it.
#[derive(Clone, Debug)]
pub struct Task {
    pub facts: Facts,
    pub sites: Vec<Site>,
    pub quantization: Quantization,
    pub precision: Precision,
    /// Whether the adapter's inputs are dropped in training.
    pub dropout: bool,
    /// Whether what is not quantised (embedding, head, perhaps linear layers) is bf16 in the checkpoint.
    pub bf16_checkpoint: bool,
    /// Longest example: a pass takes at least so many tokens.
    pub tokens_min: usize,
    /// Most tokens of a pass.
    pub tokens_max: usize,
    /// How long examples usually are: the work of attention follows it.
    pub example_tokens: usize,
    /// The level of every layer; `None`: whatever is fastest among those that fit.
    pub keep: Option<Keep>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu { threads: usize },
    Gpu,
}

/// Where it is to be trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// `h200`, `this machine's CPU`
    pub name: String,
    pub place: Place,
    /// Bytes that may be used.
    pub memory: u64,
    /// Bytes of them that are gone before the first tensor.
    pub taken: u64,
    pub rates: Rates,
}

/// What a run does with its memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One level a layer.
    pub keep: Vec<Keep>,
    /// Most tokens of a pass.
    pub tokens: usize,
    /// Everything that takes memory, in the table's order; the last `GROWING` lines grow with the tokens.
    pub terms: Vec<Term>,
    /// Of the machine it is for.
    pub memory: u64,
    /// Predicted: a pass of so many tokens, and its FLOPs.
    pub seconds: f64,
    pub flops: f64,
}

/// Lines of the table that grow with the tokens of a pass: kept, worked in, allocator's.
const GROWING: usize = 3;
/// Of the free memory, what a plan takes unless told: others may need some of a machine's.
const SHARE_OF_GPU: f64 = 0.96;
const SHARE_OF_CPU: f64 = 0.9;
/// Blocks of many sizes leave gaps: this share of what grows.
const GAPS: f64 = 1.0 / 32.0;
/// After a failure the next plan has this share of the room that grew.
const SMALLER: f64 = 0.75;

/// A plan in use, which shrinks when memory runs out all the same.
#[derive(Clone, Debug)]
pub struct Running {
    pub task: Task,
    pub machine: Machine,
    pub plan: Plan,
}

impl Running {
    pub fn start(task: Task, machine: Machine) -> Result<Running> {
        let plan = solve(&task, &machine)?;
        Ok(Running { task, machine, plan })
    }

    /// Goes on with the next smaller plan; false after the smallest.
    pub fn shrink(&mut self) -> bool {
        match next_smaller(&self.task, &self.machine, &self.plan) {
            Some(plan) => self.plan = plan,
            None => return false,
        }
        true
    }

    pub fn table(&self) -> String {
        self.plan.table(&self.task, &self.machine)
    }
}

impl Limit {
    /// `20GiB`, `800MB`, `21474836480`, or a share such as `0.8`.
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
    /// The opened device with what is free on it now.
    pub fn of(device: &Device, limit: Option<Limit>) -> Machine {
        let name = device::name(device);
        let place = match device {
            Device::Cpu => Place::Cpu { threads: rayon::current_num_threads() },
            _ => Place::Gpu,
        };
        // Where the system does not say, nothing is refused.
        let free = device::memory_free(device).unwrap_or(u64::MAX / 2);
        let rates = match place {
            Place::Cpu { threads } => card::cpu_rates(threads),
            Place::Gpu => card::like(&name),
        };
        Machine { name, place, memory: free, taken: 0, rates }.limited(limit)
    }

    /// As much of it as was asked for.
    fn limited(mut self, limit: Option<Limit>) -> Machine {
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

/// The fastest plan that fits.
pub fn solve(task: &Task, machine: &Machine) -> Result<Plan> {
    let solver = Solver::new(task, machine);
    solver.within(machine.memory).ok_or_else(|| refusal(&solver))
}

/// Bytes of passes of so many tokens with every layer at one level, whether they fit or not.
pub fn needed(task: &Task, machine: &Machine, tokens: usize, keep: Keep) -> u64 {
    Solver::new(task, machine).describe(tokens, &vec![keep; task.facts.layers.len()]).bytes()
}

/// FLOPs of a step of so many tokens when nothing is computed again: what a speed is judged by.
pub fn useful_flops(task: &Task, machine: &Machine, tokens: usize) -> f64 {
    let everything = vec![Keep::Everything; task.facts.layers.len()];
    Solver::new(task, machine).work(tokens, &everything).flops()
}

/// The plan to go on with when `plan` ran out of memory all the same; `None` after the smallest.
pub fn next_smaller(task: &Task, machine: &Machine, plan: &Plan) -> Option<Plan> {
    let solver = Solver::new(task, machine);
    let (all, growing) = (plan.bytes(), plan.growing());
    let room = all - growing + (growing as f64 * SMALLER) as u64;
    let smallest = || Some(solver.smallest()).filter(|smallest| smallest.bytes() < all);
    solver.within(room).or_else(smallest)
}

impl Task {
    /// Of a value that is not quantised: on a GPU it is stored as activations are; on a CPU bf16 stays bf16 and all
    /// else becomes f32.
    pub fn stored_bytes(&self, place: Place) -> usize {
        match place {
            Place::Cpu { .. } if self.bf16_checkpoint => 2,
            _ => self.activation_bytes(place),
        }
    }

    /// Of an activation: on a GPU activations are stored in the precision of products.
    pub fn activation_bytes(&self, place: Place) -> usize {
        match (place, self.precision) {
            (Place::Gpu, Precision::Bf16) => 2,
            _ => 4,
        }
    }
}

impl Plan {
    pub fn bytes(&self) -> u64 {
        self.terms.iter().map(|term| term.bytes).sum()
    }

    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn growing(&self) -> u64 {
        self.terms.iter().rev().take(GROWING).map(|term| term.bytes).sum()
    }
}

struct Solver<'a> {
    task: &'a Task,
    machine: &'a Machine,
    /// What each layer keeps.
    kept: Vec<Kept>,
    /// The lowest adapted layer: nothing below it is needed in the backward pass.
    lowest: usize,
}

impl<'a> Solver<'a> {
    fn new(task: &'a Task, machine: &'a Machine) -> Solver<'a> {
        let layers = task.facts.layers.len();
        let kept = (0..layers).map(|layer| Kept::of(task, layer)).collect();
        let lowest = task.sites.iter().map(|site| site.layer).min().unwrap_or(layers);
        Solver { task, machine, kept, lowest }
    }

    /// The fastest plan in so much room, over passes of the most tokens, half as many, and so on.
    fn within(&self, room: u64) -> Option<Plan> {
        let (least, most) =
            (self.task.tokens_min.max(1), self.task.tokens_max.max(self.task.tokens_min).max(1));
        let halves = std::iter::successors(Some(most), |tokens| Some(tokens / 2));
        let passes = halves.take_while(|tokens| *tokens > least).chain([least]);
        let plans = passes.filter_map(|tokens| self.levels(tokens, room));
        // The first of equals: the most tokens.
        plans.reduce(
            |best, plan| if plan.tokens_per_second() > best.tokens_per_second() { plan } else { best },
        )
    }

    /// The levels that recompute least within the room, for passes of so many tokens.
    ///
    /// Layers have the same shape, so the best mixture is of two levels and, in one layer between them, a third: all
    /// of these are tried. Upper layers keep more: they are the first to let go of it in the backward pass.
    fn levels(&self, tokens: usize, room: u64) -> Option<Plan> {
        let fixed: u64 = self.fixed().iter().map(|term| term.bytes).sum();
        let fits = |keep: &Vec<Keep>| fixed + self.growing(tokens, keep).iter().sum::<u64>() <= room;
        let choices = match self.task.keep {
            Some(keep) => vec![keep],
            None => Keep::ALL.into_iter().filter(|keep| *keep <= self.least()).collect(),
        };
        let counter = Counter { task: self.task, place: self.machine.place, tokens };
        let seconds = |keep: Keep| counter.again(0, keep).seconds(&self.machine.rates);
        let costs: Vec<(Keep, f64)> = choices.into_iter().map(|keep| (keep, seconds(keep))).collect();
        let mut best: Option<(f64, Vec<Keep>)> = None;
        for low in &costs {
            for high in costs.iter().filter(|high| high.0 <= low.0) {
                let Some(found) = self.mixture(*low, *high, &costs, fits) else { continue };
                if best.as_ref().is_none_or(|best| found.0 < best.0) {
                    best = Some(found);
                }
            }
        }
        best.map(|(_, keep)| self.describe(tokens, &keep))
    }

    /// As many layers at `high` as fit, the others at `low`, the highest of these at whatever fits in between.
    fn mixture(
        &self,
        low: (Keep, f64),
        high: (Keep, f64),
        costs: &[(Keep, f64)],
        fits: impl Fn(&Vec<Keep>) -> bool,
    ) -> Option<(f64, Vec<Keep>)> {
        let layers = self.kept.len();
        let mixed = |at_low: usize| {
            (0..layers).map(|layer| if layer < at_low { low.0 } else { high.0 }).collect::<Vec<_>>()
        };
        let at_low = (self.lowest..=layers).find(|at_low| fits(&mixed(*at_low)))?;
        let mut keep = mixed(at_low);
        let mut seconds = (at_low - self.lowest) as f64 * low.1 + (layers - at_low) as f64 * high.1;
        if at_low > self.lowest {
            let between = costs.iter().filter(|cost| cost.0 < low.0 && cost.1 < low.1);
            for (level, cost) in between {
                let before = std::mem::replace(&mut keep[at_low - 1], *level);
                if fits(&keep) {
                    seconds += cost - low.1;
                    break; // the levels stand in order: the first that fits saves the most
                }
                keep[at_low - 1] = before;
            }
        }
        Some((seconds, keep))
    }

    /// The level with the fewest bytes.
    fn least(&self) -> Keep {
        self.task.keep.unwrap_or(match self.machine.place {
            // The host's memory is the same memory.
            Place::Cpu { .. } => Keep::LayerInputs,
            Place::Gpu => Keep::HostInputs,
        })
    }

    /// The plan with the fewest bytes.
    fn smallest(&self) -> Plan {
        self.describe(self.task.tokens_min.max(1), &vec![self.least(); self.kept.len()])
    }

    fn fixed(&self) -> Vec<Term> {
        let taken = Term { what: "context and kernels".into(), bytes: self.machine.taken };
        let taken = Some(taken).filter(|term| term.bytes > 0);
        taken.into_iter().chain(terms::fixed(self.task, self.machine.place)).collect()
    }

    /// Bytes of what the layers keep, of one layer at work, and of gaps between blocks.
    fn growing(&self, tokens: usize, keep: &[Keep]) -> [u64; GROWING] {
        let (mut kept, mut missing) = (0, 0);
        for (layer, (values, keep)) in self.kept.iter().zip(keep).enumerate() {
            let has = if layer >= self.lowest { values.at(*keep) } else { 0 };
            kept += has;
            missing = missing.max(values.whole() - has);
        }
        let worked = missing + terms::working(self.task);
        let a_value = tokens * self.task.activation_bytes(self.machine.place);
        let gaps = ((kept + worked) * a_value) as f64 * GAPS;
        [(kept * a_value) as u64, (worked * a_value) as u64, gaps as u64]
    }

    /// The plan with these levels, whether it fits or not.
    fn describe(&self, tokens: usize, keep: &[Keep]) -> Plan {
        let mut terms = self.fixed();
        let names: [&str; GROWING] = ["kept by the layers", "one layer at work", "gaps between blocks"];
        let growing = names.into_iter().zip(self.growing(tokens, keep));
        terms.extend(growing.map(|(what, bytes)| Term { what: what.into(), bytes }));
        let work = self.work(tokens, keep);
        let (seconds, flops) = (work.seconds(&self.machine.rates), work.flops());
        Plan { keep: keep.to_vec(), tokens, terms, memory: self.machine.memory, seconds, flops }
    }

    fn work(&self, tokens: usize, keep: &[Keep]) -> Work {
        let counter = Counter { task: self.task, place: self.machine.place, tokens };
        let layers = keep.iter().enumerate().map(|(layer, keep)| match layer >= self.lowest {
            true => counter.layer(layer, true) + counter.again(layer, *keep),
            false => counter.layer(layer, false),
        });
        layers.sum::<Work>() + counter.head() + counter.update()
    }
}

fn refusal(solver: &Solver) -> Fault {
    let (task, machine) = (solver.task, solver.machine);
    let needed = solver.smallest();
    let length = longest_that_fits(task, machine);
    let mut help = Vec::new();
    if length > 0 {
        help.push(format!("TrainingArguments.max_length {length} would fit"));
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
        (_, Some(card)) => help.push(format!("take a larger card: {card} would do")),
        (_, None) => help.push("no card in hone's table is large enough".into()),
    }
    Fault::capacity(format!(
        "training needs at least {}, and {} may be used of {}: {}",
        words::size(needed.bytes()),
        words::size(machine.memory),
        machine.name,
        show::list(&needed)
    ))
    .help(help.join("; "))
}

/// Longest example with which the smallest plan fits; 0 if none does.
fn longest_that_fits(task: &Task, machine: &Machine) -> usize {
    let fits = |tokens: usize| {
        let task = Task { tokens_min: tokens, ..task.clone() };
        Solver::new(&task, machine).smallest().bytes() <= machine.memory
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
