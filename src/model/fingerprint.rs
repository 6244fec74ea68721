//! The weights that a rank reads -> digests by part, which the ranks compare before they train.
//!
//! A rank that reads a layer digests all bytes of it. Of a layer that another rank reads, it digests samples: the
//! beginning, the middle and the end of each tensor. So ranks notice that they have different models, or a copy that is
//! not whole, although none of them reads everything.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::source;

use super::weights::{Checkpoint, Raw, beside_language, language_name};

/// Bytes that one task digests.
const CHUNK_BYTES: usize = 8 << 20;
/// Bytes of a sample.
const SAMPLE_BYTES: usize = 4 << 10;

/// Digests of the parts of a model, by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Parts of which every byte was read.
    whole: BTreeMap<String, String>,
    /// Samples of all parts.
    samples: BTreeMap<String, String>,
    /// Bytes of the parts that were read.
    pub bytes: u64,
}

impl Fingerprint {
    /// Adds a part. `is_read` says whether this rank reads all of it.
    pub(super) fn add(&mut self, checkpoint: &Checkpoint, part: &Part, is_read: bool) {
        let (mut whole, mut samples) = (String::new(), String::new());
        let without = part.without.map(language_name);
        let is_other = |name: &str| without.as_ref().is_some_and(|begin| name.starts_with(&**begin));
        let of_part = |name: &str| !beside_language(name) && !is_other(name);
        for (name, raw) in checkpoint.under(part.prefix).filter(|(name, _)| of_part(name)) {
            samples += &line(name, &raw, &sampled(raw.bytes));
            if is_read {
                whole += &line(name, &raw, &digest(raw.bytes));
                self.bytes += raw.bytes.len() as u64;
            }
        }
        self.samples.insert(part.name.clone(), source::digest(samples.as_bytes()));
        if is_read {
            self.whole.insert(part.name.clone(), source::digest(whole.as_bytes()));
        }
    }

    /// Returns the first part that two ranks have both looked at, and that differs.
    pub fn difference<'a>(&'a self, other: &Fingerprint) -> Option<&'a str> {
        let differs = |own: &'a BTreeMap<String, String>, other: &BTreeMap<String, String>| {
            let both =
                own.iter().filter(|(part, digest)| other.get(*part).is_some_and(|other| other != *digest));
            both.map(|(part, _)| part.as_str()).next()
        };
        differs(&self.samples, &other.samples).or_else(|| differs(&self.whole, &other.whole))
    }
}

/// The tensors that a part has.
pub(super) struct Part<'a> {
    /// The part's name in messages.
    pub name: String,
    /// The beginnings of its tensors' names.
    pub prefix: &'a str,
    /// The beginnings of names that are no part of it.
    pub without: Option<&'a str>,
}

fn line(name: &str, raw: &Raw, digest: &str) -> String {
    format!("{name} {:?} {:?} {digest}\n", raw.dtype, raw.shape)
}

/// Returns a digest of all bytes, on all cores.
fn digest(bytes: &[u8]) -> String {
    let chunks: Vec<String> = bytes.par_chunks(CHUNK_BYTES).map(source::digest).collect();
    source::digest(chunks.concat().as_bytes())
}

fn sampled(bytes: &[u8]) -> String {
    if bytes.len() <= 3 * SAMPLE_BYTES {
        return source::digest(bytes);
    }
    let middle = bytes.len() / 2;
    let places = [0, middle, bytes.len() - SAMPLE_BYTES];
    source::digest(&places.map(|at| &bytes[at..at + SAMPLE_BYTES]).concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    const LAYERS: [&str; 2] = ["model.layers.0.", "model.layers.1."];

    /// Returns a checkpoint of two layers and an embedding, with one byte changed.
    fn checkpoint(folder: &std::path::Path, changed: Option<(&str, usize)>) -> Checkpoint {
        let bytes = |name: &str| {
            let mut bytes: Vec<u8> = (0..40_000u32).map(|i| (i * 7 % 251) as u8).collect();
            if let Some((_, at)) = changed.filter(|(changed, _)| *changed == name) {
                bytes[at] ^= 1;
            }
            bytes
        };
        let names = ["model.layers.0.w", "model.layers.1.w", "model.layers.10.w", "model.embed"];
        let all: Vec<(&str, Vec<u8>)> = names.iter().map(|name| (*name, bytes(name))).collect();
        let views = all
            .iter()
            .map(|(name, bytes)| (*name, TensorView::new(Dtype::F32, vec![10_000], bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        Checkpoint::open(folder).unwrap()
    }

    /// Returns the fingerprint of a rank that reads one of the layers, or both.
    fn fingerprint(changed: Option<(&str, usize)>, reads: &[usize]) -> Fingerprint {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(folder.path(), changed);
        let mut found = Fingerprint::default();
        for (layer, prefix) in LAYERS.iter().enumerate() {
            let part = Part { name: format!("layer {layer}"), prefix, without: None };
            found.add(&checkpoint, &part, reads.contains(&layer));
        }
        let rest = Part { name: "the rest".into(), prefix: "", without: Some("model.layers.") };
        found.add(&checkpoint, &rest, true);
        found
    }

    #[test]
    fn what_two_ranks_have_read_is_compared_in_full() {
        let same = fingerprint(None, &[0, 1]);
        assert_eq!(same.difference(&fingerprint(None, &[1])), None);
        assert_eq!(same.bytes, 120_000);
        // Far from all samples.
        for (name, part) in [("model.layers.1.w", "layer 1"), ("model.embed", "the rest")] {
            let other = fingerprint(Some((name, 9_000)), &[0, 1]);
            assert_eq!(same.difference(&other), Some(part));
            assert_eq!(other.difference(&fingerprint(None, &[0])).is_some(), part == "the rest");
        }
        assert_eq!(same.difference(&fingerprint(Some(("model.layers.10.w", 0)), &[0, 1])), None);
    }

    #[test]
    fn what_one_rank_has_read_is_compared_in_samples() {
        for at in [0, 20_001, 39_999] {
            let other = fingerprint(Some(("model.layers.0.w", at)), &[1]);
            assert_eq!(fingerprint(None, &[0]).difference(&other), Some("layer 0"));
        }
    }
}
