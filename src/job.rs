//! The whole job on one page: a plan in, a trained adapter and its image out.
//!
//! Cheap checks come first: the model's small files and facts, the adapter's sites, the output folder, the data. The
//! weights are fetched when all of these fit, just before they are loaded. A restarted job finds its folder, skips
//! what is finished, and continues training from its newest checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use candle_core::Device;
use serde_json::{Value as Json, json};

use crate::adapter;
use crate::answers;
use crate::dataset::{self, Chat, Set, Tokenizer};
use crate::device;
use crate::facts::Facts;
use crate::fault::{Fault, Kind, Result};
use crate::fetch;
use crate::generate::Sampling;
use crate::generate::defaults::Defaults;
use crate::interrupt::{self, Standing};
use crate::memory::{self, Machine, Running, Task};
use crate::model;
use crate::model::decoder::Decoder;
use crate::model::load;
use crate::model::lora::Trainable;
use crate::model::residency::{Home, Ring};
use crate::ops::cpu;
use crate::plain;
use crate::plan::Plan;
use crate::publish::{self, Published};
use crate::ranks::{Alone, Collective, Place};
use crate::report::{Report, Stage};
use crate::run_folder::{self, Metrics, RunFolder};
use crate::source;
use crate::train::{self, Every, Passes, Trained};
use crate::words;

pub mod room;
pub mod estimate;
mod described;
mod notices;
mod preview;
mod receipt;
mod start;
mod together;
mod told;
mod written;

pub use described::{Described, check_small_files, describe, fits_vocabulary};
pub use preview::{Preview, preview};
pub use receipt::Receipt;
pub use start::start;

use described::MODEL_TEXTS;
use notices::{loaded, tell_memory, tell_what_is_trained, warn_of_idle_ranks, warn_of_length};
use room::Lengths;
use together::Together;
use written::{image_facts, write};

/// LIMIT: bytes of a file that identifies a run, the weights of an adapter to start from among them.
const TEXT_BYTES_MAX: u64 = 16 << 30;
/// LIMIT: tokens of an answer at the end of a run.
const ANSWER_TOKENS_MAX: usize = 256;

/// Runs the plan to its end. Rank 0 owns the folder and has the receipt; the others only train with it.
fn run(plan: &Plan, together: &Together, report: &Report) -> Result<Option<Receipt>> {
    let place = together.place();
    together.by_node(|| fetch::texts(&plan.base, plan.access(), report))?;
    let described = describe(plan)?; // a few kilobytes: refuse early
    for warning in adapter::serving::warnings(&described.facts, &described.options.lora) {
        report.warn(Stage::Plan, warning);
    }
    tell_what_is_trained(plan, &described, report);
    check_small_files(plan, &described)?;
    for to in plan.push.iter().filter(|_| place.leads()) {
        publish::check(to, &plan.output, &plan.registry)?; // checks what is possible without the network
    }
    let device = open_device(plan, place, report)?;
    memory::check_precision(described.options.precision, &Machine::of(&device, None))?;
    report.fact("plan", plan.json());
    report.fact("model", told::model(&described));
    report.fact("environment", told::environment(&device));
    let mut folder = place.leads().then(|| claim(plan, report)).transpose()?;
    // Data errors come before the long part.
    let data = together.by_node(|| fetch::data(&plan.data, plan.access(), report))?;
    interrupt::check()?;
    let mut parts = parts(plan, &described, &data)?;
    let fingerprint = fingerprint(&parts);
    parts.extend(together::of_process(plan, &device));
    together.agree(&parts)?;
    let begin = || begin(plan, folder.as_mut().expect("rank 0 claimed it"), &fingerprint, &data, report);
    let (begun, trained) = together.first(begin, |trained| json!({"trained": trained.is_some()}))?;
    let trained = match trained.flatten() {
        Some(trained) => Some(trained),
        None if begun["trained"] == true => None, // rank 0 has only to push
        None => make(plan, described, &device, &data, folder.as_mut(), together, report)?,
    };
    let (Some(mut folder), Some(trained)) = (folder, trained) else { return Ok(None) };
    let published = send(plan, &trained, &mut folder, report)?;
    report.fact("ended", true);
    Ok(Some(Receipt { folder: plan.output.clone(), trained, published }))
}

