//! The program: arguments -> one command is run -> an exit code that says who must act.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use hone::cli::{self, AboutModel, Command, Format, Log, ObjectFormat, RegistryArguments};
use hone::endpoint::Server;
use hone::facts::{LoraOptions, Targets, presets};
use hone::fault::{Fault, Result};
use hone::interrupt::Standing;
use hone::job::{self, Receipt};
use hone::kaito::{self, sidecars, sidecars::Limits, watch};
use hone::memory::{self, Machine};
use hone::metrics::{self, Latest};
use hone::plan::{self, Plan};
use hone::publish::{self, Destination};
use hone::registry::{self, ImageFacts, Target};
use hone::report::{self, Report, Stage, termination};
use hone::spec::{self, Origin, Request, Setting, Written};
use hone::trackers::{End, Trackers};
use hone::workspace::{Settings, files, tune, yaml};
use hone::{
    bench, controller, evaluate, example, fetch, inspect, interrupt, last_word, merge, review, run_report,
    serving, trial,
};
use std::io::IsTerminal;

/// Prints a line. A reader that went away is no reason to fail.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

fn main() -> ExitCode {
    hone::machine::keep_freed_memory();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match kaito::call(&arguments, &environment) {
        None => start(arguments, Vec::new(), false),
        Some(Ok(kaito::Call::MetricsServer)) => {
            say!("the job itself serves its metrics, on the same port");
            ExitCode::SUCCESS
        }
        Some(Ok(kaito::Call::Probe)) => ExitCode::from(u8::from(!kaito::is_healthy())),
        Some(Ok(kaito::Call::Serve { arguments, warnings })) => start(arguments, warnings, false),
        Some(Ok(kaito::Call::Train { arguments, warnings })) if watch::is_job(&environment) => {
            start(arguments, warnings, true)
        }
        Some(Ok(kaito::Call::Train { .. })) => {
            let report = Report::new(report::choose(None, false));
            watch::watch(limits(), &report).map_or_else(|fault| refuse(&fault, &report), ExitCode::from)
        }
        Some(Err(fault)) => refuse(&fault, &Report::new(report::choose(None, false))),
    }
}

/// Ends the program with a fault before the job began, in a pod of KAITO's.
fn refuse(fault: &Fault, report: &Report) -> ExitCode {
    report.fault(fault);
    leave_word(fault);
    release(report);
    ExitCode::from(fault.kind.exit_code())
}

/// Runs a command line of hone with warnings to report. `pod` is set for a job in a pod of KAITO's.
fn start(arguments: Vec<OsString>, warnings: Vec<String>, pod: bool) -> ExitCode {
    let invocation = match cli::parse(arguments) {
        Ok(invocation) => invocation,
        Err(error) => {
            if error.use_stderr() {
                leave_word(&Fault::usage(cli::shown(&error)).help("`hone --help` shows commands and flags"));
            }
            if pod {
                release(&Report::new(report::choose(None, false)));
            }
            cli::exit(&error)
        }
    };
    // The log of a job is JSON lines. The other commands are run by people, who want plain text even through a pipe.
    let job = matches!(invocation.command, Command::Run(_) | Command::Controller(_) | Command::Serve { .. });
    let bars = match invocation.log {
        Log::Auto if job => None,
        Log::Auto => Some(true),
        Log::Terminal => Some(true),
        Log::Json => Some(false),
    };
    let message = termination::path();
    last_word::prepare(message.as_deref(), report::is_json(bars), pod);
    if let (Command::Run(_) | Command::Example { .. }, Some(path)) = (&invocation.command, &message) {
        termination::write_ahead(path);
    }
    let shown = report::choose(bars, invocation.quiet);
    let is_run = matches!(invocation.command, Command::Run(_) | Command::Example { .. });
    let shown = if is_run { Arc::new(run_report::Recorder::new(shown)) } else { shown };
    let latest = Arc::new(Latest::new(shown));
    let report = Report::new(latest.clone());
    let _server = invocation.metrics.and_then(|address| serve(address, latest.clone(), &report));
    let mistaken = Some(()).filter(|()| pod).and_then(|()| Limits::read(&environment).err());
    for warning in warnings.iter().chain(mistaken.as_ref().map(|fault| &fault.message)) {
        report.warn(Stage::Plan, warning.as_str());
    }
    // A defect ends with its own exit code and message, like any other fault.
    let ended =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| command(&invocation.command, &report)));
    let ended = ended.unwrap_or_else(|_| Err(Fault::internal("hone failed: see the panic message above")));
    let ended = if pod { leave(ended, &report) } else { ended };
    let (outcome, fault) = match ended {
        Ok(receipt) => (receipt.map(outcome).unwrap_or_default(), None),
        Err(fault) => (failed(&fault, &latest), Some(fault)),
    };
    if let Some(path) = message {
        termination::write(&path, &outcome);
    }
    match fault {
        None => ExitCode::SUCCESS,
        Some(fault) => {
            report.fault(&fault);
            ExitCode::from(fault.kind.exit_code())
        }
    }
}

