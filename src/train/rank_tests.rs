//! Promises about training on several ranks: the same run for every number of ranks, and one end for all of them.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;

use super::best::{Judging, Measure, Stopping};
use super::spike::{Policy, Spikes};
use super::tests::{decoder, decoder_of_rank, examples, running};
use super::*;
use crate::facts::Keep;
use crate::fault::{Fault, Kind, Result};
use crate::ops::starve;
use crate::ranks::threads::{self, Threads};
use crate::ranks::{Collective, Place};
use crate::report::Report;

/// The results of a run on one rank.
struct Run {
    ended: Result<Trained>,
    params: Vec<f64>,
    metrics: Vec<Metric>,
}

impl Run {
    /// Returns the step and loss of each line of metrics.
    fn losses(&self) -> Vec<(u64, f64)> {
        let loss = |metric: &Metric| match metric {
            Metric::Step { step, loss, .. } => (*step, *loss),
            Metric::Evaluation { step, eval_loss, .. } => (*step, *eval_loss),
        };
        self.metrics.iter().map(loss).collect()
    }

    fn fault(&self) -> &Fault {
        self.ended.as_ref().unwrap_err()
    }
}

/// Trains on these ranks. `folder` has the checkpoints. `prepare` runs on the thread of each rank before it begins.
fn train_on<R: Collective>(
    ranks: Vec<Threads>,
    options: &Options,
    folder: Option<&Path>,
    planned: bool,
    prepare: impl Fn(Threads) -> R + Sync,
) -> Vec<Run> {
    let checkpoints = folder.map(|folder| Checkpoints { folder: folder.to_owned(), fingerprint: "a".into() });
    let all = examples();
    threads::all(ranks, |ranks| {
        // Smaller matrices have moments in 32 bits.
        let (decoder, adapter) = if options.eight_bit_moments { decoder_of_rank(128) } else { decoder() };
        let mut passes = match planned {
            true => Passes::planned(running(&decoder, &adapter)),
            false => Passes::Fixed(Keep::Everything),
        };
        let (mut metrics, ranks) = (Vec::new(), prepare(ranks));
        let mut log = |metric: &Metric| {
            metrics.push(metric.clone());
            Ok(())
        };
        let data = Data { train: &all, evaluation: &all[3..10] };
        let ended = run_together(
            &ranks,
            &decoder,
            &adapter,
            data,
            options,
            &mut passes,
            checkpoints.as_ref(),
            &Report::silent(),
            &mut log,
        );
        starve::set(None);
        Run { ended, params: crate::ops::cpu::to_f64(&adapter.params).unwrap(), metrics }
    })
}

/// Trains on so many ranks, which all end well and alike. Returns rank 0's run.
fn train(world: usize, options: &Options, folder: Option<&Path>) -> Run {
    let mut runs = train_on(Threads::of(world), options, folder, false, |ranks| ranks);
    let first = runs.remove(0);
    let expected = first.ended.as_ref().unwrap();
    for run in runs {
        assert!(run.params == first.params, "every rank ends with the same bits");
        assert!(run.metrics.is_empty(), "rank 0 alone writes metrics");
        let found = run.ended.unwrap();
        let timeless =
            |trained: &Trained| Trained { seconds: 0.0, tokens_per_second: 0.0, ..trained.clone() };
        assert_eq!(timeless(&found), timeless(expected));
    }
    first
}

fn options(steps: u64) -> Options {
    Options {
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        // AdamW divides by a gradient's own size. Without this floor, a rounding error in the smallest gradients
        // would show as large as any.
        epsilon: 1e-3,
        batch_examples: 4,
        accumulation: 2,
        packing: Some(40),
        steps_max: Some(steps),
        logging: Every::Steps(1),
        evaluation: Every::Steps(2),
        eval_batch_examples: 2,
        ..Options::default()
    }
}

/// Returns the difference of two lists, relative to the second.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