/// Opens the device of this process.
fn open_device(plan: &Plan, place: Place, report: &Report) -> Result<Device> {
    let wish = &plan.ranks;
    let choice = match place.world == 1 && wish.gpus.is_none() {
        true => plan.device,
        false => device::of_rank(plan.device, wish.gpus.as_ref(), place.local_rank)?,
    };
    device::open(choice, report)
}

fn claim(plan: &Plan, report: &Report) -> Result<RunFolder> {
    let folder = RunFolder::claim(&plan.output, plan.earlier)?;
    if folder.is_fresh() {
        report.fact("folder", folder_fact(&folder));
    }
    Ok(folder)
}

/// Ties the folder to this run. Returns the result of training if an earlier start finished it.
fn begin(
    plan: &Plan,
    folder: &mut RunFolder,
    fingerprint: &str,
    data: &[source::File],
    report: &Report,
) -> Result<Option<Trained>> {
    folder.belongs_to(fingerprint, data).map_err(|mut fault| {
        let difference = folder.difference(&plan.asked, data).filter(|_| fault.kind == Kind::Config);
        fault.message.extend(difference.map(|difference| format!(": {difference}")));
        fault
    })?;
    report.fact("folder", folder_fact(folder));
    report.fact("provenance", told::provenance(plan, data));
    folder.remember(&plan.asked)?;
    let trained = folder.trained();
    if trained.is_some() {
        report.note(Stage::Train, format!("already trained: {}", folder.path().display()));
    }
    Ok(trained)
}

/// Sends the adapter to every place. One that fails keeps none of the others from getting it; the first failure is the
/// result.
fn send(plan: &Plan, trained: &Trained, folder: &mut RunFolder, report: &Report) -> Result<Vec<Published>> {
    let (mut published, mut failed) = (Vec::new(), None);
    if plan.push.is_empty() {
        return Ok(published);
    }
    let _standing = interrupt::stands(Standing::Pushing);
    let (facts, message) = (image_facts(plan, trained), format!("End of training: {}", trained.adapter()));
    let options =
        publish::Options { registry: &plan.registry, source: &plan.source, facts: &facts, message: &message };
    for place in &plan.push {
        match publish::publish(folder.path(), place, &options, report) {
            Ok(sent) => {
                if sent.image {
                    report.fact("image", json!({"reference": sent.destination, "digest": sent.revision}));
                }
                published.push(sent);
                folder.published(&published)?;
            }
            Err(fault) if interrupt::requested() => return Err(fault),
            Err(fault) => {
                if plan.push.len() > 1 {
                    report.warn(Stage::Push, format!("{place}: {}", fault.clone().in_a_line()));
                }
                failed.get_or_insert(fault);
            }
        }
    }
    report.fact("published", serde_json::to_value(&published).expect("texts"));
    failed.map_or(Ok(published), Err)
}

fn folder_fact(folder: &RunFolder) -> Json {
    json!({"path": folder.path(), "fingerprint": folder.fingerprint()})
}

