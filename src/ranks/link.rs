//! Connections to the other ranks -> exchanges, sums, and one end for all.
//!
//! Every rank has one connection to rank 0. Calls of a `Collective` go over it, and beats, by which each side knows
//! that the other is alive. A rank that fails sends its fault, then rank 0 ends all ranks with that fault. A rank that
//! is silent, whose connection closes, or that does not make a call, ends all ranks too. Only rank 0 reports the
//! reason.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use crate::fault::{Fault, Kind, Result};
use crate::interrupt::{self, Standing};
use crate::last_word::{self, Word};
use crate::ops::{cpu, flat};
use crate::ranks::frame::{self, Frame, What};
use crate::ranks::meet::{self, Greeting, Limits, Met, of_rank};
use crate::ranks::place::{Environment, Seat};
use crate::ranks::{Collective, Place, check_gather, check_sum};

/// Time between two looks of the thread that watches the others.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const BEAT_INTERVAL: Duration = Duration::from_secs(2);
/// The time for the process that started a rank to report why the rank's connection closed. Rank 0 has the same time to
/// find by itself a fault that another rank reported.
const REASON_MAX: Duration = Duration::from_secs(1);
/// Time that rank 0 has to write a checkpoint after another rank stopped for a signal.
const STOP_MAX: Duration = Duration::from_secs(60);
/// Time that a rank has to leave what it does after the end of all. Then the process is ended.
const LEAVE_MAX: Duration = Duration::from_secs(10);
/// Time that ranks which leave wait for the others to have read their last frames.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// Whether rank 0 knows why this rank ends, so that this rank need not report it.
static TOLD: AtomicBool = AtomicBool::new(false);

/// Whether the process that started this rank also started rank 0, and so reports its end.
static PARENT_TELLS: AtomicBool = AtomicBool::new(false);

/// Returns whether rank 0 knows, and so reports, why this rank ends.
pub fn is_told() -> bool {
    TOLD.load(Ordering::SeqCst)
}

/// The calls of a `Collective`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Call {
    Sum = 0,
    Gather = 1,
    Exchange = 2,
    Broadcast = 3,
}

impl Call {
    const ALL: [Call; 4] = [Call::Sum, Call::Gather, Call::Exchange, Call::Broadcast];

    /// Returns the number in the frame: which call it is since the start, and of which kind.
    fn number(self, count: u64) -> u64 {
        count << 2 | self as u64
    }

    fn shown(number: u64) -> String {
        format!("call {} ({:?})", number >> 2, Call::ALL[(number & 3) as usize])
    }
}

/// The ranks of a run, from one of them.
pub struct Link {
    shared: Arc<Shared>,
    sums: Mutex<Sums>,
}

/// Sums that a thread makes while this rank computes, in their order.
struct Sums {
    begin: Sender<Begun>,
    /// The tensors that results are written to, and the channels that they come from.
    under_way: VecDeque<(Tensor, Receiver<Result<Vec<u8>>>)>,
}

/// This rank's part of a sum, and whom the result is for.
type Begun = (Vec<u8>, Sender<Result<Vec<u8>>>);

struct Shared {
    place: Place,
    limits: Limits,
    peers: Vec<Peer>,
    /// Calls made so far. A call holds it from its beginning to its end.
    calls: Mutex<u64>,
    /// The tick of this rank's device (`Collective::device_is_at`).
    tick: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    began: Instant,
}

/// The other end of a connection.
struct Peer {
    rank: usize,
    name: String,
    stream: TcpStream,
    writer: Mutex<TcpStream>,
    /// Milliseconds after `began` at which bytes came last.
    heard: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The fault that all ranks end with, and when it was known.
    end: Option<(Fault, Instant)>,
    /// Whether rank 0 has sent the reason why all ranks end, or received it from this one.
    told: bool,
    /// This rank's work has ended.
    left: bool,
    /// Training is over: rank 0 needs the others no longer.
    over: bool,
    /// Rank 0 said that the run succeeded.
    done: bool,
    /// All ranks load the base or train, so that none of them should keep the others waiting for long.
    expects_progress: bool,
    /// Each rank works on something else than the others.
    apart: bool,
    /// The time since which this rank waits in a call.
    waits: Option<Instant>,
    /// This rank's calls so far.
    calls: u64,
    /// The time since which the others wait for this rank.
    lags: Option<Instant>,
    /// The tick of the slowest device, and since when.
    slowest: Option<(u64, Instant)>,
    /// The state of each peer.
    peers: Vec<Known>,
}

#[derive(Default)]
struct Known {
    /// Parts in calls, or answers, that came.
    inbox: VecDeque<Frame>,
    /// Number of the newest call that the rank came to.
    calls: u64,
    /// The tick of its device.
    tick: u64,
    /// The time since which the others wait for the rank.
    lags: Option<Instant>,
    /// The time at which the connection closed.
    lost: Option<Instant>,
    /// The fault that the rank itself reported, and when.
    failed: Option<(Fault, Instant)>,
    /// The reason why the rank ended, as the process that started it reported.
    ended: Option<Fault>,
}