fn assert_close(found: &Run, expected: &Run, what: &str) {
    let apart = distance(&found.params, &expected.params);
    assert!(apart < 1e-6, "{what}: parameters are apart by {apart:e}");
    assert_eq!(found.losses().len(), expected.losses().len(), "{what}");
    for ((step, loss), (expected_step, expected)) in found.losses().into_iter().zip(expected.losses()) {
        assert_eq!(step, expected_step, "{what}");
        assert!((loss - expected).abs() < 1e-6 * expected, "{what}, step {step}: {loss}, not {expected}");
    }
}

#[test]
fn any_number_of_ranks_trains_the_same_run() {
    for packing in [Some(40), None] {
        // Eight examples a step, then four: more ranks than examples leave some without any.
        let options = Options { packing, ..options(4) };
        let one = train(1, &options, None);
        assert_eq!(one.metrics.len(), 6, "four steps and two evaluations");
        for world in [2, 3, 4, 9] {
            let run = train(world, &options, None);
            assert_close(&run, &one, &format!("{world} ranks, packing {packing:?}"));
            let again = train(world, &options, None);
            assert!(again.params == run.params && again.metrics == run.metrics, "{world} ranks twice");
        }
    }
}

#[test]
fn one_example_a_step_leaves_ranks_without_work() {
    let options = Options { batch_examples: 1, accumulation: 1, ..options(6) };
    let (one, three) = (train(1, &options, None), train(3, &options, None));
    assert_close(&three, &one, "three ranks");
    let spikes = Some(Spikes { policy: Policy::Skip, factor: 1.1, window: 3 });
    let options = Options { spikes, steps_max: Some(12), evaluation: Every::Never, ..options };
    let (one, three) = (train(1, &options, None), train(3, &options, None));
    assert_close(&three, &one, "spikes are skipped alike");
    let skipped = |run: &Run| run.ended.as_ref().unwrap().skipped_steps;
    assert!(skipped(&one) > 0 && skipped(&one) == skipped(&three));
}

#[test]
fn a_checkpoint_is_continued_by_another_number_of_ranks() {
    let options = |steps| Options { checkpoint: Every::Steps(1), ..options(steps) };
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (mixed, same) = (folders[0].path(), folders[1].path());
    let undisturbed = train(1, &options(6), None);
    train(4, &options(2), Some(mixed));
    assert_eq!(train(2, &options(4), Some(mixed)).ended.unwrap().resumed_at, Some(2));
    let last = train(1, &options(6), Some(mixed));
    assert_eq!(last.ended.as_ref().unwrap().resumed_at, Some(4));
    assert!(distance(&last.params, &undisturbed.params) < 1e-6);
    // The same number of ranks continues to the same bits.
    train(3, &options(3), Some(same));
    let continued = train(3, &options(6), Some(same));
    assert!(continued.params == train(3, &options(6), None).params);
}

/// Moments of 8 bits lose nothing on their way to another number of ranks: one more step is the same on all of them.
/// Later steps round codes at other places.
#[test]
fn eight_bit_moments_are_continued_by_another_number_of_ranks() {
    let options = |steps| {
        let eight_bit_moments = true;
        Options { checkpoint: Every::Steps(1), evaluation: Every::Never, eight_bit_moments, ..options(steps) }
    };
    // The same ranks write the same checkpoint after step 2 each time.
    let continued = |world: usize, steps| {
        let folder = tempfile::tempdir().unwrap();
        train(4, &options(2), Some(folder.path()));
        let run = train(world, &options(steps), Some(folder.path()));
        assert_eq!(run.ended.as_ref().unwrap().resumed_at, Some(2));
        run
    };
    let one = continued(1, 3);
    for world in [2, 3, 4] {
        assert_close(&continued(world, 3), &one, &format!("{world} ranks"));
    }
    // The same ranks go on as if nothing had been between.
    assert!(continued(4, 6).params == train(4, &options(6), None).params);
}

/// Ranks whose sums run beside the pass: they take the values at once and deliver the sums as late as they may.
struct Late {
    ranks: Threads,
    /// Tensors and the values that they had.
    begun: Mutex<Vec<(Tensor, Tensor)>>,
    count: AtomicU64,
}

impl Late {
    fn new(ranks: Threads) -> Late {
        Late { ranks, begun: Mutex::default(), count: AtomicU64::new(0) }
    }
}

