//! The command line: flags and their environment variables -> a command. It has no default of the job's keys; those
//! are in the table of keys.

pub mod reference;
mod command;
mod values;
mod job;
mod look;
mod after;
mod image;
mod bench;
mod serve;
mod size;
mod cluster;

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::spec::keys;

pub use command::{AboutModel, Command, Format, Invocation, Log, ObjectFormat, RegistryArguments};

/// Reads the program's arguments. The error prints itself and knows its exit code (2, or 0 for help).
pub fn parse(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Invocation, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    let cli = Cli::from_arg_matches(&matches)?;
    let matches = matches.subcommand().map(|(_, matches)| matches).expect("a subcommand is required");
    let metrics = match &cli.command {
        Subcommands::Run(run) => run.metrics,
        _ => None,
    };
    // Arguments that clap accepts and hone refuses.
    let refused = |message: String| Cli::command().error(ErrorKind::ValueValidation, message);
    let command = command(cli.command, matches).map_err(refused)?;
    Ok(Invocation { log: cli.log, quiet: cli.quiet, command, metrics })
}

/// Warnings about variables that look like a flag's and are none: hone does not read them. Kubernetes makes variables
/// of a Service called hone (`HONE_SERVICE_HOST`), which are no mistake.
pub fn misspelt_variables(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut known = variables(&Cli::command());
    known.extend(PLACES.map(str::to_owned));
    let plain = |name: &str| name.strip_prefix(VARIABLES).map(str::to_owned);
    let of_service = |name: &str| ["_SERVICE_", "_PORT_", "_TCP"].iter().any(|part| name.contains(part));
    let warning = |name: String| {
        let given = plain(&name).filter(|_| !known.contains(&name) && !of_service(&name))?;
        let meant = keys::nearest(known.iter().filter_map(|known| known.strip_prefix(VARIABLES)), &given)?;
        Some(format!("the variable {name} has no effect; did you mean {VARIABLES}{meant}?"))
    };
    names.into_iter().filter_map(warning).collect()
}

/// Variables without a flag whose names are near a flag's: the place of a rank.
const PLACES: [&str; 2] = ["HONE_RANK", "HONE_LOCAL_RANK"];

/// The beginning of the names of hone's own variables.
const VARIABLES: &str = "HONE_";

/// The names of the variables that flags of a command and its subcommands have.
fn variables(command: &clap::Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned));
    own.chain(command.get_subcommands().flat_map(variables)).collect()
}

/// The command that flags ask for; the error says which flag is wrong.
fn command(subcommand: Subcommands, matches: &ArgMatches) -> Result<Command, String> {
    match subcommand {
        Subcommands::Run(run) => run.command(matches),
        Subcommands::Plan(plan) => plan.command(matches),
        Subcommands::Inspect(inspect) => inspect.command(matches),
        Subcommands::Model(model) => Ok(model.command()),
        Subcommands::Try(attempt) => attempt.command(matches),
        Subcommands::Eval(eval) => eval.command(matches),
        Subcommands::Merge(merge) => merge.command(matches),
        Subcommands::Report(report) => Ok(report.command()),
        Subcommands::Push(push) => Ok(push.command()),
        Subcommands::Pull(pull) => Ok(pull.command()),
        Subcommands::Example(example) => Ok(example.command()),
        Subcommands::Bench(bench) => bench.command(),
        Subcommands::Serve(serve) => serve.command(matches),
        Subcommands::Render(render) => Ok(render.command()),
        Subcommands::Tune(tune) => Ok(tune.command()),
        Subcommands::Controller(controller) => Ok(controller.command()),
        Subcommands::Keys(keys) => Ok(keys.command()),
        Subcommands::Completions(completions) => Ok(completions.command()),
        Subcommands::Man(man) => Ok(man.command()),
    }
}

/// Ends the process as clap would. URLs of a mistyped line are shown without secrets, because a Job's log is stored.
pub fn exit(error: &clap::Error) -> ! {
    let text = error.to_string();
    if !error.use_stderr() || shown(error) == text {
        error.exit();
    }
    eprint!("{}", shown(error));
    std::process::exit(error.exit_code())
}

/// The message of a command-line error, without the secrets of the addresses in it.
pub fn shown(error: &clap::Error) -> String {
    crate::report::clean::without_secrets(&error.to_string())
}

