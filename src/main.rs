//! The program: arguments -> one command -> an exit code that says who must act.

#![warn(missing_docs)]

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use hone::cli::{self, Command, Invocation, Log};
use hone::fault::{Fault, Result};
use hone::job::Receipt;
use hone::kaito::{self, pod, watch};
use hone::metrics::{self, Latest};
use hone::ranks::Place;
use hone::ranks::follower::Follower;
use hone::ranks::launch::{self, Crew};
use hone::ranks::link;
use hone::ranks::place::{self, Found};
use hone::report::{self, Report, Stage, termination};
use hone::run_report::Recorder;
use hone::{commands, last_word};

fn main() -> ExitCode {
    hone::machine::keep_freed_memory();
    launch::fix_order_of_sums();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match kaito::call(&arguments, &environment) {
        None => start(arguments, Vec::new(), false),
        Some(Ok(kaito::Call::MetricsServer)) => {
            use std::io::Write;
            let _ = writeln!(std::io::stdout(), "the job itself serves its metrics, on the same port");
            ExitCode::SUCCESS
        }
        Some(Ok(kaito::Call::Probe)) => ExitCode::from(u8::from(!kaito::is_healthy())),
        Some(Ok(kaito::Call::Serve { arguments, warnings })) => start(arguments, warnings, false),
        Some(Ok(kaito::Call::Train { arguments, warnings })) if watch::is_job(&environment) => {
            start(arguments, warnings, true)
        }
        Some(Ok(kaito::Call::Train { .. })) => {
            let report = plain_report();
            watch::watch(pod::limits(&environment), &report)
                .map_or_else(|fault| refuse(&fault, &report), ExitCode::from)
        }
        Some(Err(fault)) => refuse(&fault, &plain_report()),
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Returns the report of a program that has not read its flags.
fn plain_report() -> Report {
    Report::new(report::choose(None, false))
}

/// Ends the program with a fault before the job began, in a pod of KAITO's.
fn refuse(fault: &Fault, report: &Report) -> ExitCode {
    pod::refuse(fault, &environment, report);
    ExitCode::from(fault.kind.exit_code())
}

/// Runs a command line of hone with warnings to report. `pod` is set for a job in a pod of KAITO's.
fn start(arguments: Vec<OsString>, mut warnings: Vec<String>, pod: bool) -> ExitCode {
    // The process that launches ranks has the same variables and reports them for all.
    if !launch::is_launched(&environment) {
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        warnings.extend(cli::misspelt_variables(names));
    }
    let invocation = cli::parse(&arguments).unwrap_or_else(|error| leave_usage(&error, pod));
    let place = seat(&invocation.command);
    if !place.leads() {
        return follow(place, &invocation);
    }
    let bars = bars(&invocation);
    let is_run = matches!(invocation.command, Command::Run(_) | Command::Example { .. });
    let message = termination::path();
    last_word::prepare(message.as_deref(), report::is_json(bars), pod);
    let stays = matches!(invocation.command, Command::Serve { .. } | Command::Controller(_));
    if let (true, Some(path)) = (is_run || stays, &message) {
        termination::write_ahead(path, if stays { termination::BEGINS_ANEW } else { termination::CONTINUES });
    }
    // From here on, every end of the process leaves a last message. The plan is made once to know the number of ranks.
    let crew = catch_unwind(AssertUnwindSafe(|| commands::crew(&invocation.command))).ok().flatten();
    if let Some(crew) = crew {
        return lead(&crew, &arguments, &warnings, &invocation, pod);
    }
    let shown = report::choose(bars, invocation.quiet);
    let shown = if is_run { Arc::new(Recorder::new(shown)) } else { shown };
    let latest = Arc::new(Latest::new(shown));
    let report = Report::new(latest.clone());
    let _server = invocation.metrics.and_then(|address| metrics::offer(address, latest.clone(), &report));
    warnings.iter().for_each(|warning| report.warn(Stage::Plan, warning.as_str()));
    if pod {
        pod::warn_of_limits(&environment, &report);
    }
    let ended = launch::end_with_parent(&environment).and_then(|()| run(&invocation.command, &report));
    let ended = if pod { pod::leave(ended, &environment, &report) } else { ended };
    let (outcome, fault) = match ended {
        Ok(receipt) => (receipt.map(Receipt::outcome).unwrap_or_default(), None),
        Err(fault) => (latest.outcome(&fault), Some(fault)),
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

/// Returns the place of this process. A fault is ignored here, since it is found again, and reported, when the command
/// runs.
fn seat(command: &Command) -> Place {
    match (command, place::find(&environment)) {
        (Command::Run(_), Ok(Found::Rank(seat))) => seat.place,
        _ => Place::ALONE,
    }
}

/// Runs a rank that is not the first. Rank 0 reports the run, serves its metrics and writes the termination message.
fn follow(place: Place, invocation: &Invocation) -> ExitCode {
    let bars = bars(invocation);
    last_word::prepare(None, report::is_json(bars), false);
    let shown = report::choose(bars, invocation.quiet);
    let report = Report::new(Arc::new(Follower::new(shown, place.rank, link::is_told)));
    let ended = launch::end_with_parent(&environment).and_then(|()| run(&invocation.command, &report));
    match ended {
        Ok(_) => ExitCode::SUCCESS,
        Err(fault) => {
            report.fault(&fault);
            ExitCode::from(fault.kind.exit_code())
        }
    }
}

/// Starts the ranks of this machine and ends as they do. They report the run; this process reports only the end of a
/// rank that could not.
fn lead(
    crew: &Crew,
    arguments: &[OsString],
    warnings: &[String],
    invocation: &Invocation,
    pod: bool,
) -> ExitCode {
    let report = Report::new(report::choose(bars(invocation), invocation.quiet));
    warnings.iter().for_each(|warning| report.warn(Stage::Plan, warning.as_str()));
    if pod {
        pod::warn_of_limits(&environment, &report);
    }
    report.note(Stage::Plan, crew.shown());
    let ended = launch::run(crew, arguments, &environment);
    let told = ended.as_ref().is_ok_and(|ended| ended.told);
    let ended = ended.and_then(|ended| ended.fault.map_or(Ok(()), Err));
    let (failed, ended) =
        (ended.is_err(), if pod { pod::leave(ended, &environment, &report) } else { ended });
    let Err(fault) = ended else { return ExitCode::SUCCESS };
    // A fault of the push came after the ranks.
    if !(told && failed) {
        report.fault(&fault);
        termination::leave(&fault);
    }
    ExitCode::from(fault.kind.exit_code())
}

/// Ends the process after a command line that cannot be read, or after `--help`.
fn leave_usage(error: &clap::Error, pod: bool) -> ! {
    if error.use_stderr() {
        termination::leave(&Fault::usage(cli::shown(error)).help("`hone --help` shows commands and flags"));
    }
    if pod {
        pod::release(&environment, &plain_report());
    }
    cli::exit(error)
}

/// Returns whether events are shown for people (true) or as JSON lines (false); `None` if the terminal decides. The log
/// of a job is JSON lines. The other commands are run by people, who want plain text even through a pipe.
fn bars(invocation: &Invocation) -> Option<bool> {
    let job = matches!(invocation.command, Command::Run(_) | Command::Controller(_) | Command::Serve { .. });
    match invocation.log {
        Log::Auto if job => None,
        Log::Auto | Log::Terminal => Some(true),
        Log::Json => Some(false),
    }
}

/// Runs the command. A defect ends with its own exit code and message, like any other fault.
fn run(command: &Command, report: &Report) -> Result<Option<Receipt>> {
    catch_unwind(AssertUnwindSafe(|| commands::run(command, report)))
        .unwrap_or_else(|panic| Err(Fault::of_panic(&*panic)))
}