impl Collective for Late {
    fn place(&self) -> Place {
        self.ranks.place()
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        self.ranks.sum(flat)
    }

    fn begin_sum(&self, flat: &Tensor) -> Result<()> {
        let values = crate::ops::cpu::to_f64(flat)?;
        let values = Tensor::from_vec(values, flat.elem_count(), flat.device())?;
        // A program that reads or adds to it before the sum has arrived spoils the run.
        crate::ops::flat::write(flat, &(flat.zeros_like()? / 0.0)?)?;
        self.count.fetch_add(1, Ordering::SeqCst);
        self.begun.lock().unwrap().push((flat.clone(), values));
        Ok(())
    }

    fn summed(&self) -> Result<()> {
        for (flat, values) in self.begun.lock().unwrap().drain(..) {
            let values = values.to_dtype(flat.dtype())?;
            self.ranks.sum(&values)?;
            crate::ops::flat::write(&flat, &values)?;
        }
        Ok(())
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        self.ranks.gather_into(whole, piece)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        assert!(self.begun.lock().unwrap().is_empty(), "every sum has ended before the ranks speak");
        self.ranks.exchange(bytes)
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.ranks.broadcast(bytes)
    }
}

/// Ranks that sum everything when their passes are done.
struct AtTheEnd(Threads, Mutex<Vec<Tensor>>);

impl Collective for AtTheEnd {
    fn place(&self) -> Place {
        self.0.place()
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        self.0.sum(flat)
    }

    fn begin_sum(&self, flat: &Tensor) -> Result<()> {
        self.1.lock().unwrap().push(flat.clone());
        Ok(())
    }

    fn summed(&self) -> Result<()> {
        self.1.lock().unwrap().drain(..).try_for_each(|flat| self.0.sum(&flat))
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        self.0.gather_into(whole, piece)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.exchange(bytes)
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.0.broadcast(bytes)
    }
}

#[test]
fn sums_beside_the_last_pass_have_the_bits_of_sums_at_the_end() {
    // Several passes a rank; then fewer passes than ranks.
    for (world, options) in [
        (2, options(3)),
        (3, Options { packing: None, ..options(3) }),
        (3, Options { batch_examples: 1, accumulation: 1, ..options(3) }),
    ] {
        let early = train_on(Threads::of(world), &options, None, false, Late::new);
        let end =
            train_on(Threads::of(world), &options, None, false, |ranks| AtTheEnd(ranks, Mutex::default()));
        let plain = train(world, &options, None);
        for run in early.iter().chain(&end) {
            run.ended.as_ref().unwrap();
            assert!(run.params == plain.params, "{world} ranks");
        }
        assert!(early[0].metrics == plain.metrics && end[0].metrics == plain.metrics);
    }
}

#[test]
fn a_pass_that_fails_in_its_middle_leaves_no_sum_behind() {
    let options = Options { packing: Some(128), evaluation: Every::Never, ..options(3) };
    let calm = train_on(Threads::of(2), &options, None, true, Late::new);
    // From the first allocation of a pass to those of its way back.
    for at in [1, 20, 40, 60, 80, 100, 120, 140] {
        let runs = train_on(Threads::of(2), &options, None, true, |ranks| {
            starve::set((ranks.place().rank == 1).then_some((at, 1)));
            Late::new(ranks)
        });
        for run in &runs {
            run.ended.as_ref().unwrap();
            let apart = distance(&run.params, &calm[0].params);
            assert!(run.params == runs[0].params && apart < 2e-5, "allocation {at}: {apart:e}");
        }
    }
    let undisturbed = train(3, &options, None);
    // Exchanges: the start, step 1, the confirmation before its checkpoint, step 2.
    for at in [2, 4] {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { checkpoint: Every::Steps(1), ..options.clone() };
        for run in train_on(Threads::of(3), &options, Some(folder.path()), false, |ranks| {
            Liar::new(ranks, Lie::Stopped(at))
        }) {
            assert!(run.ended.is_err());
        }
        let continued = train(3, &options, Some(folder.path()));
        assert!(continued.params == undisturbed.params, "stopped at exchange {at}");
    }
}

