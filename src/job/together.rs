//! The ranks of a run -> one run: the same inputs everywhere, one plan of memory, one download on each machine.
//!
//! A process that trains alone goes through the same steps, which then do nothing.

use std::sync::Arc;

use candle_core::Device;
use serde_json::{Value as Json, json};

use crate::fault::{Fault, Kind, Result};
use crate::memory::cost::Rates;
use crate::memory::{self, Limit, Machine};
use crate::model::fingerprint::Fingerprint;
use crate::plan::Plan;
use crate::ranks::launch;
use crate::ranks::link::Link;
use crate::ranks::place::{self, Found};
use crate::ranks::{Alone, Collective, Place};
use crate::source;
use crate::spec::Environment;

/// Pieces of the program that its identity is made of, and the bytes of each.
const PROGRAM_PIECES: u64 = 16;
const PIECE_BYTES: u64 = 1 << 20;
/// Characters of a difference that a message shows.
const SHOWN_CHARACTERS_MAX: usize = 200;

/// The ranks of this run, or this process alone.
pub(super) struct Together(Option<Arc<Link>>);

impl Together {
    /// Takes this process's place, which the environment gives.
    pub fn join(environment: Environment) -> Result<Together> {
        match place::find(environment)? {
            Found::Rank(seat) => Link::join(&seat, environment).map(|link| Together(Some(Arc::new(link)))),
            _ => Ok(Together(None)),
        }
    }

    /// Returns the ranks, for computations that all of them share.
    pub fn ranks(&self) -> &dyn Collective {
        match &self.0 {
            Some(link) => &**link,
            None => &Alone,
        }
    }

    /// Returns the ranks for tensors of this device. GPUs are joined by NCCL, which takes some of their memory.
    ///
    /// # Errors
    /// Config: there is no NCCL. Device: the GPUs cannot be joined.
    pub fn computing(&self, device: &Device) -> Result<Arc<dyn Collective>> {
        let Some(link) = &self.0 else { return Ok(Arc::new(Alone)) };
        #[cfg(feature = "cuda")]
        if device.is_cuda() && self.place().world > 1 {
            return Ok(Arc::new(crate::ranks::nccl::Nccl::over(link.clone(), device)?));
        }
        debug_assert!(device.is_cpu() || self.place().world == 1, "GPUs need a build with CUDA");
        Ok(link.clone())
    }

    pub fn place(&self) -> Place {
        self.ranks().place()
    }

    /// Ends this rank's part; all ranks end with the same result.
    pub fn leave<T>(&self, ended: Result<T>) -> Result<T> {
        match &self.0 {
            Some(link) => link.leave(ended),
            None => ended,
        }
    }

