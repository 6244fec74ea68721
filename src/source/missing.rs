//! A path at which there is nothing -> the remedy. The text may be meant as an address or as several paths.

use std::path::Path;

/// The remedy for a path that is wrong, or not mounted.
pub const LOOK: &str = "check the path and, in a container, the mount";

/// Returns the remedy for a path at which there is nothing.
pub fn remedy(text: &str) -> String {
    let is_there = |path: &str| !path.is_empty() && Path::new(path).exists();
    if let Some((path, _)) = text.rsplit_once('#').filter(|(path, _)| is_there(path)) {
        return format!(
            "{path} is there, but the text behind `#` is no setting: write sha256=, layout=, weight=, limit= or name="
        );
    }
    if let Some((first, _)) = text.split_once([',', ' ']).filter(|(first, _)| is_there(first)) {
        return format!("{first} is there: repeat --data for each file, or write a list in YAML");
    }
    if let Some(dataset) = hub_dataset(text) {
        return format!("{LOOK}; if it is a dataset of the Hugging Face hub, write hf://datasets/{dataset}");
    }
    match begins_as_address(text) {
        true => format!("{LOOK}; an address begins with https://, hf://datasets/, s3://, gs:// or az://"),
        false => LOOK.into(),
    }
}

/// Returns OWNER/NAME of a text that is a dataset of the hub with parts of its address missing, or the address of its
/// page.
pub fn hub_dataset(text: &str) -> Option<String> {
    let page = text.split_once("huggingface.co/datasets/").map(|(_, dataset)| dataset);
    let mut parts = page.unwrap_or(text).split('/');
    let (owner, name, rest) = (parts.next()?, parts.next()?, parts.next());
    let is_plain = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(known)
    };
    // A name with a dot is a file's.
    let fits = page.is_some() || (rest.is_none() && !name.contains('.') && !owner.contains('.'));
    (fits && is_plain(owner) && is_plain(name)).then(|| format!("{owner}/{name}"))
}

/// Returns whether the text begins with a host or with a scheme: `host.org/...`, `localhost:80/...`, `s3:/...`.
fn begins_as_address(text: &str) -> bool {
    let Some((first, _)) = text.split_once('/') else { return false };
    let is_host = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    let is_named = ["http", "https"].contains(&first);
    is_named || (!first.starts_with('.') && first.contains(['.', ':']) && first.chars().all(is_host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rows.csv").display().to_string();
        std::fs::write(&file, "a").unwrap();
        let hub = "hf://datasets/tatsu-lab/alpaca";
        for (text, told) in [
            ("tatsu-lab/alpaca", hub),
            ("huggingface.co/datasets/tatsu-lab/alpaca/viewer", hub),
            ("host.org/rows.csv", "an address begins with"),
            ("127.0.0.1:8000/rows.csv", "an address begins with"),
            ("s3:/bucket/rows.csv", "an address begins with"),
            ("https//host/rows.csv", "an address begins with"),
            (&format!("{file}#limt=2"), "is no setting: write sha256="),
            (&format!("{file},other.csv"), "repeat --data for each file"),
            (&format!("{file} other.csv"), "repeat --data for each file"),
        ] {
            assert!(remedy(text).contains(told), "{text}: {}", remedy(text));
        }
        let page = "https://huggingface.co/datasets/tatsu-lab/alpaca";
        assert_eq!(hub_dataset(page).as_deref(), Some("tatsu-lab/alpaca"));
        assert_eq!(hub_dataset("https://host/datasets/tatsu-lab/alpaca"), None);
        for plain in
            ["rows.csv", "data/rows.csv", "./a/b", "../a", "/mnt/data", "a/b/c", "", "#", ",", "no such"]
        {
            assert_eq!(remedy(plain), LOOK, "{plain}");
        }
    }
}
