//! A command -> its work and its output.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use crate::cli::{AboutModel, Command, Format, ObjectFormat, RegistryArguments, reference};
use crate::facts::{LoraOptions, Targets, presets};
use crate::fault::{Fault, Result};
use crate::interrupt::Standing;
use crate::job::Receipt;
use crate::plan::Plan;
use crate::publish::{self, Destination};
use crate::ranks::launch::Crew;
use crate::ranks::place;
use crate::registry::{ImageFacts, Target};
use crate::report::{self, Report, Stage};
use crate::spec::{self, Request, keys};
use crate::workspace::{files, tune, yaml};
use crate::{
    adapter, bench, controller, evaluate, example, fetch, inspect, interrupt, job, merge, plan, registry,
    review, run_report, serving, source, trial, whole,
};

/// Prints a line of a command's result.
macro_rules! say {
    ($($text:tt)*) => { printed(&format!("{}\n", format_args!($($text)*)))? };
}

/// Prints a text whole. A reader that went away is no reason to fail; a full disk is, since a file would hold a part.
fn printed(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Fault::storage("write to", Path::new("standard output"), &error))
        }
        _ => Ok(()),
    }
}

/// Runs a command. The receipt is that of a job, if the command ran one.
///
/// # Errors
/// The reason why the command does not reach its end.
pub fn run(command: &Command, report: &Report) -> Result<Option<Receipt>> {
    interrupt::listen()?;
    let _standing = interrupt::stands(standing(command));
    match command {
        Command::Run(request) => return train(request, report),
        Command::Example { folder, write_only } => return try_example(folder, *write_only, report),
        Command::Serve { request, options } => serving::run(&served(request)?, options, report)?,
        Command::Plan { request, format, gpus, prices } => show(&resolve(request)?, *format, gpus, prices)?,
        Command::PlanServing { request, size, adapters, format, gpus } => {
            let plan = served(request)?;
            let preview = serving::preview(&plan, size, adapters, gpus)?;
            tell(*format, || preview.text(), || preview.json())?;
        }
        Command::Inspect { request, options, format, html } => {
            html.as_deref().map(whole::may_be_written).transpose()?;
            let review = review::read(&resolve(request)?, options, report)?;
            tell(*format, || review.text(report::has_colours(&std::io::stdout())), || review.json())?;
            html.as_deref().map(|file| review.save(file)).transpose()?;
        }
        Command::Model { about, format } => model(about, *format, report)?,
        Command::Eval { request, options, format } => {
            let evaluation = evaluate::run(request, options, &environment, report)?;
            tell(*format, || evaluation.text(), || evaluation.json())?;
        }
        Command::Try { request, options, format } => {
            let trial = trial::run(request, options, &environment, report)?;
            tell(*format, || trial.text(columns()), || trial.json())?;
        }
        Command::Merge { request, options } => {
            say!("{}", merge::run(request, options, &environment, report)?.text().trim_end());
        }
        Command::Report { folders, to } => {
            say!("{}", run_report::make(folders, to.as_deref())?.display());
        }
        other => return plain(other, report).map(|()| None),
    }
    Ok(None)
}

/// Runs a command that has no keys of a job.
fn plain(command: &Command, report: &Report) -> Result<()> {
    match command {
        Command::Push { folder, image, registry } => push(folder, image, registry, report)?,
        Command::Pull { image, folder, registry } => pull(image, folder, registry, report)?,
        Command::Bench { options, json } => measure(options, json.as_deref(), report)?,
        Command::Render { files, settings, format } => {
            let applied = files::apply(files, settings)?;
            applied.warnings.iter().for_each(|warning| report.warn(Stage::Plan, warning.as_str()));
            match format {
                ObjectFormat::Yaml => say!("{}", applied.yaml().trim_end()),
                ObjectFormat::Json => say!("{}", pretty(&applied.json())),
            }
        }
        Command::Controller(options) => controller::run(options, report)?,
        Command::Tune(options) => {
            let workspace = tune::workspace(options)?;
            say!("{}", yaml::write(&[json!(workspace)]).trim_end());
        }
        Command::Keys { word } => say!("{}", keys::reference(word)?.trim_end()),
        Command::Completions { shell } => say!("{}", reference::completions(*shell).trim_end()),
        Command::Man { folder } => say!("{} pages in {}", reference::man(folder)?, folder.display()),
        other => unreachable!("{other:?} has keys of a job"),
    }
    Ok(())
}

