//! A dataset of the Hugging Face hub -> its data files at one commit, with their digests.
//!
//! Without a path, the files are those of the hub's own conversion to parquet (`refs/convert/parquet`), which knows
//! configurations and splits. If there is no conversion, or it holds only a part of the dataset, the repository's
//! own files are read: those of the first kind found, and of the wanted split as far as file names show it.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;

use super::{Access, hub};
use crate::fault::{Fault, Kind, Result};
use crate::report::{Report, Stage};
use crate::source::{self, Hub, Source, split};

const CONVERTED: &str = "refs/convert/parquet";
/// The hub writes this before the name of a split of which it converted only the first gigabytes.
const PARTIAL: &str = "partial-";

/// The address of a dataset: `hf://datasets/OWNER/NAME[@REVISION][/PATH][?config=...&split=...]`.
#[derive(Clone, Debug, PartialEq)]
pub struct HubData {
    /// `OWNER/NAME`.
    pub repository: String,
    /// A branch, a tag or a commit. `None`: the main branch, or the hub's conversion of it.
    pub revision: Option<String>,
    /// A file, a folder or a glob. Empty: the whole dataset.
    pub path: String,
    /// The configuration asked for.
    pub config: Option<String>,
    /// The split asked for.
    pub split: Option<String>,
    /// SHA-256 in hex that the one file must have.
    pub sha256: Option<String>,
}

impl fmt::Display for HubData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://datasets/{}", self.repository)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

impl HubData {
    /// Parses the text after `hf://datasets/`.
    ///
    /// # Errors
    /// Config: a malformed address.
    pub fn parse(text: &str) -> Result<HubData> {
        let wrong = || {
            Fault::config("an address hf://datasets/ does not name a dataset").help(
                "write hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME?config=NAME&split=NAME, or \
                 hf://datasets/OWNER/NAME@REVISION/PATH for a file, a folder or a glob",
            )
        };
        let (text, sha256) = match text.split_once("#sha256=") {
            Some((text, hex)) if hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                (text, Some(hex.to_ascii_lowercase()))
            }
            Some(_) => return Err(wrong().help("write `#sha256=` and 64 hexadecimal digits")),
            None => (text, None),
        };
        let (text, query) = match text.split_once('?') {
            Some((text, query)) if query.contains('=') => (text, query),
            _ => (text, ""),
        };
        let mut parts = text.splitn(3, '/');
        let owner = parts.next().filter(|part| plain(part)).ok_or_else(wrong)?;
        let name = parts.next().ok_or_else(wrong)?;
        let mut path = parts.next().unwrap_or_default().to_owned();
        let (name, revision) = match name.split_once('@') {
            None => (name, None),
            // The hub's own branches have slashes in their names.
            Some((name, "refs")) => {
                let mut parts = path.splitn(3, '/');
                let branch: Vec<&str> = parts.by_ref().take(2).collect();
                let revision = format!("refs/{}", branch.join("/"));
                path = parts.next().unwrap_or_default().to_owned();
                (name, Some(revision))
            }
            Some((name, revision)) => (name, Some(revision.replace("%2F", "/"))),
        };
        let revision_is_plain = revision.iter().all(|revision| revision.split('/').all(plain));
        if !plain(name) || !revision_is_plain || path.split('/').any(|part| part == "..") {
            return Err(wrong());
        }
        let (mut config, mut split) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("config", value)) => config = Some(value.to_owned()),
                Some(("split", value)) => split = Some(value.to_owned()),
                _ => return Err(wrong()),
            }
        }
        let repository = format!("{owner}/{name}");
        Ok(HubData { repository, revision, path, config, split, sha256 })
    }
}

fn plain(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && part.chars().all(known) && !part.starts_with('.') && !part.contains("..")
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    lfs: Option<Large>,
}

#[derive(Clone, Deserialize)]
struct Large {
    sha256: String,
}

/// Returns the files of a dataset, pinned to the commit that its revision points to now.
///
/// # Errors
/// Config: an unknown dataset, revision, configuration or split. Data: no data file. Other faults are those of
/// [`source::fetch`].
pub fn resolve(data: &HubData, access: Access, report: &Report) -> Result<Vec<Source>> {
    if data.path.is_empty() && data.revision.is_none() {
        match list(data, CONVERTED, access, report) {
            Ok(listing) => {
                if let Some(files) = converted(data, &listing)? {
                    return sources(data, &listing.sha, files);
                }
                report.note(
                    Stage::Download,
                    format!("{data}: the hub converted only a part of it to parquet, so the repository's own files are read"),
                );
            }
            Err(fault) if fault.kind == Kind::Config => report.note(
                Stage::Download,
                format!(
                    "{data}: the hub has no conversion to parquet, so the repository's own files are read"
                ),
            ),
            Err(fault) => return Err(fault),
        }
    }
    if data.config.is_some() && data.path.is_empty() {
        return Err(Fault::config(format!(
            "{data}: configurations are known only from the hub's whole conversion to parquet, which is not available"
        ))
        .help("name the folder or files of the configuration: hf://datasets/OWNER/NAME/PATH"));
    }
    let listing = list(data, data.revision.as_deref().unwrap_or("main"), access, report)?;
    let files = own_files(data, &listing, access, report)?;
    sources(data, &listing.sha, files)
}

