//! Names of two base models -> whether they are the same: an adapter's image names the base that it was trained over.

use std::collections::BTreeSet;

use crate::facts::presets;
use crate::fault::{Fault, Result};

/// The result of comparing an adapter's base with the served one.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// One name at least is the same.
    Same,
    /// A name is one of a folder, which says too little.
    Unknown,
    /// Both are known by name, and the names differ.
    Another,
}

/// Compares the names of the base in an image's annotations with the names of the served base.
pub fn compare(annotated: &[String], served: &[String]) -> Verdict {
    let (theirs, ours) = (names(annotated), names(served));
    if annotated.is_empty() || theirs.intersection(&ours).next().is_some() {
        return Verdict::Same;
    }
    match annotated.iter().any(|name| is_known(name)) && served.iter().any(|name| is_known(name)) {
        true => Verdict::Another,
        false => Verdict::Unknown,
    }
}

/// Refuses another base; gives a warning if the names say too little.
///
/// # Errors
/// Config: the adapter's image names another base.
pub fn check(source: &str, annotated: &[String], served: &[String]) -> Result<Option<String>> {
    let said = format!("the adapter {source} was trained over {}", annotated.join(", "));
    match compare(annotated, served) {
        Verdict::Same => Ok(None),
        Verdict::Unknown => Ok(Some(format!(
            "{said}, and the served base is called {}: hone cannot tell from these names if they are the same model; \
             it compared only names and shapes of the tensors",
            served.join(", ")
        ))),
        Verdict::Another => Err(Fault::config(format!(
            "{said}, and the served base is {}",
            served.join(", ")
        ))
        .help(
            "serve the base that the image's annotation names; if it is the same model under another name, \
                 give that name with --name",
        )),
    }
}

/// Warns if the configuration of an adapter names another base. It is no refusal: a base has other names too, such as
/// that of a copy that is quantised already.
pub fn warning(source: &str, configured: &str, served: &[String]) -> Option<String> {
    let another = compare(&[configured.to_owned()], served) == Verdict::Another;
    another.then(|| {
        format!(
            "the adapter {source} names {configured} as its base, and the served base is {}: names and shapes of the \
             tensors fit; if they are different models, answers will be wrong",
            served.join(", ")
        )
    })
}

/// Returns whether a name is one of the hub's or KAITO's, and not only that of a folder.
fn is_known(name: &str) -> bool {
    let plain = plain(name);
    let scheme = name.starts_with("hf://") || name.starts_with("oci://");
    let hub = plain.matches('/').count() == 1 && !name.starts_with(['/', '.', '~']);
    scheme || hub || presets::find(&plain).is_ok()
}

/// Returns all forms of the names, in lower case.
fn names(list: &[String]) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for name in list {
        let plain = plain(name);
        let last = plain.rsplit('/').next().unwrap_or(&plain).to_owned();
        // KAITO's images of presets are called `kaito-phi-4`.
        let preset = last.strip_prefix("kaito-").unwrap_or(&last).to_owned();
        for name in [&plain, &preset] {
            if let Ok(preset) = presets::find(name) {
                all.insert(preset.name.to_lowercase());
            }
        }
        all.insert(last);
    }
    all
}

/// Returns a name without scheme, revision, tag and digest; in lower case.
fn plain(name: &str) -> String {
    let lower = name.trim().trim_end_matches('/').to_lowercase();
    let rest = ["hf://", "oci://", "preset:"].iter().find_map(|scheme| lower.strip_prefix(scheme));
    let rest = rest.unwrap_or(&lower);
    let rest = rest.split('@').next().unwrap_or(rest);
    match rest.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') => before.to_owned(),
        _ => rest.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_compared_by_every_name_they_have() {
        let told = |annotated: &[&str], served: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|name| name.to_string()).collect::<Vec<_>>();
            compare(&owned(annotated), &owned(served))
        };
        let same = [
            (&["microsoft/Phi-4"][..], &["hf://microsoft/phi-4@main"][..]),
            (&["phi-4"], &["kaito-phi-4"]),
            (&["falcon-7b"], &["hf://tiiuae/falcon-7b@ec89142b67d748a1865ea4451372db8313ada0d8"]),
            (&["phi-4"], &["oci://mcr.microsoft.com/aks/kaito/kaito-phi-4:0.2.0"]),
            (&["org/Model-7B"], &["/models/model-7b"]),
            (&["base", "org/m"], &["/x/other", "m"]),
            (&[], &["anything"]),
        ];
        for (annotated, served) in same {
            assert_eq!(told(annotated, served), Verdict::Same, "{annotated:?} {served:?}");
        }
        assert_eq!(told(&["microsoft/phi-4"], &["hf://tiiuae/falcon-7b@main"]), Verdict::Another);
        assert_eq!(told(&["phi-4"], &["falcon-7b"]), Verdict::Another);
        assert_eq!(told(&["microsoft/phi-4"], &["/models/base"]), Verdict::Unknown);
        assert_eq!(told(&["base"], &["org/m"]), Verdict::Unknown);
        assert_eq!(told(&["microsoft/phi-4"], &["models/of/mine/base"]), Verdict::Unknown);
    }

    #[test]
    fn a_configuration_that_names_another_base_is_told() {
        let told = |configured: &str, served: &str| warning("./a", configured, &[served.to_owned()]);
        let text = told("org/phi-4-bnb-4bit", "hf://microsoft/phi-4@main").expect("the names differ");
        assert!(text.contains("org/phi-4-bnb-4bit") && text.contains("hf://microsoft/phi-4@main"), "{text}");
        for (configured, served) in
            [("microsoft/phi-4", "preset:phi-4"), ("/models/base", "org/m"), ("", "org/m"), ("org/m", "./x")]
        {
            assert_eq!(told(configured, served), None, "{configured} {served}");
        }
    }
}