/// Trains an adapter from data and base, in the folder. The folder and the result are rank 0's.
fn make(
    plan: &Plan,
    described: Described,
    device: &Device,
    data: &[source::File],
    folder: Option<&mut RunFolder>,
    together: &Together,
    report: &Report,
) -> Result<Option<Trained>> {
    let started = together.first(|| Ok(folder.as_ref().expect("rank 0 claimed it").started()), seconds)?.0;
    let tokenizer = Tokenizer::open(&plan.model.folder)?.with_now(time(&started));
    fits_vocabulary(&tokenizer, &described.facts)?;
    let prepared = together.by_node(|| {
        dataset::prepare(data, &plan.dataset, &plan.tokens, &tokenizer, &plan.token_cache, report)
    })?;
    report.fact("data rows", told::rows(&prepared));
    let dataset::Prepared { train: training, evaluation, .. } = prepared;
    let asked = if folder.is_some() { to_answer(plan, data, report)? } else { Asked::default() };
    refuse_idle_schedule(plan, training.len())?;
    warn_of_length(&training, &described.facts, report);
    warn_of_idle_ranks(plan, together.place().world, report);
    interrupt::check()?;
    let task = room::task(plan, &described, Lengths::of(&training, &evaluation));
    let ranks = together.computing(device)?;
    let memory = Running::start(task, together.machine(device, plan.memory.limit)?)?;
    tell_memory(&memory, report);
    report.fact("memory plan", told::memory(&memory));
    // Gigabytes, fetched when everything else fits.
    together.by_node(|| fetch::weights(&plan.base, plan.access(), report))?;
    tell_renamed(&described, report);
    let (home, planned) = (memory.home(ranks.clone()), (memory.task.clone(), memory.machine.clone()));
    let decoder = load_alike(&home, described.facts, &described.options, device, together, report)?;
    let adapter = decoder.trainable(&described.options.lora)?;
    if let Some(initial) = &described.initial {
        initial.apply(&adapter)?;
    }
    report.note(Stage::Load, loaded(&decoder, &adapter));
    // From here on there is something to lose, until the adapter is whole.
    let standing = interrupt::stands(Standing::Stay);
    let sources = evaluation_sources(plan, &evaluation)?;
    let examples = train::Sets { train: (&training).into(), evaluation: scored(&sources) };
    let fitted = together.while_training(|| {
        fit(&*ranks, plan, &decoder, &adapter, examples, memory, folder.as_deref(), report)
    });
    if fitted.is_err() {
        standing.to_the_end(); // a signal's checkpoint is written; giving back the model's memory takes a while
    }
    let trained = fitted?;
    let Some(folder) = folder else { return Ok(None) };
    refuse_idle(&adapter, &trained, report)?;
    write(plan, &described.options, &decoder.facts, &adapter, data, &trained, folder)?;
    drop(adapter);
    if !asked.rows.is_empty() {
        let whole = || alone(plan, decoder, &described.options, planned, device, report);
        answer_if_asked(plan, whole, &tokenizer, &asked, folder, report);
    }
    finish(plan, &trained, folder)?;
    tell_trained(device, folder, &trained, report);
    Ok(Some(trained))
}

/// Loads the base. Several ranks compare the values that they read.
fn load_alike(
    home: &Home,
    facts: Facts,
    options: &model::Options,
    device: &Device,
    together: &Together,
    report: &Report,
) -> Result<Decoder> {
    if together.place().world == 1 {
        return load::load_at(home, facts, options, device, report);
    }
    let load = || {
        together.while_loading(|progressed| {
            let (decoder, fingerprint) =
                load::load_compared(home, facts, options, device, report, progressed)?;
            together.agree_on_weights(&fingerprint)?;
            Ok((decoder, fingerprint))
        })
    };
    let (decoder, fingerprint) = if home.is_shared() { together.apart(load) } else { load() }?;
    if home.is_shared() {
        let read = words::size(fingerprint.bytes);
        report.note(
            Stage::Load,
            format!("each rank read its share of the layers: rank 0 read {read} of weights"),
        );
    }
    Ok(decoder)
}

/// Reports the facts of a training that ended.
fn tell_trained(device: &Device, folder: &RunFolder, trained: &Trained, report: &Report) {
    report.fact("memory used", json!({"peak_bytes": device::memory_peak(device)}));
    report.fact("adapter_sha256", told::digest(&folder.path().join(adapter::WEIGHTS_FILE)));
    report.fact("evaluation", told::evaluation(trained));
    report.fact("trained", serde_json::to_value(trained).expect("numbers"));
}

