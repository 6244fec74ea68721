//! Flags of the commands that look at a model, a run or this program: `hone model`, `hone report`, `hone example`,
//! `hone keys`, `hone completions`, `hone man`.

use std::path::PathBuf;

use clap::Args;

use super::command::{AboutModel, Command, Format};

/// Show a model's architecture, its layers for LoRA, its memory needs and missing files
#[derive(Args)]
#[command(after_help = "Examples:\n  hone model ./phi-3\n  \
    hone model ./phi-3 --target-modules qkv_proj,o_proj --rank 16 --format json\n  \
    hone model hf://microsoft/phi-4\n  \
    hone model --preset phi-4-mini-instruct")]
pub(super) struct Model {
    #[command(flatten)]
    about: AboutModel,
    /// A table for people, or JSON
    #[arg(long, value_enum, default_value = "text", env = "HONE_FORMAT")]
    format: Format,
}

impl Model {
    pub(super) fn command(self) -> Command {
        Command::Model { about: self.about, format: self.format }
    }
}

/// Write the HTML report of a run from its output folder, or a page that compares several runs
#[derive(Args)]
#[command(after_help = "Examples:\n  hone report ./adapter\n  \
    hone report ./rank-8 ./rank-16 ./rank-32 --to ranks.html")]
pub(super) struct Report {
    /// Output folders of `hone run`
    #[arg(value_name = "DIR", required = true)]
    folders: Vec<PathBuf>,
    /// File for the page [default: report.html in the run's folder; for several runs comparison.html in this folder]
    #[arg(long, value_name = "FILE", env = "HONE_TO")]
    to: Option<PathBuf>,
}

impl Report {
    pub(super) fn command(self) -> Command {
        Command::Report { folders: self.folders, to: self.to }
    }
}

/// Write a tiny model, a dataset and a configuration, and run the whole job on them in seconds
#[derive(Args)]
pub(super) struct Example {
    /// New folder for everything: model, data, configuration, adapter, image
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Only write the files; do not run the job
    #[arg(long, env = "HONE_WRITE_ONLY")]
    write_only: bool,
}

impl Example {
    pub(super) fn command(self) -> Command {
        Command::Example { folder: self.folder, write_only: self.write_only }
    }
}

/// Print the configuration keys: all of them, or those whose name or description contains a word
#[derive(Args)]
#[command(after_help = "Examples:\n  hone keys\n  hone keys warmup\n  hone keys LoraConfig")]
pub(super) struct Keys {
    /// A word to search for, in any letter case
    #[arg(value_name = "WORD")]
    word: Option<String>,
}

impl Keys {
    pub(super) fn command(self) -> Command {
        Command::Keys { word: self.word.unwrap_or_default() }
    }
}

/// Print a shell's completion script
#[derive(Args)]
#[command(after_help = "Example:\n  hone completions bash > /etc/bash_completion.d/hone")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: clap_complete::Shell,
}

impl Completions {
    pub(super) fn command(self) -> Command {
        Command::Completions { shell: self.shell }
    }
}

/// Write man pages, one for each command, into a folder
#[derive(Args)]
#[command(after_help = "Example:\n  hone man /usr/local/share/man/man1")]
pub(super) struct Man {
    /// Folder for hone.1 and the pages of the commands
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl Man {
    pub(super) fn command(self) -> Command {
        Command::Man { folder: self.folder }
    }
}