#[test]
fn ranks_stop_early_and_restore_the_best_together() {
    let judging = Judging {
        source: None,
        measure: Measure::Loss,
        greater: true, // The first evaluation is the best: two more end the run.
        restore: true,
        stopping: Some(Stopping { patience: 2, threshold: 0.0 }),
    };
    let options = Options { judging: Some(judging), evaluation: Every::Steps(1), ..options(9) };
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (train(1, &options, None), train(2, &options, Some(folder.path())));
    assert_close(&two, &one, "two ranks");
    let trained = two.ended.unwrap();
    assert_eq!((trained.steps, trained.restored_step, trained.stopped_early), (3, Some(1), true));
}

#[test]
fn a_rank_that_runs_out_of_memory_makes_all_repeat_the_step() {
    let options = Options { packing: Some(128), evaluation: Every::Never, ..options(3) };
    let calm = train_on(Threads::of(2), &options, None, true, |ranks| ranks);
    for (rank, at, times) in [(1, 1, 1), (0, 40, 1), (1, 40, 3)] {
        let runs = train_on(Threads::of(2), &options, None, true, |ranks| {
            starve::set((ranks.place().rank == rank).then_some((at, times)));
            ranks
        });
        for run in &runs {
            run.ended.as_ref().unwrap();
            assert!(run.params == runs[0].params);
            // Passes of another size add in another order.
            let apart = distance(&run.params, &calm[0].params);
            assert!(apart < 2e-5, "{times} failures at {at} on rank {rank}: {apart:e}");
        }
    }
    let runs = train_on(Threads::of(2), &options, None, true, |ranks| {
        starve::set((ranks.place().rank == 1).then_some((1, usize::MAX)));
        ranks
    });
    for run in &runs {
        assert_eq!(run.fault().kind, Kind::Capacity);
        let message = &run.fault().message;
        assert!(message.contains("out of memory at step 1 with the smallest plan"), "{message}");
    }
    assert!(runs[0].fault().message.starts_with("rank 1: "), "{}", runs[0].fault().message);
}

#[test]
fn a_rank_that_is_gone_at_any_call_ends_all() {
    let options = Options { checkpoint: Every::Steps(1), ..options(2) };
    let undisturbed = train(3, &options, None);
    for call in 1.. {
        let folder = tempfile::tempdir().unwrap();
        let ranks = Threads::of(3).into_iter().map(|ranks| match ranks.place().rank {
            1 => ranks.dying_at(call),
            _ => ranks,
        });
        let runs = train_on(ranks.collect(), &options, Some(folder.path()), false, |ranks| ranks);
        if runs.iter().all(|run| run.ended.is_ok()) {
            // The start, the parameters, for each of two steps an exchange, the sums of two pieces and the rest, and
            // the confirmation before its checkpoint, and the evaluation.
            assert_eq!(call - 1, 13);
            return;
        }
        for run in runs {
            let fault = run.ended.unwrap_err();
            assert_eq!((fault.kind, fault.message.as_str()), (Kind::Device, "rank 1 is gone"), "call {call}");
        }
        let continued = train(3, &options, Some(folder.path()));
        assert!(continued.params == undisturbed.params, "call {call}");
    }
}

/// A rank that sends a wrong message at one of its exchanges, or a wrong value in one of its sums.
struct Liar {
    ranks: Threads,
    calls: AtomicU64,
    lie: Option<Lie>,
}

#[derive(Clone, Copy)]
enum Lie {
    /// A signal came before this exchange.
    Stopped(u64),
    /// This sum has another value.
    Sum(u64),
}

impl Liar {
    fn new(ranks: Threads, lie: Lie) -> Liar {
        let lie = (ranks.place().rank == 1).then_some(lie);
        Liar { ranks, calls: AtomicU64::new(0), lie }
    }
}

impl Collective for Liar {
    fn place(&self) -> Place {
        self.ranks.place()
    }

    fn sum(&self, flat: &Tensor) -> Result<()> {
        self.ranks.sum(flat)?;
        if let Some(Lie::Sum(at)) = self.lie
            && self.calls.fetch_add(1, Ordering::SeqCst) + 1 == at
        {
            crate::ops::cpu::edit(flat, |values: &mut [f32]| values[7] += 1e-3)?;
        }
        Ok(())
    }