/// Lets base and tuned model answer. The adapter is complete, so a failure here does not fail the run.
fn answer_if_asked(
    plan: &Plan,
    whole: impl FnOnce() -> Result<Decoder>,
    tokenizer: &Tokenizer,
    asked: &Asked,
    folder: &RunFolder,
    report: &Report,
) {
    let answered = whole().and_then(|decoder| answer(plan, decoder, tokenizer, asked, folder, report));
    let text = match answered {
        Ok(()) => return,
        Err(_) if interrupt::requested() => "a signal came: no answers".into(),
        Err(fault) => format!("no answers: {}", fault.in_a_line()),
    };
    report.warn(Stage::Evaluate, text);
}

/// Returns a decoder that needs no other rank. If the ranks shared the base, it is loaded again: on the device if it
/// fits there, or else in host memory.
fn alone(
    plan: &Plan,
    decoder: Decoder,
    options: &model::Options,
    planned: (Task, Machine),
    device: &Device,
    report: &Report,
) -> Result<Decoder> {
    if !decoder.ring.as_ref().is_some_and(Ring::is_shared) {
        return Ok(decoder);
    }
    let facts = decoder.facts.clone();
    // Its memory is the next one's.
    drop(decoder);
    let now = Machine::of(device, plan.memory.limit);
    let (task, planned) = planned;
    let machine = if device.is_cpu() { now } else { Machine { ranks: 1, host: now.host, ..planned } };
    let memory = Running::start(Task { residency: None, ..task }, machine)?;
    report.note(Stage::Load, "the ranks shared the base: rank 0 loads all of it for the answers");
    load::load_at(&memory.home(Arc::new(Alone)), facts, options, device, report)
}

fn tell_renamed(described: &Described, report: &Report) {
    for (written, module) in &described.sites.renamed {
        let what = format!("target {written} is part of {module} in this model: {module} is trained");
        report.note(Stage::Load, what);
    }
}

/// Returns a time as seconds since 1970. `time` is its inverse.
fn seconds(time: &SystemTime) -> Json {
    json!(time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

fn time(seconds: &Json) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.as_u64().unwrap_or(0))
}

#[allow(clippy::too_many_arguments)]
fn fit(
    ranks: &dyn Collective,
    plan: &Plan,
    decoder: &Decoder,
    adapter: &Trainable,
    examples: train::Sets,
    memory: Running,
    folder: Option<&RunFolder>,
    report: &Report,
) -> Result<Trained> {
    let checkpoints = folder.map(RunFolder::checkpoints).transpose()?;
    let mut metrics: Option<Metrics> = None;
    let mut log = |metric: &train::Metric| {
        let Some(folder) = folder else { return Ok(()) }; // rank 0 writes them
        if metrics.is_none() {
            // The first line has the step at which this start began. Later lines of an earlier start are dropped.
            metrics = Some(folder.metrics(metric)?);
        }
        metrics.as_mut().expect("just opened").log(metric)
    };
    let mut passes = Passes::planned(memory);
    let (options, checkpoints) = (&plan.train, checkpoints.as_ref());
    train::run_together(
        ranks,
        decoder,
        adapter,
        examples,
        options,
        &mut passes,
        checkpoints,
        report,
        &mut log,
    )
}

/// Returns the examples to evaluate on, by entry and name. A split may leave an entry without any.
fn evaluation_sources(plan: &Plan, evaluation: &Set) -> Result<Vec<(usize, String, Set)>> {
    let sources: Vec<(usize, String, Set)> = plan
        .sources
        .iter()
        .enumerate()
        .map(|(entry, name)| (entry, name.clone(), evaluation.of_entry(entry)))
        .filter(|(_, _, set)| !set.is_empty())
        .collect();
    let judged_by = plan.train.judging.as_ref().and_then(|judging| judging.source.as_ref());
    match judged_by.filter(|(entry, _)| sources.len() < 2 || sources.iter().all(|source| source.0 != *entry)) {
        None => Ok(sources),
        Some((_, name)) => Err(Fault::config(format!(
            "TrainingArguments.metric_for_best_model goes by the evaluation of {name}, but there is none beside others: \
             {} of {} entries have rows to evaluate on",
            sources.len(),
            plan.sources.len()
        ))
        .help("set more rows aside, or compare evaluations by eval_loss")),
    }
}