    /// Does `work`, the training. Meanwhile, a rank that does not make a call that the others make ends all of them.
    pub fn while_training<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(link) = &self.0 else { return work() };
        link.expects_progress(true);
        let done = work()?;
        link.ends_training().map(|()| done)
    }

    /// Loads the base. `work` calls its argument for each part. A rank that makes no progress, while others wait for
    /// it, ends all of them.
    pub fn while_loading<T>(&self, work: impl FnOnce(&dyn Fn()) -> Result<T>) -> Result<T> {
        let Some(link) = &self.0 else { return work(&|| ()) };
        link.expects_progress(true);
        let done = work(&|| link.progressed())?;
        link.expects_progress(false);
        Ok(done)
    }

    /// Does work of which each rank has a share of its own. One rank may refuse its share for a reason that others do
    /// not see.
    pub fn apart<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(link) = &self.0 else { return work() };
        link.works_apart(true);
        let done = work()?;
        link.works_apart(false);
        Ok(done)
    }

    /// Does work whose result stays on a machine: first in one process of each, then in the others, which find it.
    pub fn by_node<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        if self.place().world == 1 {
            return work();
        }
        let done = if self.place().local_rank == 0 { Some(work()?) } else { None };
        self.ranks().exchange(&[])?;
        done.map_or_else(work, Ok)
    }

    /// Lets rank 0 decide: the work is done there alone, and every rank gets the result.
    pub fn first<T>(
        &self,
        work: impl FnOnce() -> Result<T>,
        write: impl FnOnce(&T) -> Json,
    ) -> Result<(Json, Option<T>)> {
        let done = if self.place().leads() { Some(work()?) } else { None };
        let said = done.as_ref().map_or(Json::Null, write).to_string();
        let said = self.ranks().broadcast(said.as_bytes())?;
        let said =
            serde_json::from_slice(&said).map_err(|error| Fault::internal(format!("rank 0 said {error}")))?;
        Ok((said, done))
    }

    /// Refuses ranks that were given something else than rank 0: `parts` are names and contents of all that decides
    /// the result. A retry can help, because ranks of one run differ if an image was just replaced, or if a volume is
    /// not the same everywhere yet.
    ///
    /// # Errors
    /// Device: a rank differs. The message names both ranks and the first difference.
    pub fn agree(&self, parts: &[(String, String)]) -> Result<()> {
        if self.place().world == 1 {
            return Ok(());
        }
        let own = serde_json::to_vec(parts).expect("texts");
        let all = self.ranks().exchange(&own)?;
        let read = |bytes: &[u8]| serde_json::from_slice::<Vec<(String, String)>>(bytes).unwrap_or_default();
        let first = read(&all[0]);
        if let Some((rank, bytes)) = all.iter().enumerate().find(|(_, bytes)| **bytes != all[0]) {
            let difference = difference(&first, &read(bytes));
            return Err(disagreement(format!(
                "rank {rank} was started with another run than rank 0: {difference}"
            )));
        }
        Ok(())
    }

    /// Refuses ranks that read other weights than rank 0.
    ///
    /// # Errors
    /// Device: a rank differs. The message names the first part of the model that does.
    pub fn agree_on_weights(&self, own: &Fingerprint) -> Result<()> {
        let bytes = serde_json::to_vec(own).expect("texts and numbers");
        let all = self.ranks().exchange(&bytes)?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Fingerprint>(bytes).unwrap_or_default();
        let all: Vec<Fingerprint> = all.iter().map(read).collect();
        let other = |rank: &Fingerprint| all[0].difference(rank).map(str::to_owned);
        match all.iter().enumerate().find_map(|(rank, found)| Some((rank, other(found)?))) {
            None => Ok(()),
            Some((rank, part)) => {
                Err(disagreement(format!("rank {rank} has other weights than rank 0: {part} differs")))
            }
        }
    }

    /// Returns the machine that all ranks plan their memory for: rank 0's, with the least memory that a rank has free.
    pub fn machine(&self, device: &Device, limit: Option<Limit>) -> Result<Machine> {
        let mut machine = Machine::of(device, limit);
        let place = self.place();
        if place.world == 1 {
            return Ok(machine);
        }
        if device.is_cpu() {
            let share = Machine::of(device, None).memory / place.local_world as u64;
            machine.memory = match limit {
                Some(Limit::Bytes(_)) => machine.memory.min(share),
                _ => machine.memory / place.local_world as u64,
            };
        }
        machine.ranks = place.world;
        machine.memory = self.least(machine.memory)?;
        let host = self.least(machine.host.unwrap_or(u64::MAX))?;
        if place.world > place.local_world {
            machine.rates = machine.rates.over_a_network();
        }
        // A machine's host memory is for its own ranks; the plan counts all of them.
        let of_all = host.saturating_mul(place.world as u64) / place.local_world as u64;
        machine.host = (host < u64::MAX).then_some(of_all);
        let (first, _) = self.first(|| Ok(machine.clone()), rates)?;
        Ok(like(machine, &first))
    }

    /// Returns the smallest of all ranks' numbers.
    fn least(&self, own: u64) -> Result<u64> {
        let all = self.ranks().exchange(&own.to_le_bytes())?;
        let number =
            |bytes: &Vec<u8>| bytes.as_slice().try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
        Ok(all.iter().map(number).min().expect("rank 0 is there"))
    }
}

fn disagreement(what: String) -> Fault {
    Fault::new(Kind::Device, what).help(
        "start all ranks with the same image, configuration, model and data, and mount the same volumes on every machine; if \
         an image or a volume has just changed, a retry succeeds when it is the same everywhere",
    )
}