/// Returns the state in which a signal finds the command.
fn standing(command: &Command) -> Standing {
    match command {
        Command::Run(_) | Command::Example { .. } => Standing::BeforeTraining,
        Command::Push { .. } => Standing::Pushing,
        Command::Controller(_) | Command::Serve { .. } => Standing::Stay,
        _ => Standing::Looking,
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn resolve(request: &Request) -> Result<Plan> {
    plan::make(&spec::gather(request, &environment)?)
}

fn served(request: &Request) -> Result<plan::Serving> {
    plan::serving(&spec::gather(request, &environment)?)
}

/// Runs the job. A rank that is not the first has no receipt.
fn train(request: &Request, report: &Report) -> Result<Option<Receipt>> {
    let plan = resolve(request)?;
    // Ranks that are not available are refused here. The others were started by the program itself.
    Crew::of(&place::find(&environment)?, &plan.ranks)?;
    let receipt = job::start(&plan, &environment, report)?;
    if let Some(receipt) = &receipt {
        // The results are in their places, so the job has succeeded even if this message cannot be written.
        let _ = printed(&format!("{}\n", receipt.text()));
    }
    Ok(receipt)
}

/// Returns the ranks that this process has to start for a job; `None` if it runs the command itself. Faults of the job
/// are ignored here: they are found again, and reported, when the command runs.
pub fn crew(command: &Command) -> Option<Crew> {
    let Command::Run(request) = command else { return None };
    let found = place::find(&environment).ok()?;
    Crew::of(&found, &resolve(request).ok()?.ranks).ok()?
}

fn try_example(folder: &Path, write_only: bool, report: &Report) -> Result<Option<Receipt>> {
    let file = example::write(folder)?;
    say!(
        "Wrote a tiny model, a dataset and {}.\nTo run it by hand: hone run {}",
        file.display(),
        file.display()
    );
    match write_only {
        true => Ok(None),
        false => train(&Request { spec: Some(file), ..Request::default() }, report),
    }
}

fn show(plan: &Plan, format: Format, gpus: &[String], prices: &[String]) -> Result<()> {
    let preview = job::preview(plan, gpus, prices)?;
    match format {
        Format::Text => {
            for paragraph in preview.paragraphs() {
                say!("{}", paragraph?.trim_end());
            }
        }
        Format::Json => say!("{}", pretty(&preview.json()?)),
    }
    Ok(())
}

fn model(about: &AboutModel, format: Format, report: &Report) -> Result<()> {
    if let Some(name) = &about.preset {
        let preset = presets::find(name)?;
        return tell(format, || inspect::table(&preset.rows()), || json!(preset));
    }
    let folder = about.folder.as_ref().expect("clap asks for one of them");
    let targets = Targets::written(&about.target_modules);
    let lora = LoraOptions { r: about.rank as usize, targets, ..LoraOptions::default() };
    let inspection = inspect::read(&fetched(folder, false, report)?, &lora)?;
    tell(format, || inspection.table(), || inspection.json())
}

fn measure(options: &bench::Options, json: Option<&Path>, report: &Report) -> Result<()> {
    json.map(whole::may_be_written).transpose()?;
    let mut options = options.clone();
    if let bench::Base::Folder(address) = &options.base {
        options.base = bench::Base::Folder(fetched(address, true, report)?);
    }
    let outcome = bench::run(&options, report)?;
    say!("{}", outcome.table().trim_end());
    json.map_or(Ok(()), |file| outcome.save(file))
}

/// Returns the folder of a model that may be given as an address. The model is fetched with or without its weights.
fn fetched(address: &Path, weights: bool, report: &Report) -> Result<PathBuf> {
    let address = fetch::Model::parse(&address.to_string_lossy())?;
    if let fetch::Model::Folder(folder) = address {
        return Ok(folder);
    }
    let (source, registry) = plan::reach(&environment)?;
    let access = fetch::Access { source: &source, registry: &registry };
    match weights {
        true => fetch::weights(&address, access, report),
        false => fetch::texts(&address, access, report),
    }
}

fn push(folder: &Path, image: &str, arguments: &RegistryArguments, report: &Report) -> Result<()> {
    let facts = ImageFacts { model_name: adapter::base_model(folder), ..ImageFacts::default() };
    let place = Destination::parse(&spec::home::place(image, &environment)?)?;
    let (reached, _) = plan::reach(&environment)?;
    let (registry, source) =
        (access(arguments), source::Options { ca_file: arguments.ca_file.clone(), ..reached });
    let message = "Upload of a LoRA adapter";
    let options = publish::Options { registry: &registry, source: &source, facts: &facts, message };
    publish::check(&place, folder, &registry)?;
    let sent = publish::publish(folder, &place, &options, report)?;
    say!("{}", sent.destination);
    if let Some(revision) = sent.revision {
        say!("{revision}");
    }
    Ok(())
}

fn pull(image: &str, folder: &Path, arguments: &RegistryArguments, report: &Report) -> Result<()> {
    let pulled = registry::pull(
        &Target::parse(&spec::home::place(image, &environment)?)?,
        folder,
        &access(arguments),
        report,
    )?;
    say!("{}\n{}\n{}", pulled.reference, pulled.digest, folder.display());
    Ok(())
}

fn access(arguments: &RegistryArguments) -> registry::Options {
    let arguments = arguments.clone();
    plan::registry_access(arguments.docker_config, arguments.ca_file, arguments.plain_http)
}

fn tell(format: Format, text: impl Fn() -> String, json: impl Fn() -> Json) -> Result<()> {
    match format {
        Format::Text => say!("{}", text().trim_end()),
        Format::Json => say!("{}", pretty(&json())),
    }
    Ok(())
}

fn pretty(json: &Json) -> String {
    serde_json::to_string_pretty(json).expect("texts and numbers")
}

/// Characters of a line, if a terminal shows what is printed.
fn columns() -> Option<usize> {
    let (width, _) = terminal_size::terminal_size_of(std::io::stdout())?;
    Some(usize::from(width.0))
}