impl Link {
    /// Meets the other ranks of a seat.
    ///
    /// # Errors
    /// The faults of `meet::meet` and `Limits::read`.
    pub fn join(seat: &Seat, environment: Environment) -> Result<Link> {
        let limits = Limits::read(environment)?;
        let met = meet::meet(seat, &limits, environment)?;
        // The process that started rank 0 on this machine reports how it was killed.
        let has_parent = environment(meet::PARENT).is_some();
        PARENT_TELLS.store(has_parent && seat.place.rank == seat.place.local_rank, Ordering::SeqCst);
        Link::over(seat.place, limits, met)
    }

    fn over(place: Place, limits: Limits, met: Met) -> Result<Link> {
        let failed =
            |error: io::Error| Fault::internal(format!("a connection of ranks cannot be used: {error}"));
        let Met { peers: found, callers } = met;
        let mut peers = Vec::with_capacity(found.len());
        for (rank, name, stream) in found {
            stream.set_nodelay(true).map_err(failed)?;
            stream.set_write_timeout(Some(limits.silence)).map_err(failed)?;
            let writer = Mutex::new(stream.try_clone().map_err(failed)?);
            peers.push(Peer { rank, name, stream, writer, heard: AtomicU64::new(0) });
        }
        let known = peers.iter().map(|_| Known::default()).collect();
        let state = Mutex::new(State { peers: known, ..State::default() });
        let shared = Arc::new(Shared {
            place,
            limits,
            peers,
            state,
            calls: Mutex::new(0),
            tick: AtomicU64::new(0),
            changed: Condvar::new(),
            began: Instant::now(),
        });
        for index in 0..shared.peers.len() {
            let shared = shared.clone();
            spawn("ranks: read", move || shared.read(index))?;
        }
        let (watched, heard) = (shared.clone(), callers);
        spawn("ranks: watch", move || watched.watch(heard.as_ref()))?;
        let (begin, begun) = channel::<Begun>();
        let adds = shared.clone();
        // It ends with the link, whose end of the channel closes.
        spawn("ranks: sums", move || {
            for (part, to) in begun {
                let _ = to.send(adds.call(Call::Sum, &part, |parts| Ok(summed(parts))));
            }
        })?;
        Ok(Link { shared, sums: Mutex::new(Sums { begin, under_way: VecDeque::new() }) })
    }

    /// Sets whether ranks must make progress from now on. If so, a rank that others wait for, and that makes no call
    /// and does not call `progressed` for `Limits::hang`, ends all of them.
    pub fn expects_progress(&self, expects: bool) {
        self.shared.lock().expects_progress = expects;
    }

    /// Reports that this rank made progress, so that the time for which the others have waited for it begins again.
    pub fn progressed(&self) {
        self.shared.progressed();
    }

    /// Marks the training as over. Rank 0 continues alone, and the end of another rank changes nothing.
    ///
    /// # Errors
    /// The fault that ended the ranks before.
    pub fn ends_training(&self) -> Result<()> {
        let mut state = self.shared.lock();
        (state.expects_progress, state.over) = (false, true);
        state.end.as_ref().map_or(Ok(()), |(fault, _)| Err(fault.clone()))
    }

    /// Sets whether each rank works on a part of its own from now on, or on the same as all. In the second case, a rank
    /// that refuses what rank 0 accepts has other inputs.
    pub fn works_apart(&self, apart: bool) {
        self.shared.lock().apart = apart;
    }

    /// Ends this rank's part: all ranks end with the same result. The others wait for rank 0.
    pub fn leave<T>(&self, ended: Result<T>) -> Result<T> {
        // A signal changes nothing here: the ranks end together, and soon.
        interrupt::stands(Standing::Stay).to_the_end();
        let fault = ended.as_ref().err().cloned();
        let agreed = match self.shared.place.leads() {
            true => self.shared.leave_first(fault),
            false => self.shared.leave_other(fault),
        };
        self.shared.lock().left = true;
        self.shared.peers.iter().for_each(|peer| drop(peer.stream.shutdown(Shutdown::Both)));
        match agreed {
            Some(fault) => Err(fault),
            None => ended,
        }
    }

    /// Makes a call from this thread, after all sums that were begun.
    fn call(
        &self,
        call: Call,
        part: &[u8],
        answer: impl FnOnce(&[&[u8]]) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        self.summed()?;
        self.shared.call(call, part, answer)
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let failed = |error| Fault::machine("start a thread", &error);
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop).map_err(failed)
}

impl Collective for Link {
    fn place(&self) -> Place {
        self.shared.place
    }

    fn sum(&self, values: &Tensor) -> Result<()> {
        self.begin_sum(values)?;
        self.summed()
    }