/// Returns the properties of a machine that decide between two plans that both fit.
fn rates(machine: &Machine) -> Json {
    let Rates { matrix, copy, link, peer, measured } = machine.rates;
    let threads = match machine.place {
        memory::Place::Cpu { threads } => Some(threads),
        memory::Place::Gpu => None,
    };
    json!({"threads": threads, "matrix": matrix, "copy": copy, "link": link, "peer": peer, "measured": measured})
}

fn like(mut machine: Machine, first: &Json) -> Machine {
    let number = |name: &str, own: f64| first[name].as_f64().unwrap_or(own);
    let Rates { matrix, copy, link, peer, measured } = machine.rates;
    machine.rates = Rates {
        matrix: number("matrix", matrix),
        copy: number("copy", copy),
        link: number("link", link),
        peer: number("peer", peer),
        measured: first["measured"].as_bool().unwrap_or(measured),
    };
    if let (memory::Place::Cpu { threads }, Some(firsts)) = (&mut machine.place, first["threads"].as_u64()) {
        *threads = firsts as usize;
    }
    machine
}

/// Returns a rank's part of the run's fingerprint: the program, and the kind of its device.
pub(super) fn of_process(plan: &Plan, device: &Device) -> Vec<(String, String)> {
    let kind = if device.is_cpu() { "CPU" } else { "GPU" };
    let part = |name: &str, text: String| (name.to_owned(), text);
    let order =
        launch::NCCL_ORDER.map(|(name, _)| format!("{name}={}", std::env::var(name).unwrap_or_default()));
    vec![
        part("order of sums", order.join(", ")),
        part("program", program()),
        part("version", env!("CARGO_PKG_VERSION").into()),
        part("device", kind.into()),
        part("memory_max", format!("{:?}", plan.memory)),
    ]
}

/// Returns a digest of pieces of this program; two builds differ in all of them.
fn program() -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open("/proc/self/exe")?;
        let bytes = file.metadata()?.len();
        let mut pieces = bytes.to_le_bytes().to_vec();
        for piece in 0..PROGRAM_PIECES {
            file.seek(SeekFrom::Start(bytes / PROGRAM_PIECES * piece))?;
            (&file).take(PIECE_BYTES).read_to_end(&mut pieces)?;
        }
        Ok(pieces)
    };
    read().map_or_else(|error| format!("unread: {error}"), |pieces| source::digest(&pieces))
}

/// Returns the first part that differs, with both contents, or with the first items of a long content that differ.
fn difference(first: &[(String, String)], other: &[(String, String)]) -> String {
    let differs = first.iter().zip(other).find(|(one, two)| one != two);
    let Some(((name, one), (other_name, two))) = differs else {
        return format!("{} parts there, {} here", other.len(), first.len());
    };
    if name != other_name {
        return format!("{other_name} there, {name} here");
    }
    let items = one.split(", ").zip(two.split(", ")).find(|(one, two)| one != two);
    let (one, two) = items.unwrap_or((one, two));
    let cut = |text: &str| text.chars().take(SHOWN_CHARACTERS_MAX).collect::<String>();
    format!("{name}: {} there, {} here", cut(two), cut(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let first = parts(&[("options", "Options { rate: 0.1, seed: 42 }"), ("rows.parquet", "ab")]);
        let other = parts(&[("options", "Options { rate: 0.1, seed: 7 }"), ("rows.parquet", "cd")]);
        assert_eq!(difference(&first, &other), "options: seed: 7 } there, seed: 42 } here");
        assert_eq!(difference(&first[1..], &other[1..]), "rows.parquet: cd there, ab here");
        assert_eq!(difference(&first, &first[..1]), "1 parts there, 2 here");
    }

    #[test]
    fn a_process_alone_agrees_with_itself() {
        let alone = Together(None);
        alone.agree(&parts(&[("a", "b")])).unwrap();
        assert_eq!(alone.by_node(|| Ok(3)).unwrap(), 3);
        assert_eq!(alone.first(|| Ok(4), |four| json!(four)).unwrap(), (json!(4), Some(4)));
        assert_eq!(alone.while_training(|| Ok(5)).unwrap(), 5);
        let machine = Machine::of(&Device::Cpu, None);
        assert_eq!(like(machine.clone(), &rates(&machine)), machine);
        assert_eq!(program().len(), 64, "{}", program());
    }
}
