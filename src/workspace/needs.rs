//! A Job's plan and its GPU -> the requests for a node (GPUs, memory, disk), or a refusal if the GPU cannot hold it.

use super::annotations::Options;
use super::request::Run;
use super::{Settings, Workspace, several};
use crate::dataset::TokenCache;
use crate::facts::Facts;
use crate::facts::sites;
use crate::facts::{Keep, shapes};
use crate::fault::Result;
use crate::memory::card::{self, Card};
use crate::memory::{self, Machine, Place, Task};

const GIB: f64 = (1u64 << 30) as f64;
/// CPUs of the process.
const CPUS: u32 = 2;
/// Host memory of the process: the program, the driver, and the rows that are being encoded.
const HOST_BYTES: f64 = 4.0 * GIB;
/// Disk for data whose size is not known before the download.
const DATA_BYTES: f64 = 5.0 * GIB;
/// Disk for the token cache: compressed text becomes about twice its size in tokens.
const TOKEN_BYTES: f64 = 2.0 * DATA_BYTES;
/// A checkpoint holds the adapter and the optimizer's two moments; one is written before the older is removed.
const ADAPTER_COPIES: f64 = 1.0 + 2.0 * 3.0;
/// Disk for a model without a known shape: 7 billion parameters in bf16 and as much again.
const UNKNOWN_WEIGHTS_BYTES: f64 = 30.0 * GIB;
/// The shortest pass worth a check: an example is rarely shorter.
const TOKENS_MIN: usize = 256;

/// The number of GPUs and their card.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gpus {
    /// GPUs of the pod; 0 trains on the CPU.
    pub count: u32,
    /// The card, if the instance type names one.
    pub card: Option<Card>,
}

/// Requests of the container, as Kubernetes writes quantities.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Needs {
    /// Requested CPUs.
    pub cpu: String,
    /// Requested memory.
    pub memory: String,
    /// Requested disk of the node.
    pub ephemeral_storage: String,
    /// Doubts about what was requested.
    pub warnings: Vec<String>,
}

/// Returns the number that was asked for, else the instance type's, else one.
pub(super) fn gpus(workspace: &Workspace, options: &Options, settings: &Settings) -> Gpus {
    let instance = &workspace.resource.instance_type;
    let known = card::find(instance).ok();
    let asked = options.gpus.or(settings.gpus);
    let count = asked.or(known.map(|(_, count)| count as u32)).unwrap_or(1);
    Gpus { count, card: known.map(|(card, _)| card).filter(|_| count > 0) }
}

/// Returns requests for a training, from its memory plan and the sizes of model and data.
///
/// # Errors
/// Capacity: no plan fits into the card's memory. Config: modules that match nothing.
pub(super) fn needs(workspace: &Workspace, run: &Run, gpus: Gpus, options: &Options) -> Result<Needs> {
    let mut warnings = doubts(workspace, gpus);
    let shape = run.preset.filter(|_| options.model.is_none()).and_then(|preset| preset.shape.as_deref());
    let known = shape.map(|shape| task(run, shapes::facts(shape)?)).transpose()?;
    let mut locked = 0;
    if let (Some(task), Some(card)) = (&known, gpus.card) {
        let (plan, warning) = fits(task, &card, gpus, workspace, run)?;
        // A pod has the weights of its own ranks.
        locked = plan.map_or(0, |plan| plan.host_bytes * u64::from(gpus.count.max(1)));
        warnings.extend(warning);
    }
    // One process for each GPU.
    let ranks = gpus.count.max(1);
    let text = |asked: &Option<String>, planned: String| asked.clone().unwrap_or(planned);
    Ok(Needs {
        cpu: text(&options.cpu, (CPUS * ranks).to_string()),
        memory: text(
            &options.memory,
            gibibytes(locked as f64 + f64::from(ranks) * host_bytes(known.as_ref(), gpus.count > 0)),
        ),
        ephemeral_storage: text(
            &options.ephemeral_storage,
            gibibytes(disk_bytes(known.as_ref(), run, options)),
        ),
        warnings,
    })
}

/// Doubts about the instance type's GPUs, and fields of KAITO that have no effect here.
pub(super) fn doubts(workspace: &Workspace, gpus: Gpus) -> Vec<String> {
    let mut warnings = gpu_warnings(workspace, gpus);
    if !workspace.resource.preferred_nodes.is_empty() {
        warnings.push(
            "resource.preferredNodes has no effect: pods run on nodes with the labels of resource.labelSelector".into(),
        );
    }
    let tuning = workspace.tuning.as_ref().and_then(|tuning| tuning.preset.as_ref());
    let inference = workspace.inference.as_ref().and_then(|inference| inference.preset.as_ref());
    for (place, preset) in [("tuning", tuning), ("inference", inference)] {
        let private = preset.filter(|preset| preset.access_mode.as_deref() == Some("private"));
        let image = private.and_then(|preset| preset.preset_options.as_ref()).map(|options| &options.image);
        if private.is_some() && image.is_none_or(String::is_empty) {
            warnings.push(format!(
                "{place}.preset.accessMode private has no effect without presetOptions.image: the weights are the \
                 catalogue's"
            ));
        }
    }
    warnings
}