    /// Begins a sum. The values are read now and written by `summed`, so that no other thread touches the tensor.
    fn begin_sum(&self, values: &Tensor) -> Result<()> {
        check_sum(values)?;
        let (to, result) = channel();
        let mut sums = self.sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sums.begin.send((bytes_of(values)?, to)).map_err(|_| no_sums())?;
        sums.under_way.push_back((values.clone(), result));
        Ok(())
    }

    fn summed(&self) -> Result<()> {
        let mut sums = self.sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut all = Ok(());
        for (values, result) in sums.under_way.drain(..) {
            let written = result.recv().unwrap_or_else(|_| Err(no_sums())).and_then(|total| {
                let total = Tensor::from_vec(floats(&total).collect(), values.elem_count(), &Device::Cpu)?;
                Ok(flat::write(&values, &total)?)
            });
            all = all.and(written);
        }
        all
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        check_gather(whole, piece, self.place().world)?;
        let part = piece.to_vec1::<u8>()?;
        let all = self.call(Call::Gather, &part, |parts| Ok(parts.concat()))?;
        if all.is_empty() {
            return Ok(());
        }
        let all = Tensor::from_vec(all, whole.elem_count(), &Device::Cpu)?.to_device(whole.device())?;
        Ok(whole.slice_set(&all, 0, 0)?)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let all = self.call(Call::Exchange, bytes, |parts| Ok(packed(parts)))?;
        Ok(unpacked(&all))
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let own = if self.place().leads() { bytes } else { &[] };
        self.call(Call::Broadcast, own, |parts| Ok(parts[0].to_vec()))
    }

    fn device_is_at(&self, tick: u64) {
        self.shared.tick.store(tick, Ordering::Relaxed);
    }

    fn ended(&self) -> Option<Fault> {
        self.shared.lock().end.as_ref().map(|(fault, _)| fault.clone())
    }
}

fn no_sums() -> Fault {
    Fault::internal("the thread that makes the ranks' sums has ended")
}

fn bytes_of(values: &Tensor) -> Result<Vec<u8>> {
    let values = values.to_device(&Device::Cpu)?;
    let values = cpu::read::<f32>(&values)?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|value| f32::from_le_bytes(value.try_into().expect("four bytes")))
}

/// Returns the sum in f64, in the order of ranks, rounded once.
fn summed(parts: &[&[u8]]) -> Vec<u8> {
    let mut total: Vec<f64> = floats(parts[0]).map(f64::from).collect();
    for part in &parts[1..] {
        total.iter_mut().zip(floats(part)).for_each(|(total, value)| *total += f64::from(value));
    }
    total.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()
}

/// Returns texts one after the other, each behind its length.
fn packed(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| [(part.len() as u64).to_le_bytes().as_slice(), part].concat()).collect()
}