fn list(data: &HubData, revision: &str, access: Access, report: &Report) -> Result<Listing> {
    let text = hub::ask("datasets", &data.repository, revision, &data.to_string(), access.source, report)?;
    let listing: Listing = serde_json::from_slice(&text).map_err(|error| {
        Fault::data(format!("{data}: the hub's answer is not a listing of a dataset: {error}"))
    })?;
    match hub::is_commit(&listing.sha) {
        true => Ok(listing),
        false => Err(Fault::data(format!("{data}: the hub's answer names no commit"))),
    }
}

/// Returns the files `CONFIG/SPLIT/0000.parquet` of the wanted configuration and split; `None` if the conversion is not
/// whole.
fn converted(data: &HubData, listing: &Listing) -> Result<Option<Vec<Sibling>>> {
    let parts = |file: &Sibling| -> Option<(String, String)> {
        let mut parts = file.rfilename.split('/');
        let (config, split, name) = (parts.next()?, parts.next()?, parts.next()?);
        (parts.next().is_none() && name.ends_with(".parquet")).then(|| (config.to_owned(), split.to_owned()))
    };
    let all: Vec<(String, String, &Sibling)> = listing
        .siblings
        .iter()
        .filter_map(|file| parts(file).map(|(config, split)| (config, split, file)))
        .collect();
    let configs: BTreeSet<&str> = all.iter().map(|(config, ..)| config.as_str()).collect();
    let config = chosen(data, "config", data.config.as_deref(), &configs, "default")?;
    let of_config = || all.iter().filter(|(name, ..)| *name == config);
    let splits: BTreeSet<&str> =
        of_config().map(|(_, split, _)| split.strip_prefix(PARTIAL).unwrap_or(split)).collect();
    let split = chosen(data, "split", data.split.as_deref(), &splits, "train")?;
    let mut files: Vec<Sibling> =
        of_config().filter(|(_, name, _)| *name == split).map(|(_, _, file)| (*file).clone()).collect();
    files.sort_by(|a, b| a.rfilename.cmp(&b.rfilename));
    Ok((!files.is_empty()).then_some(files))
}

/// Returns the name asked for, else the only one, else the usual one.
fn chosen(
    data: &HubData,
    what: &str,
    asked: Option<&str>,
    names: &BTreeSet<&str>,
    usual: &str,
) -> Result<String> {
    let list = || names.iter().take(30).copied().collect::<Vec<_>>().join(", ");
    match (asked, names.len()) {
        (Some(asked), _) if names.contains(asked) => Ok(asked.to_owned()),
        (None, 1) => Ok(names.first().map(|name| (*name).to_owned()).unwrap_or_default()),
        (None, _) if names.contains(usual) => Ok(usual.to_owned()),
        (Some(asked), _) => {
            Err(Fault::config(format!("{data}: there is no {what} {asked:?}; there are {}", list())))
        }
        (None, _) => Err(Fault::config(format!("{data}: the dataset has several {what}s: {}", list()))
            .help(format!("choose one: hf://datasets/{}?{what}=NAME", data.repository))),
    }
}

/// Returns the repository's own files that the path names; without a path, those of the wanted split.
fn own_files(data: &HubData, listing: &Listing, access: Access, report: &Report) -> Result<Vec<Sibling>> {
    let mut files = listing.siblings.clone();
    files.sort_by(|a, b| a.rfilename.cmp(&b.rfilename));
    let name = |file: &Sibling| file.rfilename.clone();
    let path = data.path.trim_end_matches('/');
    if let Some(file) = files.iter().find(|file| file.rfilename == path) {
        return Ok(vec![file.clone()]);
    }
    if path.contains(['*', '?', '[']) {
        return source::matching(files, path, name);
    }
    files.retain(|file| path.is_empty() || file.rfilename.starts_with(&format!("{path}/")));
    if files.is_empty() {
        return Err(Fault::data(format!("{data}: the dataset has no such file or folder"))
            .help("look at the dataset's \"Files\" on the hub"));
    }
    let files = source::of_first_kind(files, name, &data.to_string(), access.source.endings, report)?;
    of_split(data, files, report)
}