/// Writes Kubernetes' termination message if the program ends before any command runs.
fn leave_word(fault: &Fault) {
    if let Some(path) = termination::path() {
        let outcome = termination::Outcome { fault: Some(fault.clone()), ..Default::default() };
        termination::write(&path, &outcome);
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Serves metrics. If that fails, the run continues without them.
fn serve(address: SocketAddr, latest: Arc<Latest>, report: &Report) -> Option<Server> {
    match metrics::serve(address, latest) {
        Ok(server) => {
            report.note(Stage::Plan, format!("metrics: http://{}/metrics", server.address()));
            Some(server)
        }
        Err(fault) => {
            report.warn(Stage::Plan, format!("no metrics: {}", fault.message));
            None
        }
    }
}

/// Ends KAITO's other containers, which wait for the job.
fn leave<T>(ended: Result<T>, report: &Report) -> Result<T> {
    match ended {
        Ok(done) => sidecars::pushed(limits(), report).map(|()| done),
        Err(fault) => {
            release(report);
            Err(fault)
        }
    }
}

fn release(report: &Report) {
    sidecars::end(limits(), report);
}

/// The time limits. A limit that cannot be read takes its default, because the job has ended by now and its pod must
/// end too.
fn limits() -> Limits {
    Limits::read(&environment).or_else(|_| Limits::read(&|_| None)).expect("defaults are numbers")
}

fn command(command: &Command, report: &Report) -> Result<Option<Receipt>> {
    interrupt::listen()?;
    let _standing = interrupt::stands(match command {
        Command::Run(_) | Command::Example { .. } => Standing::BeforeTraining,
        Command::Push { .. } => Standing::Pushing,
        Command::Controller(_) | Command::Serve { .. } => Standing::Stay,
        _ => Standing::Looking,
    });
    match command {
        Command::Run(request) => run(request, report).map(Some),
        Command::Serve { request, options } => {
            let plan = plan::serving(&spec::gather(request, &environment)?)?;
            serving::run(&plan, options, report).map(|()| None)
        }
        Command::Model { about, format } => model(about, *format, report).map(|()| None),
        Command::Plan { request, format, gpus, prices } => {
            show(&resolve(request)?, *format, gpus, prices).map(|()| None)
        }
        Command::PlanServing { request, size, adapters, format, gpus } => {
            show_serving(request, size, adapters, *format, gpus).map(|()| None)
        }
        Command::Inspect { request, options, format, html } => {
            look(&resolve(request)?, options, *format, html.as_deref(), report).map(|()| None)
        }
        Command::Report { folders, to } => {
            say!("{}", run_report::make(folders, to.as_deref())?.display());
            Ok(None)
        }
        Command::Eval { .. } | Command::Try { .. } | Command::Merge { .. } => {
            after(command, report).map(|()| None)
        }
        Command::Push { folder, image, registry } => push(folder, image, registry, report).map(|()| None),
        Command::Pull { image, folder, registry } => pull(image, folder, registry, report).map(|()| None),
        Command::Bench { options, json } => measure(options, json.as_deref(), report).map(|()| None),
        Command::Render { files, settings, format } => {
            render(files, settings, *format, report).map(|()| None)
        }
        Command::Controller(options) => controller::run(options, report).map(|()| None),
        Command::Tune(options) => {
            let workspace = tune::workspace(options)?;
            say!("{}", yaml::write(&[serde_json::json!(workspace)]).trim_end());
            Ok(None)
        }
        Command::Keys { word } => {
            say!("{}", cli::found_keys(word)?.trim_end());
            Ok(None)
        }
        Command::Completions { shell } => {
            cli::reference::completions(*shell, &mut std::io::stdout());
            Ok(None)
        }
        Command::Man { folder } => {
            let pages = cli::reference::man(folder)?;
            say!("{pages} pages in {}", folder.display());
            Ok(None)
        }
        Command::Example { folder, write_only } => try_example(folder, *write_only, report),
    }
}

/// The commands that look at a finished adapter.
fn after(command: &Command, report: &Report) -> Result<()> {
    match command {
        Command::Eval { request, options, format } => {
            let evaluation = evaluate::run(request, options, &environment, report)?;
            tell(*format, || evaluation.text(), || evaluation.json());
        }
        Command::Try { request, options, format } => {
            let trial = trial::run(request, options, &environment, report)?;
            tell(*format, || trial.text(columns()), || trial.json());
        }
        Command::Merge { request, options } => {
            say!("{}", merge::run(request, options, &environment, report)?.text().trim_end());
        }
        other => return Err(Fault::internal(format!("{other:?} looks at no adapter"))),
    }
    Ok(())
}

fn tell(format: Format, text: impl Fn() -> String, json: impl Fn() -> serde_json::Value) {
    match format {
        Format::Text => say!("{}", text().trim_end()),
        Format::Json => say!("{}", serde_json::to_string_pretty(&json()).expect("texts and numbers")),
    }
}

/// Characters of a line, if a terminal shows what is printed.
fn columns() -> Option<usize> {
    let (width, _) = terminal_size::terminal_size_of(std::io::stdout())?;
    Some(usize::from(width.0))
}

fn resolve(request: &Request) -> Result<Plan> {
    plan::make(&spec::gather(request, &environment)?)
}

fn run(request: &Request, report: &Report) -> Result<Receipt> {
    let plan = resolve(request)?;
    for ignored in &plan.ignored {
        report.note(Stage::Plan, format!("{} has no effect: {}", ignored.name, ignored.why));
    }
    for warning in &plan.warnings {
        report.warn(Stage::Plan, warning.as_str());
    }
    let receipt = tracked(&plan, report)?;
    say!("{}", summary(&receipt));
    Ok(receipt)
}

/// The job, with the trackers that it was asked for.
fn tracked(plan: &Plan, report: &Report) -> Result<Receipt> {
    let options = plan.trackers.clone().with_secrets(&environment);
    if options.is_empty() {
        return job::run(plan, report);
    }
    let trackers = Trackers::start(&options, plan.settings(), report)?;
    let ended = job::run(plan, &Report::new(trackers.clone()));
    // A failed run's page is written when its failure is told, which comes later.
    let page = plan.output.join(hone::run_folder::REPORT);
    trackers.finish(&End {
        failed: ended.is_err(),
        report: Some(page).filter(|page| ended.is_ok() && page.exists()),
    });
    ended
}

/// The result of a run, for people.
fn summary(receipt: &Receipt) -> String {
    let trained = &receipt.trained;
    let mut text = format!(
        "\nTrained {} steps, {} tokens in {:.1} s ({:.0} tokens/s): loss {:.4} -> {:.4}",
        trained.steps,
        trained.tokens,
        trained.seconds,
        trained.tokens_per_second,
        trained.first_loss,
        trained.loss
    );
    if let Some(eval_loss) = trained.eval_loss {
        text += &format!(", evaluation {eval_loss:.4}");
    }
    text += &format!("\nAdapter: {}", receipt.folder.display());
    for sent in &receipt.published {
        let kind = if sent.image { "Image:" } else { "Sent to:" };
        text += &format!("\n{kind:<8} {}", sent.destination);
        text += &sent.revision.as_ref().map(|revision| format!("\n         {revision}")).unwrap_or_default();
    }
    text
}

/// Shows the data as it will be trained on.
fn look(
    plan: &Plan,
    options: &review::Options,
    format: Format,
    html: Option<&std::path::Path>,
    report: &Report,
) -> Result<()> {
    let review = review::read(plan, options, report)?;
    match format {
        Format::Text => say!("{}", review.text(std::io::stdout().is_terminal()).trim_end()),
        Format::Json => say!("{}", serde_json::to_string_pretty(&review.json()).expect("texts and numbers")),
    }
    let Some(file) = html else { return Ok(()) };
    std::fs::write(file, review.html()).map_err(|error| Fault::storage("write", file, &error))
}

fn show(plan: &Plan, format: Format, gpus: &[String], prices: &[String]) -> Result<()> {
    if !plan.model.folder.join("config.json").exists() {
        return show_without_model(plan, format);
    }
    let described = job::describe(plan)?;
    let facts = &described.facts;
    job::check_small_files(plan, &described)?;
    let estimate = job::estimate::estimate(plan, &described, gpus, prices)?;
    // Several GPUs are compared. The memory plan shown is that of the first GPU that fits, or of this machine.
    let fitting = estimate.gpus.iter().find(|gpu| gpu.speed.is_ok()).or(estimate.gpus.first());
    let memory = job::room::plan(plan, &described, fitting.map(|gpu| gpu.name.as_str()));
    match format {
        Format::Text => {
            say!("{}", plan.table().trim_end());
            say!(
                "\nmodel: {}, {} layers of width {}, {} parameters\nadapter: {} linear layers, {} trainable parameters",
                facts.family,
                facts.layers.len(),
                facts.width,
                facts.parameters(),
                described.sites.list.len(),
                described.sites.parameters()
            );
            say!("\n{}", estimate.table().trim_end());
            say!(
                "\nmemory, if all examples have the largest number of tokens:\n{}",
                memory?.table().trim_end()
            );
        }
        Format::Json => {
            let mut json = plan.json();
            json["model"] = serde_json::json!({
                "family": facts.family, "layers": facts.layers.len(), "width": facts.width, "parameters": facts.parameters(),
            });
            let sites: Vec<&str> = described.sites.list.iter().map(|site| site.path.as_str()).collect();
            json["adapter"] = serde_json::json!({"trainable_parameters": described.sites.parameters(), "linear_layers": sites});
            json["estimate"] = estimate.json();
            let memory = memory?;
            json["memory"] = memory.plan.json(&memory.machine);
            say!("{}", serde_json::to_string_pretty(&json).expect("texts and numbers"));
        }
    }
    Ok(())
}

/// The memory of a server: on this machine, or on each of the cards.
fn show_serving(
    request: &Request,
    size: &serving::room::Size,
    adapters: &[PathBuf],
    format: Format,
    gpus: &[String],
) -> Result<()> {
    let plan = plan::serving(&spec::gather(request, &environment)?)?;
    let places: Vec<Option<&str>> = match gpus {
        [] => vec![None],
        names => names.iter().map(|name| Some(name.as_str())).collect(),
    };
    let ahead = |place: &Option<&str>| serving::room::ahead(&plan, size, adapters, *place);
    let plans = places.iter().map(ahead).collect::<Result<Vec<_>>>()?;
    let json = |(described, machine, divided): &(
        serving::room::Described,
        Machine,
        memory::serving::Plan,
    )| {
        let facts = &described.facts;
        let mut json = divided.json(machine);
        json["model"] = serde_json::json!({
            "name": plan.model_name, "family": facts.family, "layers": facts.layers.len(), "width": facts.width,
            "parameters": facts.parameters(),
        });
        json
    };
    match format {
        Format::Text => {
            let facts = &plans[0].0.facts;
            say!(
                "model: {}, {}, {} layers of width {}, {} parameters",
                plan.model_name,
                facts.family,
                facts.layers.len(),
                facts.width,
                facts.parameters()
            );
            plans.iter().for_each(|(_, machine, divided)| say!("\n{}", divided.table(machine).trim_end()));
        }
        Format::Json => {
            let list: Vec<_> = plans.iter().map(json).collect();
            let shown = if let [only] = list.as_slice() { only.clone() } else { list.into() };
            say!("{}", serde_json::to_string_pretty(&shown).expect("texts and numbers"));
        }
    }
    Ok(())
}

/// Shows a plan whose model is not on this machine. A plan fetches nothing, so everything that depends on the model
/// is unknown.
fn show_without_model(plan: &Plan, format: Format) -> Result<()> {
    let unknown = format!(
        "not on this machine yet: `hone model {}` fetches its small files, `hone run` all of it; after that its facts and the memory plan are shown",
        plan.base
    );
    match format {
        Format::Text => say!("{}\n\nmodel: {unknown}", plan.table().trim_end()),
        Format::Json => {
            let mut json = plan.json();
            json["model"] = serde_json::json!({ "missing": unknown });
            say!("{}", serde_json::to_string_pretty(&json).expect("texts and numbers"));
        }
    }
    Ok(())
}

/// How commands without keys reach a model: by the environment variables of `hone run`.
fn reach() -> Result<(hone::source::Options, registry::Options)> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let setting = |key: &str| {
        let name = format!("HONE_{}", key.to_uppercase());
        let written = variable(&name)?;
        let written = if key == "plain_http" { Written::Yaml(written) } else { Written::Text(written) };
        Some(Setting { key: key.into(), written, origin: Origin::Environment(name) })
    };
    let settings = ["cache", "ca_file", "docker_config", "plain_http"].into_iter().filter_map(setting);
    let request = Request { settings: settings.collect(), ..Request::default() };
    let surroundings = |name: &str| variable(name).filter(|_| matches!(name, "HOME" | "XDG_CACHE_HOME"));
    plan::access(&spec::gather(&request, &surroundings)?)
}

/// The folder of a model that may be given as an address. The model is fetched with or without its weights.
fn fetched(address: &std::path::Path, weights: bool, report: &Report) -> Result<PathBuf> {
    let address = fetch::Model::parse(&address.to_string_lossy())?;
    if let fetch::Model::Folder(folder) = address {
        return Ok(folder);
    }
    let (source, registry) = reach()?;
    let access = fetch::Access { source: &source, registry: &registry };
    match weights {
        true => fetch::weights(&address, access, report),
        false => fetch::texts(&address, access, report),
    }
}

fn model(about: &AboutModel, format: Format, report: &Report) -> Result<()> {
    let (text, json) = match (&about.preset, &about.folder) {
        (Some(name), _) => {
            let preset = presets::find(name)?;
            (inspect::table(&preset.rows()), serde_json::json!(preset))
        }
        (None, folder) => {
            let folder = folder.as_ref().expect("clap asks for one of them");
            let targets = Targets::written(&about.target_modules);
            let lora = LoraOptions { r: about.rank as usize, targets, ..LoraOptions::default() };
            let inspection = inspect::read(&fetched(folder, false, report)?, &lora)?;
            (inspection.table(), inspection.json())
        }
    };
    match format {
        Format::Text => say!("{}", text.trim_end()),
        Format::Json => say!("{}", serde_json::to_string_pretty(&json).expect("texts and numbers")),
    }
    Ok(())
}

fn push(folder: &std::path::Path, image: &str, arguments: &RegistryArguments, report: &Report) -> Result<()> {
    let facts = ImageFacts { model_name: base_model(folder), ..ImageFacts::default() };
    let place = Destination::parse(image)?;
    let (registry, source) = (access(arguments), plan::upload_access(arguments.ca_file.clone()));
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

fn access(arguments: &RegistryArguments) -> registry::Options {
    let arguments = arguments.clone();
    plan::registry_access(arguments.docker_config, arguments.ca_file, arguments.plain_http)
}

/// The name that an adapter folder gives its base model, for the image's annotation.
fn base_model(folder: &std::path::Path) -> String {
    let config = hone::adapter::read_config(folder).ok();
    config.and_then(|config| config.base_model_name_or_path).unwrap_or_default()
}

fn pull(image: &str, folder: &std::path::Path, arguments: &RegistryArguments, report: &Report) -> Result<()> {
    let pulled = registry::pull(&Target::parse(image)?, folder, &access(arguments), report)?;
    say!("{}\n{}\n{}", pulled.reference, pulled.digest, folder.display());
    Ok(())
}

fn try_example(folder: &std::path::Path, write_only: bool, report: &Report) -> Result<Option<Receipt>> {
    let file = example::write(folder)?;
    say!(
        "Wrote a tiny model, a dataset and {}.\nTo run it by hand: hone run {}",
        file.display(),
        file.display()
    );
    match write_only {
        true => Ok(None),
        false => run(&Request { spec: Some(file), ..Request::default() }, report).map(Some),
    }
}

fn render(files: &[PathBuf], settings: &Settings, format: ObjectFormat, report: &Report) -> Result<()> {
    let applied = files::apply(files, settings)?;
    for warning in applied.warnings {
        report.warn(Stage::Plan, warning);
    }
    match format {
        ObjectFormat::Yaml => say!("{}", yaml::write(&applied.objects).trim_end()),
        ObjectFormat::Json => {
            let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": applied.objects});
            say!("{}", serde_json::to_string_pretty(&list).expect("texts and numbers"));
        }
    }
    Ok(())
}

fn measure(options: &bench::Options, json: Option<&std::path::Path>, report: &Report) -> Result<()> {
    let mut options = options.clone();
    if let bench::Base::Folder(address) = &options.base {
        options.base = bench::Base::Folder(fetched(address, true, report)?);
    }
    let outcome = bench::run(&options, report)?;
    say!("{}", outcome.table().trim_end());
    let Some(file) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(&outcome.json()).expect("texts and numbers");
    std::fs::write(file, text + "\n").map_err(|error| Fault::storage("write", file, &error))
}

fn outcome(receipt: Receipt) -> termination::Outcome {
    let image = receipt.published.iter().find(|sent| sent.image);
    termination::Outcome {
        fault: None,
        step: Some(receipt.trained.steps),
        loss: Some(receipt.trained.loss),
        eval_loss: receipt.trained.eval_loss,
        output: Some(receipt.folder),
        image: image.map(|image| image.destination.clone()),
        digest: image.and_then(|image| image.revision.clone()),
    }
}

/// The outcome of a run that failed, with the last step that it logged.
fn failed(fault: &Fault, latest: &Latest) -> termination::Outcome {
    let step = latest.state().step;
    termination::Outcome {
        fault: Some(fault.clone()),
        step: step.as_ref().map(|step| step.step),
        loss: step.map(|step| step.loss),
        ..termination::Outcome::default()
    }
}