fn gpu_warnings(workspace: &Workspace, gpus: Gpus) -> Vec<String> {
    let mut warnings = Vec::new();
    let instance = &workspace.resource.instance_type;
    if let Some(card) = gpus.card.filter(|card| card.matrix.is_none()) {
        warnings.push(format!(
            "resource.instanceType {instance} has {} GPUs, which cannot compute in bf16: hone would end with exit code 10. Take \
             an instance with an A10, A100, H100 or newer, such as Standard_NC24ads_A100_v4",
            card.name
        ));
    }
    if gpus.card.is_none() && gpus.count > 0 && !instance.is_empty() {
        warnings.push(format!(
            "resource.instanceType {instance} is not in the table of GPUs: its memory is not checked"
        ));
    }
    warnings
}

/// Returns the task of training a model of these facts, for a memory plan.
fn task(run: &Run, facts: Facts) -> Result<Task> {
    let (plan, options) = (&run.plan, &run.plan.model);
    let sites = sites::sites(&facts, &options.lora)?;
    let tokens_max = plan.tokens.tokens_max.min(facts.positions_max);
    Ok(Task {
        sites: sites.list,
        tokens: sites.tokens,
        quantization: options.quantization,
        precision: options.precision,
        dropout: options.lora.dropout > 0.0,
        bf16_checkpoint: true,
        tokens_min: TOKENS_MIN.min(tokens_max),
        tokens_max,
        example_tokens: tokens_max,
        eight_bit_moments: plan.train.eight_bit_moments,
        keep: plan.memory.keep,
        residency: plan.memory.residency,
        facts,
    })
}

/// Refuses a task if not even short examples fit, and warns if those of the most tokens do not. Returns the memory plan
/// that takes the most host memory.
fn fits(
    task: &Task,
    card: &Card,
    gpus: Gpus,
    workspace: &Workspace,
    run: &Run,
) -> Result<(Option<memory::Plan>, Option<String>)> {
    let Ok(machine) = card.machine(run.plan.memory.limit) else { return Ok((None, None)) };
    let instance = &workspace.resource.instance_type;
    let host = card::host_bytes(instance);
    let machine = Machine { ranks: gpus.count.max(1) as usize, host, ..machine };
    let machine = machine.times(several::nodes(workspace) as usize);
    let short = memory::solve(task, &machine)
        .map_err(|fault| fault.at(format!("resource.instanceType {instance}")))?;
    let longest = Task { tokens_min: task.tokens_max, ..task.clone() };
    match memory::solve(&longest, &machine) {
        Ok(plan) => Ok((Some(plan), None)),
        Err(fault) => {
            let tokens = task.tokens_max;
            let warning = format!("examples of {tokens} tokens do not fit on {instance}: {}", fault.message);
            Ok((Some(short), Some(warning)))
        }
    }
}

/// Returns the content of the host's memory that the container needs: on a CPU the whole training, on a GPU the weights
/// while they pass through.
fn host_bytes(task: Option<&Task>, on_gpu: bool) -> f64 {
    let Some(task) = task else { return 2.0 * HOST_BYTES };
    match on_gpu {
        true => HOST_BYTES + 3.0 * 4.0 * (task.facts.vocab * task.facts.width) as f64,
        false => {
            let place = Place::Cpu { threads: 2 };
            let rates = card::cpu_rates(2);
            let machine = Machine {
                name: "CPU".into(),
                place,
                memory: u64::MAX,
                taken: 0,
                capability: None,
                rates,
                ranks: 1,
                host: None,
            };
            HOST_BYTES + memory::needed(task, &machine, task.tokens_max, Keep::LayerInputs) as f64
        }
    }
}

/// Returns the content of the node's disk: weights, data and tokens unless a claim keeps them, checkpoints and the
/// adapter likewise.
fn disk_bytes(task: Option<&Task>, run: &Run, options: &Options) -> f64 {
    let weights = task.map_or(UNKNOWN_WEIGHTS_BYTES, |task| 2.0 * 1.05 * task.facts.parameters() as f64);
    let adapter = task.map_or(0.0, |task| 4.0 * task.parameters() as f64);
    let tokens = if run.plan.token_cache == TokenCache::Off { 0.0 } else { TOKEN_BYTES };
    let downloads = if options.cache_claim.is_some() { 0.0 } else { weights + DATA_BYTES + tokens };
    let results = match (&options.work_claim, run.plan.push.is_empty()) {
        (None, false) => ADAPTER_COPIES * adapter,
        _ => 0.0,
    };
    GIB + downloads + results
}

fn gibibytes(bytes: f64) -> String {
    format!("{}Gi", (bytes / GIB).ceil() as u64)
}