fn scored(sources: &[(usize, String, Set)]) -> Vec<train::Source<'_>> {
    sources
        .iter()
        .map(|(entry, name, set)| train::Source { entry: *entry, name: name.clone(), examples: set.into() })
        .collect()
}

/// The rows that base and tuned model answer at the end.
#[derive(Default)]
struct Asked {
    rows: Vec<dataset::Record>,
    held_out: bool,
}

/// The first rows of evaluation; those of training if there is none.
fn to_answer(plan: &Plan, data: &[source::File], report: &Report) -> Result<Asked> {
    if plan.answers == 0 {
        return Ok(Asked::default());
    }
    let dataset = dataset::read(data, &plan.dataset, &Report::silent())?;
    let held_out = !dataset.evaluation.is_empty();
    let rows = if held_out { dataset.evaluation } else { dataset.train };
    let rows: Vec<_> = rows.into_iter().take(plan.answers).collect();
    if !held_out {
        let count = rows.len();
        report.warn(
            Stage::Plan,
            format!(
                "no row is held out for evaluation: the answers will be to {count} rows that are trained on"
            ),
        );
    }
    Ok(Asked { rows, held_out })
}

/// Writes the answers of base and tuned model to rows, beside the adapter.
fn answer(
    plan: &Plan,
    decoder: Decoder,
    tokenizer: &Tokenizer,
    asked: &Asked,
    folder: &RunFolder,
    report: &Report,
) -> Result<()> {
    let options = answers::token_options(&plan.tokens);
    let encoded = dataset::encode_rows(&asked.rows, tokenizer, &options, &Report::silent())?;
    let mut questions = answers::of_rows(&encoded, &asked.rows, tokenizer, None);
    questions
        .iter_mut()
        .for_each(|question| question.tokens_max = question.tokens_max.min(ANSWER_TOKENS_MAX));
    let chat = Chat::of(tokenizer, plan.tokens.chat_template.as_deref())?;
    let defaults = Defaults::read(&plan.model.folder, tokenizer, chat.as_ref())?;
    let how = answers::How { sampling: Sampling::greedy(), stop_tokens: defaults.stop_tokens };
    let engine = answers::engine(decoder, &[folder.path()], &questions, report)?;
    let pairs = answers::ask(&engine, questions, &[1.0], &how, tokenizer, report)?;
    let text = serde_json::to_vec_pretty(&answers::json(&pairs, asked.held_out)).expect("texts and numbers");
    folder.write(run_folder::ANSWERS, &text)?;
    let place = folder.path().join(run_folder::ANSWERS);
    report.note(
        Stage::Evaluate,
        format!("{} answers of base and tuned model: {}", pairs.len(), place.display()),
    );
    Ok(())
}

/// Ends the folder; the sentinel last.
fn finish(plan: &Plan, trained: &Trained, folder: &mut RunFolder) -> Result<()> {
    folder.finish(trained)?;
    match plan.train.checkpoint {
        // The adapter is complete, so a failure to remove the checkpoints does not fail the run.
        Every::Never => folder.remove_checkpoints().or(Ok(())),
        _ => Ok(()),
    }
}