fn unpacked(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let length = (u64::from_le_bytes(*length) as usize).min(rest.len());
        let (part, rest) = rest.split_at(length);
        parts.push(part.to_vec());
        bytes = rest;
    }
    parts
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes one call: rank 0 makes an answer of all parts, by rank, and every rank gets it.
    fn call(
        &self,
        call: Call,
        part: &[u8],
        answer: impl FnOnce(&[&[u8]]) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let mut calls = self.calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *calls += 1;
        let number = call.number(*calls);
        {
            let mut state = self.lock();
            (state.calls, state.waits) = (*calls, Some(Instant::now()));
        }
        let ended = match self.place.leads() {
            true => self.answer(number, part, answer),
            false => self.ask(number, part),
        };
        self.lock().waits = None;
        ended
    }

    /// Does rank 0's side of a call.
    fn answer(
        &self,
        number: u64,
        own: &[u8],
        answer: impl FnOnce(&[&[u8]]) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let mut parts = Vec::with_capacity(self.peers.len());
        for index in 0..self.peers.len() {
            let frame = self.next(index)?;
            self.matches(index, number, own, &frame)?;
            parts.push(frame.body);
        }
        let all: Vec<&[u8]> = [own].into_iter().chain(parts.iter().map(Vec::as_slice)).collect();
        let answer = answer(&all)?;
        for peer in &self.peers {
            self.send(peer, What::Answer, number, &answer)?;
        }
        Ok(answer)
    }

    /// Refuses a part of another call than rank 0 makes.
    fn matches(&self, index: usize, number: u64, own: &[u8], frame: &Frame) -> Result<()> {
        let call = Call::ALL[(number & 3) as usize];
        let lengths = (own.len(), frame.body.len());
        let same_length = lengths.0 == lengths.1 || matches!(call, Call::Exchange | Call::Broadcast);
        if frame.number == number && same_length {
            return Ok(());
        }
        Err(Fault::internal(format!(
            "{} made {} of {} bytes while rank 0 made {} of {} bytes",
            self.peers[index].name,
            Call::shown(frame.number),
            lengths.1,
            Call::shown(number),
            lengths.0
        )))
    }

    /// Does the other ranks' side of a call.
    fn ask(&self, number: u64, part: &[u8]) -> Result<Vec<u8>> {
        self.send(&self.peers[0], What::Call, number, part)?;
        self.next(0).map(|frame| frame.body)
    }

    /// Returns the next frame of a peer, or the end of all.
    fn next(&self, index: usize) -> Result<Frame> {
        let mut state = self.lock();
        loop {
            if let Some((fault, _)) = &state.end {
                return Err(fault.clone());
            }
            if let Some(frame) = state.peers[index].inbox.pop_front() {
                return Ok(frame);
            }
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Sends a frame. If that fails, the thread that watches soon knows why.
    fn send(&self, peer: &Peer, what: What, number: u64, body: &[u8]) -> Result<()> {
        let mut writer = peer.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Err(error) = frame::write(&mut *writer, what, number, body) else { return Ok(()) };
        drop(writer);
        // A part of a frame may have gone out: nothing more can be said here.
        let _ = peer.stream.shutdown(Shutdown::Both);
        let until = Instant::now() + STOP_MAX + REASON_MAX;
        let mut state = self.lock();
        while state.end.is_none() && Instant::now() < until {
            let waited = self.changed.wait_timeout(state, LOOK_INTERVAL);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        let lost = || Fault::new(Kind::Device, format!("{}: the connection failed: {error}", peer.name));
        Err(state.end.as_ref().map_or_else(lost, |(fault, _)| fault.clone()))
    }

    /// Reads the frames of a peer until its connection closes.
    fn read(&self, index: usize) {
        let peer = &self.peers[index];
        let mut stream = Heard { stream: &peer.stream, at: &peer.heard, began: self.began };
        while let Ok(frame) = Frame::read_known(&mut stream) {
            let mut state = self.lock();
            match frame.what {
                What::Call | What::Answer => {
                    state.peers[index].calls = frame.number >> 2;
                    state.peers[index].inbox.push_back(frame);
                }
                What::Failed => state.peers[index].failed = Some((frame.fault(), Instant::now())),
                What::End => {
                    TOLD.store(true, Ordering::SeqCst);
                    state.told = true;
                    state.end.get_or_insert((frame.fault(), Instant::now()));
                }
                What::Done => state.done = true,
                What::Beat => state.peers[index].tick = frame.number,
                What::Progress => state.peers[index].lags = None,
                _ => {}
            }
            self.changed.notify_all();
        }
        self.lock().peers[index].lost = Some(Instant::now());
        self.changed.notify_all();
    }

    /// Sends beats, and ends all ranks if one of them is lost, silent or does not come to a call. Ends this process if
    /// it does not end by itself after that.
    fn watch(&self, callers: Option<&std::sync::mpsc::Receiver<Greeting>>) {
        let mut beat_at = Instant::now();
        loop {
            std::thread::sleep(LOOK_INTERVAL);
            if beat_at.elapsed() >= BEAT_INTERVAL.min(self.limits.silence / 10).min(self.limits.hang / 4) {
                beat_at = Instant::now();
                self.beat();
            }
            while let Some((rank, fault)) =
                callers.and_then(|callers| callers.try_recv().ok()).and_then(|greeting| greeting.ended())
            {
                if let Some(index) = self.peers.iter().position(|peer| peer.rank == rank) {
                    self.lock().peers[index].ended = Some(fault);
                }
            }
            let found = self.look(&mut self.lock());
            if let Some(fault) = found {
                self.end(fault);
            }
            self.end_process_if_late();
            if self.lock().left {
                return;
            }
        }
    }

    /// Reports progress to rank 0, which alone counts the time for which ranks keep the others waiting.
    fn progressed(&self) {
        match self.place.leads() {
            true => self.lock().lags = None,
            false => self.peers.iter().for_each(|peer| {
                // If it cannot be written, the connection is lost, which is noticed elsewhere.
                let mut writer = peer.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let _ = frame::write(&mut *writer, What::Progress, 0, &[]);
            }),
        }
    }

    fn beat(&self) {
        for peer in &self.peers {
            // While something else is written, the peer hears that.
            if let Ok(mut writer) = peer.writer.try_lock() {
                let tick = self.tick.load(Ordering::Relaxed);
                let _ = frame::write(&mut *writer, What::Beat, tick, &[]);
            }
        }
    }

    /// Returns a reason to end all ranks.
    fn look(&self, state: &mut State) -> Option<Fault> {
        if state.end.is_some() || state.left || state.done || (state.over && self.place.leads()) {
            return None;
        }
        let most = state.peers.iter().map(|known| known.calls).chain([state.calls]).max().unwrap_or(0);
        let (expects, waits) = (state.expects_progress && self.place.leads(), state.waits);
        let (calls, apart) = (state.calls, state.apart);
        if self.lags(&mut state.lags, expects && state.calls < most) {
            return Some(self.hangs("rank 0"));
        }
        for (peer, known) in self.peers.iter().zip(&mut state.peers) {
            let fault = self
                .failed(peer, known, waits, calls, apart)
                .or_else(|| self.lost(peer, known))
                .or_else(|| self.silent(peer))
                .or_else(|| {
                    let lags = self.lags(&mut known.lags, expects && known.calls < most);
                    lags.then(|| self.hangs(&peer.name))
                });
            if fault.is_some() {
                return fault;
            }
        }
        self.devices_hang(state)
    }

    /// Returns a device that the others' devices wait for. Their hosts wait too, so that no call shows it.
    fn devices_hang(&self, state: &mut State) -> Option<Fault> {
        if !self.place.leads() {
            return None;
        }
        let own = (self.tick.load(Ordering::Relaxed), "rank 0");
        let others =
            self.peers.iter().zip(&state.peers).map(|(peer, known)| (known.tick, peer.name.as_str()));
        let ticks: Vec<(u64, &str)> = [own].into_iter().chain(others).collect();
        let (slowest, name) = *ticks.iter().min_by_key(|(tick, _)| *tick).expect("rank 0's is there");
        if ticks.iter().all(|(tick, _)| tick % 2 == 0) {
            state.slowest = None;
            return None;
        }
        let (tick, since) = *state.slowest.get_or_insert_with(|| (slowest, Instant::now()));
        if tick != slowest {
            state.slowest = Some((slowest, Instant::now()));
            return None;
        }
        (since.elapsed() >= self.limits.hang).then(|| match ticks.iter().all(|(tick, _)| *tick == slowest) {
            false => self.hangs(name),
            true => self.nothing_moves(),
        })
    }

    /// Returns the fault of a rank that reported why it fails. If ranks fail together with the same reason, rank 0
    /// reports it.
    fn failed(
        &self,
        peer: &Peer,
        known: &Known,
        waits: Option<Instant>,
        calls: u64,
        apart: bool,
    ) -> Option<Fault> {
        let (fault, at) = known.failed.as_ref()?;
        let signal = matches!(fault.kind, Kind::Interrupted | Kind::InterruptedUnsaved);
        let refuses = !apart && matches!(fault.kind, Kind::Config | Kind::Data | Kind::Model);
        // After a signal rank 0 may still write the checkpoint that all agreed on, unless it waits for the others. If a
        // rank refuses something, rank 0 may soon refuse it too.
        let longest = if (signal || refuses) && waits.is_none() { STOP_MAX } else { REASON_MAX };
        (at.elapsed() >= longest).then(|| match refuses && waits.is_some() && calls > known.calls {
            true => refused_by_one(&peer.name, fault.clone()),
            false => of_rank(&peer.name, fault.clone()),
        })
    }

    fn lost(&self, peer: &Peer, known: &Known) -> Option<Fault> {
        let lost = known.lost.filter(|_| known.failed.is_none())?;
        if let Some(fault) = &known.ended {
            return Some(of_rank(&peer.name, fault.clone()));
        }
        let waits = self.place.leads() && lost.elapsed() < REASON_MAX;
        if !self.place.leads() && PARENT_TELLS.load(Ordering::SeqCst) {
            TOLD.store(true, Ordering::SeqCst);
        }
        (!waits).then(|| {
            Fault::new(
                Kind::Device,
                format!("{} ended without a message: its connection closed, so it was killed or crashed", peer.name),
            )
            .help("start it again: it continues from its newest checkpoint; that rank's log and its node say more")
        })
    }

    fn silent(&self, peer: &Peer) -> Option<Fault> {
        let heard = Duration::from_millis(peer.heard.load(Ordering::Relaxed));
        let silent = self.began.elapsed().saturating_sub(heard);
        (silent >= self.limits.silence).then(|| {
            let seconds = self.limits.silence.as_secs();
            Fault::new(Kind::Device, format!("{} has been silent for {seconds} s", peer.name))
                .help("its node or the network between them failed; started again, the run continues from its newest checkpoint")
        })
    }

    /// Returns whether a rank that lives has not come for too long to a call that others came to.
    fn lags(&self, since: &mut Option<Instant>, lags: bool) -> bool {
        match lags {
            true => since.get_or_insert_with(Instant::now).elapsed() >= self.limits.hang,
            false => {
                *since = None;
                false
            }
        }
    }

    fn hangs(&self, name: &str) -> Fault {
        let seconds = self.limits.hang.as_secs();
        let message = format!("{name} hangs: the other ranks have waited for it for {seconds} s");
        Fault::new(Kind::Device, message).help(
            "its device may have failed: look at nvidia-smi on its node; HONE_RANKS_TIMEOUT names another time",
        )
    }

    fn nothing_moves(&self) -> Fault {
        let seconds = self.limits.hang.as_secs();
        let message = format!("the ranks' GPUs hang: all of them have been in one sum for {seconds} s");
        Fault::new(Kind::Device, message).help(
            "the link between them may have failed: NCCL_DEBUG=INFO shows what NCCL does, and HONE_RANKS_TIMEOUT names \
             another time",
        )
    }

    /// Ends all ranks; the first reason counts.
    fn end(&self, fault: Fault) {
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        state.end = Some((fault.clone(), Instant::now()));
        drop(state);
        self.changed.notify_all();
        if self.place.leads() {
            self.tell_all(&Frame::of(What::End, 0, &fault));
        }
    }

    /// Sends a last frame to every other rank.
    fn tell_all(&self, frame: &Frame) {
        for peer in &self.peers {
            let until = Instant::now() + REASON_MAX;
            loop {
                if let Ok(mut writer) = peer.writer.try_lock() {
                    let _ = writer.set_write_timeout(Some(REASON_MAX));
                    let _ = frame.write(&mut *writer);
                    break;
                }
                if Instant::now() >= until {
                    // A write to a rank that reads nothing ends by this.
                    let _ = peer.stream.shutdown(Shutdown::Both);
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Ends the process if its work continues long after all ranks should have ended.
    fn end_process_if_late(&self) {
        let state = self.lock();
        let late = state.end.as_ref().filter(|(_, at)| !state.left && at.elapsed() >= LEAVE_MAX);
        let Some((fault, _)) = late else { return };
        match self.place.leads() || !state.told {
            true => Word::of(fault).speak(),
            false => last_word::leave(fault.kind.exit_code()),
        }
    }

    /// Ends rank 0: sends the end to the others, who have read it when their connections close.
    fn leave_first(&self, fault: Option<Fault>) -> Option<Fault> {
        match fault {
            Some(fault) => self.end(fault),
            None => {
                self.lock().done = true;
                self.tell_all(&Frame::bare(What::Done));
            }
        }
        self.wait(FAREWELL_MAX, |state| state.peers.iter().all(|known| known.lost.is_some()));
        self.lock().end.as_ref().map(|(fault, _)| fault.clone())
    }

    /// Ends another rank: after its own fault once rank 0 has received it, otherwise when rank 0 ends.
    fn leave_other(&self, fault: Option<Fault>) -> Option<Fault> {
        let first = &self.peers[0];
        let ended = |state: &State| state.end.is_some() || state.done;
        let end = |state: &State| state.end.as_ref().map(|(fault, _)| fault.clone());
        let Some(fault) = fault else {
            self.wait(Duration::MAX, ended);
            return end(&self.lock());
        };
        let told = |state: &State| end(state).filter(|_| state.told);
        if let Some(end) = told(&self.lock()) {
            return Some(end);
        }
        let frame = Frame::of(What::Failed, 0, &fault);
        if let Ok(mut writer) = first.writer.lock() {
            let _ = frame.write(&mut *writer);
        }
        // Rank 0, if it lives, now hears too what this rank found by itself.
        let found = self.lock().end.is_some();
        let longest = if found { FAREWELL_MAX } else { STOP_MAX + REASON_MAX + FAREWELL_MAX };
        self.wait(longest, |state| state.told || state.done || state.peers[0].lost.is_some());
        Some(told(&self.lock()).unwrap_or(fault))
    }

    /// Waits until `is_so` holds, for at most `longest`.
    fn wait(&self, longest: Duration, is_so: impl Fn(&State) -> bool) {
        let began = Instant::now();
        let mut state = self.lock();
        while !is_so(&state) && began.elapsed() < longest {
            let waited = self.changed.wait_timeout(state, LOOK_INTERVAL);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

impl Drop for Link {
    /// Leaves with a fault if the rank panics.
    fn drop(&mut self) {
        if !self.shared.lock().left {
            let _ = self.leave::<()>(Err(Fault::internal("hone failed: see the panic message of this rank")));
        }
    }
}

/// Returns the fault of a rank that refuses what rank 0 has accepted: their inputs differ, so that a retry can help.
fn refused_by_one(name: &str, fault: Fault) -> Fault {
    let refused = fault.kind.name();
    let fault = Fault { kind: Kind::Device, ..fault }.at(name);
    let message = format!("{}; rank 0 found no such fault ({refused}) in its own inputs", fault.message);
    let files = "if the ranks do not see the same files yet, a retry succeeds when they do";
    let help = fault.help.as_ref().map_or(files.to_owned(), |help| format!("{help}; {files}"));
    Fault { message, ..fault }.help(help)
}

/// A connection that notes when bytes came.
struct Heard<'a> {
    stream: &'a TcpStream,
    at: &'a AtomicU64,
    began: Instant,
}

impl Read for Heard<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.stream.read(buffer)?;
        self.at.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::place::Meeting;

    const LIMITS: Limits = Limits {
        wait: Duration::from_secs(30),
        silence: Duration::from_secs(30),
        hang: Duration::from_secs(30),
    };

    fn seat(rank: usize, world: usize, token: &str) -> Seat {
        let place = Place { rank, world, local_rank: rank, local_world: world };
        // Tests run beside each other. The token identifies the ranks of a test, and one of the ports is free.
        let meeting =
            Meeting { host: "127.0.0.1".into(), ports: (42_110..42_174).collect(), token: token.into() };
        Seat { place, meeting }
    }

    fn meets(rank: usize, world: usize, token: &str, limits: Limits) -> Met {
        meet::meet(&seat(rank, world, token), &limits, &|_| None).unwrap()
    }

    /// Runs the same work on every rank, each in a thread; the results by rank.
    fn ranks<T: Send>(world: usize, token: &str, limits: Limits, work: impl Fn(&Link) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let rank = |rank| {
                scope.spawn(move || {
                    let place = seat(rank, world, token).place;
                    work(&Link::over(place, limits, meets(rank, world, token, limits)).unwrap())
                })
            };
            let all: Vec<_> = (0..world).map(rank).collect();
            all.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn rank(link: &Link) -> usize {
        link.place().rank
    }

    #[test]
    fn every_rank_gets_the_same_bits() {
        let all = ranks(3, "same bits", LIMITS, |link| {
            let own = rank(link) as f32;
            let values = Tensor::from_vec(vec![1.0f32 + own, 1e8, 0.1 * own], 3, &Device::Cpu).unwrap();
            link.sum(&values).unwrap();
            let whole = Tensor::from_vec(vec![0u8; 6], 6, &Device::Cpu).unwrap();
            let piece = Tensor::from_vec(vec![rank(link) as u8, 9], 2, &Device::Cpu).unwrap();
            link.gather_into(&whole, &piece).unwrap();
            let texts = link.exchange(&vec![b'a'; rank(link)]).unwrap();
            let first = link.broadcast(format!("rank {own}").as_bytes()).unwrap();
            link.leave(Ok(())).unwrap();
            (values.to_vec1::<f32>().unwrap(), whole.to_vec1::<u8>().unwrap(), texts, first)
        });
        let third = (f64::from(0.1f32) + f64::from(0.2f32)) as f32;
        let texts = vec![Vec::new(), b"a".to_vec(), b"aa".to_vec()];
        let expected = (vec![6.0, 3e8, third], vec![0, 9, 1, 9, 2, 9], texts, b"rank 0".to_vec());
        assert!(all.iter().all(|found| *found == expected), "{all:?}");
    }

    /// Returns the faults of all ranks if rank 1 fails while the others go on to a call.
    fn failing(token: &str, fault: &Fault, apart: bool) -> Vec<Fault> {
        ranks(3, token, LIMITS, |link| {
            link.works_apart(apart);
            let ended = match rank(link) {
                1 => Err(fault.clone()),
                _ => link.exchange(b"x").map(drop),
            };
            link.leave(ended).unwrap_err()
        })
    }

    #[test]
    fn a_failing_rank_ends_all_with_its_reason() {
        // A fault after which somebody must act, with any finding of the others, and a fault in a part of the data that
        // no other rank has read.
        for (fault, apart) in [(Fault::new(Kind::Auth, "row 7"), false), (Fault::data("row 7"), true)] {
            let all = failing(&format!("failing {apart}"), &fault.clone().help("look"), apart);
            for found in &all {
                assert_eq!((found.kind, found.help.as_deref()), (fault.kind, Some("look")));
                let message = &found.message;
                assert!(message.starts_with("rank 1 of 3 (") && message.ends_with("): row 7"), "{message}");
            }
        }
    }

    /// All ranks have read the same data, as far as they know.
    #[test]
    fn a_rank_that_refuses_what_rank_0_accepts_disagrees() {
        for fault in failing("refuses", &Fault::data("row 7").help("look"), false) {
            assert_eq!(fault.kind, Kind::Device);
            let (message, help) = (&fault.message, fault.help.as_deref().unwrap());
            assert!(
                message.starts_with("rank 1 of 3 (") && message.contains("): row 7; rank 0 found no"),
                "{message}"
            );
            assert!(help.starts_with("look; if the ranks do not see the same files yet"), "{help}");
        }
    }

    /// Rank 0 needs longer to find the same.
    #[test]
    fn what_all_ranks_refuse_is_not_tried_again() {
        let all = ranks(2, "refuse", LIMITS, |link| {
            if rank(link) == 0 {
                std::thread::sleep(REASON_MAX * 2);
            }
            link.leave::<()>(Err(Fault::data("row 7"))).unwrap_err()
        });
        assert!(all.iter().all(|fault| fault.kind == Kind::Data && fault.message == "row 7"), "{all:?}");
    }

    /// Rank 0 reports a fault that all ranks find at the same time, each by itself.
    #[test]
    fn ranks_that_stop_together_say_what_rank_0_says() {
        let all = ranks(2, "together", LIMITS, |link| {
            link.exchange(b"stop").unwrap();
            if rank(link) == 0 {
                std::thread::sleep(REASON_MAX * 2); // writes a checkpoint
            }
            let (kind, message) = match rank(link) {
                0 => (Kind::Interrupted, "checkpoint written"),
                _ => (Kind::InterruptedUnsaved, "not saved here"),
            };
            link.leave::<()>(Err(Fault::new(kind, message))).unwrap_err()
        });
        assert!(all.iter().all(|fault| fault.message == "checkpoint written"), "{all:?}");
    }

    #[test]
    fn a_signal_to_one_rank_ends_those_that_wait_for_it() {
        let all = ranks(2, "signal", LIMITS, |link| {
            let ended = match rank(link) {
                0 => link.exchange(b"x").map(drop),
                _ => Err(interrupt::stopped()),
            };
            link.leave(ended).unwrap_err()
        });
        assert!(all.iter().all(|fault| fault.kind == Kind::InterruptedUnsaved), "{all:?}");
    }

    #[test]
    fn a_lost_rank_is_named_with_the_reason_that_its_parent_knows() {
        for (token, parent_knows) in [("lost", false), ("lost, known", true)] {
            let all = ranks(3, token, LIMITS, |link| {
                if rank(link) != 2 {
                    return link.leave(link.exchange(b"x").map(drop)).unwrap_err().message;
                }
                link.shared.peers[0].stream.shutdown(Shutdown::Both).unwrap();
                if parent_knows {
                    let killed = Fault::new(Kind::Device, "killed by signal 9");
                    meet::tell_end(&seat(0, 3, token).meeting, 2, &killed);
                }
                String::new()
            });
            let reason = if parent_knows { "): killed by signal 9" } else { "ended without a message" };
            for message in &all[..2] {
                assert!(message.starts_with("rank 2 of 3 (") && message.contains(reason), "{message}");
            }
        }
    }

    #[test]
    fn a_silent_rank_is_named() {
        let limits = Limits { silence: Duration::from_secs(3), ..LIMITS };
        std::thread::scope(|scope| {
            // It meets the other and then stands still, as a stopped process does.
            let silent = scope.spawn(move || meets(1, 2, "silent", limits));
            let first = Link::over(seat(0, 2, "").place, limits, meets(0, 2, "silent", limits)).unwrap();
            let still = silent.join().unwrap();
            let fault = first.leave(first.exchange(b"x").map(drop)).unwrap_err();
            assert!(fault.message.ends_with("has been silent for 3 s"), "{fault}");
            assert_eq!(fault.kind, Kind::Device);
            drop(still);
        });
    }

    #[test]
    fn a_rank_that_does_not_come_to_a_call_of_training_is_named() {
        let limits = Limits { hang: Duration::from_secs(1), ..LIMITS };
        let all = ranks(3, "hang", limits, |link| {
            link.expects_progress(true);
            link.exchange(b"all come").unwrap();
            let ended = match rank(link) {
                1 => {
                    link.shared.wait(Duration::from_secs(20), |state| state.end.is_some());
                    Err(link.ended().expect("rank 0 ended it"))
                }
                _ => link.exchange(b"one is missing").map(drop),
            };
            link.leave(ended).unwrap_err().message
        });
        assert!(
            all.iter().all(|message| message.starts_with("rank 1 of 3") && message.contains("hangs")),
            "{all:?}"
        );
    }

    #[test]
    fn a_rank_that_makes_progress_may_keep_the_others_waiting() {
        let limits = Limits { hang: Duration::from_secs(2), ..LIMITS };
        // Ranks that are slow, one at a time: each takes twice the limit.
        let all = ranks(2, "moves", limits, |link| {
            link.expects_progress(true);
            for slow in 0..2 {
                for _ in 0..if rank(link) == slow { 20 } else { 0 } {
                    std::thread::sleep(limits.hang / 10);
                    link.progressed();
                }
                link.exchange(b"loaded").map_err(|fault| fault.message)?;
            }
            link.expects_progress(false);
            Ok::<_, String>(link.leave(Ok(())).is_ok())
        });
        assert_eq!(all, [Ok(true), Ok(true)]);
    }

    #[test]
    fn ranks_that_make_other_calls_are_named_with_both() {
        let all = ranks(2, "calls", LIMITS, |link| {
            let ended = match rank(link) {
                0 => link.exchange(b"abc").map(drop),
                _ => link.broadcast(b"").map(drop),
            };
            link.leave(ended).unwrap_err().message
        });
        let [first, second] = &all[..] else { unreachable!() };
        assert!(
            first.contains("made call 1 (Broadcast) of 0 bytes while rank 0 made call 1 (Exchange) of 3"),
            "{first}"
        );
        assert_eq!(first, second);
    }

    #[test]
    fn after_training_rank_0_goes_on_alone() {
        let all = ranks(2, "alone", LIMITS, |link| {
            link.ends_training().unwrap();
            if rank(link) == 1 {
                link.shared.peers[0].stream.shutdown(Shutdown::Both).unwrap();
                return link.leave(Ok(())).is_err();
            }
            std::thread::sleep(REASON_MAX * 2);
            link.leave(Ok(())).is_ok()
        });
        assert_eq!(all, [true, true]);
    }
}