/// Leaves out the files of other splits. A file whose name shows no split counts as `train`.
fn of_split(data: &HubData, files: Vec<Sibling>, report: &Report) -> Result<Vec<Sibling>> {
    let wanted = data.split.as_deref().unwrap_or(split::TRAIN);
    let (of_it, others): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|file| split::of(&file.rfilename).unwrap_or(split::TRAIN) == wanted);
    if of_it.is_empty() {
        return Err(Fault::config(format!("{data}: no file has the split {wanted:?} in its name"))
            .help("give the files by path: hf://datasets/OWNER/NAME/PATH"));
    }
    if !others.is_empty() {
        let count = others.len();
        report.note(
            Stage::Download,
            format!("{data}: {count} files belong to other splits than {wanted:?} and are not read"),
        );
    }
    Ok(of_it)
}

fn sources(data: &HubData, commit: &str, files: Vec<Sibling>) -> Result<Vec<Source>> {
    if data.sha256.is_some() && files.len() > 1 {
        return Err(Fault::config(format!(
            "{data}: one sha256 is given, but the dataset has {} files",
            files.len()
        ))
        .help("name each file with its own digest"));
    }
    let hub = Hub::from_environment()?;
    let repository = format!("datasets/{}", data.repository);
    let source = |file: Sibling| {
        let parts: Vec<&str> = ["resolve", commit].into_iter().chain(file.rfilename.split('/')).collect();
        let own = file.lfs.map(|large| large.sha256);
        Source::Url { url: hub::at(&hub, &[], &repository, &parts), sha256: data.sha256.clone().or(own) }
    };
    Ok(files.into_iter().map(source).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let shown = |text: &str| match HubData::parse(text) {
            Ok(data) => format!("{data} {:?} {:?}", data.config, data.split),
            Err(fault) => fault.message,
        };
        for (text, expected) in [
            ("o/n", "hf://datasets/o/n None None"),
            ("o/n?config=a&split=test", "hf://datasets/o/n Some(\"a\") Some(\"test\")"),
            ("o/n@v1/data/*.parquet", "hf://datasets/o/n@v1/data/*.parquet None None"),
            (
                "o/n@refs/convert/parquet/default/train",
                "hf://datasets/o/n@refs/convert/parquet/default/train None None",
            ),
            ("o/n@refs%2Fpr%2F1/a.jsonl", "hf://datasets/o/n@refs/pr/1/a.jsonl None None"),
            ("o/n/data/train-?.parquet", "hf://datasets/o/n/data/train-?.parquet None None"),
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
        for bad in ["", "o", "o/", "../n", "o/n/../../x", "o/n?other=1", "o/n@/a", "o/n#sha256=12"] {
            assert!(HubData::parse(bad).is_err(), "{bad}");
        }
    }

    fn files(names: &[&str]) -> Vec<Sibling> {
        names.iter().map(|name| Sibling { rfilename: (*name).into(), lfs: None }).collect()
    }

    #[test]
    fn configurations_and_splits_are_chosen_and_named() {
        let listing = |names: &[&str]| Listing { sha: "c".repeat(40), siblings: files(names) };
        let chosen = |address: &str, names: &[&str]| match converted(
            &HubData::parse(address).unwrap(),
            &listing(names),
        ) {
            Ok(Some(files)) => files.into_iter().map(|file| file.rfilename).collect::<Vec<_>>().join(" "),
            Ok(None) => "a part".into(),
            Err(fault) => fault.message,
        };
        let two = [
            "a/test/0.parquet",
            "a/train/1.parquet",
            "a/train/0.parquet",
            "b/train/0.parquet",
            ".gitattributes",
        ];
        assert_eq!(chosen("o/n?config=a", &two), "a/train/0.parquet a/train/1.parquet");
        assert_eq!(chosen("o/n?config=a&split=test", &two), "a/test/0.parquet");
        assert_eq!(chosen("o/n", &two), "hf://datasets/o/n: the dataset has several configs: a, b");
        assert_eq!(
            chosen("o/n?config=c", &two),
            "hf://datasets/o/n: there is no config \"c\"; there are a, b"
        );
        assert_eq!(chosen("o/n", &["default/partial-train/0.parquet"]), "a part");
        assert_eq!(chosen("o/n", &["x/only/0.parquet"]), "x/only/0.parquet");
    }

    #[test]
    fn names_tell_splits() {
        let kept = |address: &str, names: &[&str]| {
            let data = HubData::parse(address).unwrap();
            match of_split(&data, files(names), &Report::silent()) {
                Ok(files) => files.into_iter().map(|file| file.rfilename).collect::<Vec<_>>().join(" "),
                Err(fault) => fault.message,
            }
        };
        let all = ["data/train-00000.jsonl", "data/test.jsonl", "dev/a.jsonl", "more.jsonl"];
        assert_eq!(kept("o/n", &all), "data/train-00000.jsonl more.jsonl");
        assert_eq!(kept("o/n?split=validation", &all), "dev/a.jsonl");
        assert_eq!(
            kept("o/n?split=other", &all),
            "hf://datasets/o/n: no file has the split \"other\" in its name"
        );
    }
}