/// Refuses an adapter whose B matrices are all zero: it changes nothing, however long it was trained.
fn refuse_idle(adapter: &Trainable, trained: &Trained, report: &Report) -> Result<()> {
    let params = adapter.params.to_device(&Device::Cpu)?;
    let mut idle = Vec::new();
    for site in &adapter.sites {
        let (_, b) = adapter.views(&params, site)?;
        if cpu::to_f64(&b)?.iter().all(|value| *value == 0.0) {
            idle.push(site.path.as_str());
        }
    }
    if idle.len() == adapter.sites.len() {
        let message =
            format!("the adapter learned nothing: its B matrices are all zero after {} steps", trained.steps);
        return Err(Fault::new(Kind::Diverged, message)
            .help("raise learning_rate or the number of steps, and lower warmup_steps"));
    }
    if let Some(first) = idle.first() {
        report.warn(
            Stage::Train,
            format!("{} linear layers learned nothing: their B is zero ({first} ...)", idle.len()),
        );
    }
    Ok(())
}

/// Refuses a run whose learning rate is zero in every step, since it cannot learn.
fn refuse_idle_schedule(plan: &Plan, examples: usize) -> Result<()> {
    let options = &plan.train;
    let total = train::order::Steps::new(examples, options).total;
    let warmup = options.warmup.steps(total);
    let idle = (0..total).all(|step| options.schedule.factor(step, total, warmup) == 0.0);
    match idle {
        false => Ok(()),
        true => Err(Fault::config(format!(
            "the learning rate is zero in every one of {total} steps (warm-up takes {warmup}): nothing would be learned"
        ))
        .help("train more steps (num_train_epochs, max_steps), or lower warmup_steps and warmup_ratio")),
    }
}

/// Identifies a run by everything that would change its result.
fn fingerprint(parts: &[(String, String)]) -> String {
    let texts: Vec<&str> = parts.iter().map(|(_, text)| text.as_str()).collect();
    source::digest(texts.join("\n").as_bytes())
}

/// Returns everything that would change a run's result, by name.
fn parts(plan: &Plan, described: &Described, data: &[source::File]) -> Result<Vec<(String, String)>> {
    let part = |name: &str, text: String| (name.to_owned(), text);
    let options = (&described.options.lora, &plan.train, &plan.dataset, &plan.tokens);
    let model = (&described.facts, &described.options.quantization, &described.options.precision);
    let mut parts = vec![part("model", format!("{model:?}")), part("options", format!("{options:?}"))];
    parts.extend(data.iter().map(|file| part(&file.name, file.sha256.clone())));
    let files = MODEL_TEXTS.iter().map(|name| plan.model.folder.join(name));
    let initial = plan.init_adapter.iter().map(|folder| folder.join(adapter::WEIGHTS_FILE));
    for file in files.chain(initial) {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        parts.push(part(&name, source::digest(&read_or_nothing(&file)?)));
    }
    match fetch::revision(&plan.model.folder)? {
        Some(revision) => parts.push(part("revision", revision)), // its weights may not be there yet
        None => parts.extend(weight_files(&plan.model.folder)?.into_iter().map(|file| part("weights", file))),
    }
    Ok(parts)
}

/// Returns the names, sizes and link targets of the weights. Hashing gigabytes at every start would take too long. A
/// hub's cache links to files that are named by their hash, so the target distinguishes files of the same size.
fn weight_files(folder: &Path) -> Result<Vec<String>> {
    let unread = |error: std::io::Error| {
        Fault::unread(Kind::Model, format!("cannot read {}: {error}", folder.display()), &error)
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unread)? {
        let path = entry.map_err(unread)?.path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = std::fs::metadata(&path).map_err(unread)?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = match std::fs::read_link(&path) {
            Ok(target) => target,
            // It is no link.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => PathBuf::new(),
            Err(error) => return Err(unread(error)),
        };
        files.push(format!("{name} {bytes} {}", target.file_name().unwrap_or_default().to_string_lossy()));
    }
    files.sort();
    Ok(files)
}

/// Returns the content of a file; nothing if there is none. A file that cannot be read is a fault, since it would give
/// the run another identity.
fn read_or_nothing(file: &Path) -> Result<Vec<u8>> {
    match plain::read(file, TEXT_BYTES_MAX) {
        Ok(content) => Ok(content),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => {
            Err(Fault::unread(Kind::Model, format!("cannot read {}: {error}", file.display()), &error))
        }
    }
}