#[derive(Parser)]
#[command(name = "hone", version, about, max_term_width = 110, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0: done; 2, 10-15: change something first; 20-23, 30, 31: a retry can help; 70: a defect.\n\
    Every flag is also an environment variable, and every key of the job can be written in one YAML file."
)]
struct Cli {
    /// Format of the events on stderr
    #[arg(long, value_enum, default_value = "auto", env = "HONE_LOG", global = true, display_order = 100)]
    log: Log,
    /// Show only warnings and errors
    #[arg(short, long, env = "HONE_QUIET", global = true, display_order = 101)]
    quiet: bool,
    #[command(subcommand)]
    command: Subcommands,
}

/// The commands, in the order of `--help`. Each describes itself where its flags are.
#[derive(Subcommand)]
enum Subcommands {
    Run(job::Run),
    Plan(job::Plan),
    Inspect(job::Inspect),
    Model(look::Model),
    Try(after::Try),
    Eval(after::Eval),
    Merge(after::Merge),
    Report(look::Report),
    Push(image::Push),
    Pull(image::Pull),
    Example(look::Example),
    Bench(bench::Bench),
    Serve(serve::Serve),
    Render(cluster::Render),
    Tune(cluster::Tune),
    Controller(cluster::Controller),
    Keys(look::Keys),
    Completions(look::Completions),
    Man(look::Man),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_code(arguments: &[&str]) -> i32 {
        parse(["hone"].iter().chain(arguments).copied()).unwrap_err().exit_code()
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_a_variable() {
        for subcommand in Cli::command().get_subcommands() {
            for argument in subcommand.get_arguments().filter(|argument| argument.get_long().is_some()) {
                let id = argument.get_id().as_str();
                let variable = argument.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(variable, Some(format!("HONE_{}", id.to_uppercase())), "{id}");
            }
        }
    }

    #[test]
    fn a_variable_that_is_nearly_a_flags_is_reported() {
        let found = |names: &[&str]| misspelt_variables(names.iter().map(|name| (*name).to_owned()));
        assert_eq!(
            found(&["HONE_DTAA", "HONE_DATA", "HONE_SERVICE_HOST", "HONE_PORT_80_TCP", "HONE_X", "DTAA"]),
            ["the variable HONE_DTAA has no effect; did you mean HONE_DATA?"]
        );
        // Variables that the program reads besides those of flags.
        assert_eq!(
            found(&[
                "HONE_TERMINATION_LOG",
                "HONE_IMAGE",
                "HONE_CUDA_LIBS",
                "HONE_BENCH_WITHOUT",
                "HONE_RANK",
                "HONE_LOCAL_RANK",
                "HONE_WORLD_SIZE",
                "HONE_LOCAL_WORLD_SIZE",
                "HONE_MASTER_ADDR",
                "HONE_MASTER_PORT",
                "HONE_RANKS_WAIT",
                "HONE_RANKS_SILENCE",
                "HONE_RANKS_TIMEOUT",
                "HONE_NODES",
            ]),
            [""; 0]
        );
    }

    #[test]
    fn usage_errors_exit_with_2_and_help_with_0() {
        assert_eq!(exit_code(&["run", "--no-such-flag"]), 2);
        assert_eq!(exit_code(&["tune"]), 2);
        assert_eq!(exit_code(&["render"]), 2);
        assert_eq!(exit_code(&["push", "only-a-folder"]), 2);
        assert_eq!(exit_code(&["run", "--set", "LoraConfig.r"]), 2);
        assert_eq!(exit_code(&["plan", "--format", "xml"]), 2);
        assert_eq!(exit_code(&["run", "--help"]), 0);
    }

    #[test]
    fn other_commands() {
        let command = |arguments: &[&str]| parse(["hone"].iter().chain(arguments).copied()).unwrap();
        let push = command(&["push", "a", "oci:b", "--plain-http", "-q", "--log", "json"]);
        assert_eq!((push.log, push.quiet), (Log::Json, true));
        let registry = RegistryArguments { plain_http: true, ..RegistryArguments::default() };
        assert_eq!(push.command, Command::Push { folder: "a".into(), image: "oci:b".into(), registry });
        assert!(matches!(
            command(&["plan", "--format", "json"]).command,
            Command::Plan { format: Format::Json, .. }
        ));
        let example = |write_only| Command::Example { folder: "d".into(), write_only };
        assert_eq!(command(&["example", "d"]).command, example(false));
        assert_eq!(command(&["example", "d", "--write-only"]).command, example(true));
    }
}
