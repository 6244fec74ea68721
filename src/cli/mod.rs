//! The command line: flags and their environment variables -> a command. It has no default of the job's keys; those
//! are in the table of keys.

pub mod reference;
mod job;
mod look;
mod after;
mod image;
mod bench;
mod serve;
mod cluster;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::spec::Request;
use crate::workspace::{Settings, tune};
use crate::{controller, evaluate, merge, review, serving, trial};

pub use image::RegistryArguments;
pub use look::AboutModel;

/// A command, and how to report on it.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    /// How events are shown.
    pub log: Log,
    /// Whether only warnings and errors are shown.
    pub quiet: bool,
    /// The command to run.
    pub command: Command,
    /// Address where a run's metrics are served.
    pub metrics: Option<SocketAddr>,
}

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Fine-tune a model.
    Run(Request),
    /// Serve a model over HTTP.
    Serve {
        /// Settings of the model.
        request: Request,
        /// Settings of the server.
        options: Box<serving::Options>,
    },
    /// Show what hone reads in a model.
    Model {
        /// The model.
        about: AboutModel,
        /// Form of the output.
        format: Format,
    },
    /// Show what `run` would do.
    Plan {
        /// Settings of the job.
        request: Request,
        /// Form of the output.
        format: Format,
        /// GPUs to plan for, in place of this machine.
        gpus: Vec<String>,
        /// Prices of GPUs, `NAME=DOLLARS`.
        prices: Vec<String>,
    },
    /// Show the memory plan of a server.
    PlanServing {
        /// Settings of the model.
        request: Request,
        /// How large the server is to be.
        size: serving::room::Size,
        /// Folders of adapters.
        adapters: Vec<PathBuf>,
        /// Form of the output.
        format: Format,
        /// GPUs to plan for, in place of this machine.
        gpus: Vec<String>,
    },
    /// Show the data as it will be trained on.
    Inspect {
        /// Settings of the job.
        request: Request,
        /// Which rows to show.
        options: review::Options,
        /// Form of the output.
        format: Format,
        /// File for an HTML page.
        html: Option<PathBuf>,
    },
    /// Measure a base without and with an adapter.
    Eval {
        /// Settings of the job.
        request: Request,
        /// What to measure.
        options: evaluate::Options,
        /// Form of the output.
        format: Format,
    },
    /// Ask a base and its tuned model the same.
    Try {
        /// Settings of the job.
        request: Request,
        /// What to ask.
        options: trial::Options,
        /// Form of the output.
        format: Format,
    },
    /// Write a base with adapters as one model.
    Merge {
        /// Settings of the job.
        request: Request,
        /// What to write.
        options: merge::Options,
    },
    /// Make the page of a run, or one that compares several.
    Report {
        /// Folders of results.
        folders: Vec<PathBuf>,
        /// File for the page.
        to: Option<PathBuf>,
    },
    /// Push an adapter as an image.
    Push {
        /// Folder of the adapter.
        folder: PathBuf,
        /// Image to push.
        image: String,
        /// How to reach the registry.
        registry: RegistryArguments,
    },
    /// Pull an adapter's image.
    Pull {
        /// Image to pull.
        image: String,
        /// Folder to write.
        folder: PathBuf,
        /// How to reach the registry.
        registry: RegistryArguments,
    },
    /// Write an example and run it.
    Example {
        /// Folder to write.
        folder: PathBuf,
        /// Whether to write without a run.
        write_only: bool,
    },
    /// Measure the speed of training.
    Bench {
        /// What to measure.
        options: crate::bench::Options,
        /// File for the result as JSON.
        json: Option<PathBuf>,
    },
    /// Print the objects of Workspaces.
    Render {
        /// Files with Workspaces and ConfigMaps.
        files: Vec<PathBuf>,
        /// How the cluster runs hone.
        settings: Settings,
        /// Form of the output.
        format: ObjectFormat,
    },
    /// Print a Workspace.
    Tune(tune::Options),
    /// Run Workspaces in a cluster.
    Controller(controller::Options),
    /// Print the keys whose name or description contains a word.
    Keys {
        /// The word; all keys contain an empty one.
        word: String,
    },
    /// Print the completion script of a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write man pages.
    Man {
        /// Folder to write.
        folder: PathBuf,
    },
}

/// How events are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Log {
    /// Bars on a terminal, JSON lines otherwise
    Auto,
    /// For people: bars, or plain lines if stderr is no terminal
    Terminal,
    /// For machines: one JSON line for each event
    Json,
}

/// Form of a command's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text for people
    Text,
    /// JSON for programs
    Json,
}

/// Form of Kubernetes objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ObjectFormat {
    /// YAML documents
    Yaml,
    /// A List in JSON
    Json,
}

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
    let command = match cli.command {
        Subcommands::Run(run) => run.command(matches)?,
        Subcommands::Plan(plan) => plan.command(matches)?,
        Subcommands::Inspect(inspect) => inspect.command(matches)?,
        Subcommands::Model(model) => model.command(),
        Subcommands::Try(attempt) => attempt.command(matches)?,
        Subcommands::Eval(eval) => eval.command(matches)?,
        Subcommands::Merge(merge) => merge.command(matches)?,
        Subcommands::Report(report) => report.command(),
        Subcommands::Push(push) => push.command(),
        Subcommands::Pull(pull) => pull.command(),
        Subcommands::Example(example) => example.command(),
        Subcommands::Bench(bench) => bench.command()?,
        Subcommands::Serve(serve) => serve.command(matches)?,
        Subcommands::Render(render) => render.command(),
        Subcommands::Tune(tune) => tune.command(),
        Subcommands::Controller(controller) => controller.command(),
        Subcommands::Keys(keys) => keys.command(),
        Subcommands::Completions(completions) => completions.command(),
        Subcommands::Man(man) => man.command(),
    };
    Ok(Invocation { log: cli.log, quiet: cli.quiet, command, metrics })
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
    after_help = "Exit codes: 0: done; 2, 10-15: something must be changed first; 20-23, 30, 31: a retry can help.\n\
    Every flag is also an environment variable, and every key of the job can be written in one YAML file."
)]
struct Cli {
    /// How events are shown on stderr
    #[arg(long, value_enum, default_value = "auto", env = "HONE_LOG", global = true, display_order = 100)]
    log: Log,
    /// Only warnings and errors
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

/// A command line that clap reads but hone refuses.
fn invalid(message: impl std::fmt::Display) -> clap::Error {
    Cli::command().error(clap::error::ErrorKind::ValueValidation, message)
}

/// A flag with a value that it does not take.
fn wrong(flag: &str, found: &str, expected: &str) -> clap::Error {
    invalid(format!("--{flag} {found:?}: expected {expected}"))
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a whole number from 1".into())
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
