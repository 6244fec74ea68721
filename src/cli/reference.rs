//! clap's description of the commands -> the reference of the command line: docs/cli.md, shell completions, man
//! pages.

use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::fault::{Fault, Result};

/// Every command with its `--help` text, as Markdown for docs/cli.md.
pub fn markdown() -> String {
    let mut text = String::new();
    for name in names() {
        let mut root = Cli::command().term_width(100);
        root.build();
        let command = root.find_subcommand_mut(&name).expect("it is one of the names");
        text += &format!(
            "## hone {name}\n\n```text\n{}\n```\n\n",
            trimmed(&command.render_long_help().to_string())
        );
    }
    text
}

fn names() -> Vec<String> {
    Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect()
}

/// Help without this machine's values of environment variables and without clap's padding.
fn trimmed(help: &str) -> String {
    let value = regex::Regex::new(r"\[env: (\w+)=[^\]]*\]").expect("a valid expression");
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    value.replace_all(lines.join("\n").trim(), "[env: $1=]").into_owned()
}

/// The completion script of a shell.
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "hone", &mut script);
    String::from_utf8(script).expect("clap writes text")
}

/// Writes `hone.1` and a page for each command into a folder. Returns how many pages there are.
pub fn man(folder: &Path) -> Result<usize> {
    let failed = |error: std::io::Error| Fault::storage("write man pages to", folder, &error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut root: Command = Cli::command();
    root.build();
    clap_mangen::generate_to(root, folder).map_err(failed)?;
    Ok(std::fs::read_dir(folder).map_err(failed)?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_every_reference() {
        let page = markdown();
        let script = completions(Shell::Bash);
        let folder = tempfile::tempdir().unwrap();
        let pages = man(folder.path()).unwrap();
        assert!(pages > names().len(), "{pages} pages");
        for name in names() {
            assert!(page.contains(&format!("## hone {name}\n")), "{name}");
            assert!(script.contains(&name), "{name}");
            assert!(folder.path().join(format!("hone-{name}.1")).exists(), "{name}");
        }
    }
}