    fn gather_into(&self, whole: &Tensor, piece: &Tensor) -> Result<()> {
        self.ranks.gather_into(whole, piece)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(Lie::Stopped(at)) = self.lie
            && self.calls.fetch_add(1, Ordering::SeqCst) + 1 == at
        {
            let mut word: serde_json::Value = serde_json::from_slice(bytes).unwrap();
            word["said"] = "Stopped".into();
            return self.ranks.exchange(&serde_json::to_vec(&word).unwrap());
        }
        self.ranks.exchange(bytes)
    }

    fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.ranks.broadcast(bytes)
    }
}

#[test]
fn a_signal_to_one_rank_stops_all_with_a_checkpoint() {
    let undisturbed = train(3, &options(4), None);
    // Exchanges: the start, step 1, step 2, the confirmation and the evaluation after it, step 3.
    for (at, step) in [(3, 1), (5, 2), (6, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let lie = |ranks| Liar::new(ranks, Lie::Stopped(at));
        for run in train_on(Threads::of(3), &options(4), Some(folder.path()), false, lie) {
            assert_eq!(run.fault().kind, Kind::Interrupted);
            let expected = format!("stopped by a signal after step {step}; checkpoint written");
            assert_eq!(run.fault().message, expected);
        }
        let continued = train(3, &options(4), Some(folder.path()));
        assert!(continued.params == undisturbed.params, "stopped at exchange {at}");
    }
    // Nothing is saved before the first step.
    let folder = tempfile::tempdir().unwrap();
    let lie = |ranks| Liar::new(ranks, Lie::Stopped(2));
    for run in train_on(Threads::of(3), &options(4), Some(folder.path()), false, lie) {
        assert_eq!(run.fault().kind, Kind::InterruptedUnsaved);
    }
}

#[test]
fn a_rank_that_computes_other_numbers_is_found() {
    // The first sum shares the parameters.
    let runs = train_on(Threads::of(2), &options(4), None, false, |ranks| Liar::new(ranks, Lie::Sum(2)));
    for run in &runs {
        assert_eq!(run.fault().kind, Kind::Device);
        let message = &run.fault().message;
        assert!(message.starts_with("rank 1 does not compute what rank 0 computes"), "{message}");
    }
    assert_eq!(runs[0].losses().len(), 1, "it is found after the next step's passes");
}

/// A step that the ranks do not agree on becomes neither a checkpoint nor the end of a run.
#[test]
fn numbers_that_differ_are_found_before_anything_keeps_them() {
    for (steps, checkpoint) in [(4, Every::Steps(1)), (2, Every::Never)] {
        let options = Options { checkpoint, evaluation: Every::Never, ..options(steps) };
        let undisturbed = train(2, &options, None);
        let folder = tempfile::tempdir().unwrap();
        // A sum of the parameters, and three in each step: it is the first of the second step that differs.
        let lie = |ranks| Liar::new(ranks, Lie::Sum(5));
        for run in train_on(Threads::of(2), &options, Some(folder.path()), false, lie) {
            assert!(run.fault().message.contains("after step 2"), "{}", run.fault().message);
        }
        let resumed = train(2, &options, Some(folder.path()));
        assert!(resumed.params == undisturbed.params, "the checkpoint is that of step 1");
        let expected = matches!(options.checkpoint, Every::Steps(1)).then_some(1);
        assert_eq!(resumed.ended.unwrap().resumed_at, expected);
    }
}

#[test]
fn a_fault_of_rank_0_alone_ends_all_with_its_words() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    let options = Options { checkpoint: Every::Steps(1), evaluation: Every::Never, ..options(4) };
    let runs = train_on(Threads::of(3), &options, Some(&gone), false, |ranks| ranks);
    assert_eq!(runs[0].fault().kind, Kind::Storage);
    for run in &runs[1..] {
        assert_eq!(run.fault().kind, Kind::Storage);
        assert_eq!(run.fault().message, format!("rank 0: {}", runs[0].fault().message));
    }
}
