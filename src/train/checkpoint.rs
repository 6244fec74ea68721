//! Checkpoints: parameters, moments and position, written whole and verified, so that a continued run ends in
//! the same bytes (on a CPU). The data's order and dropout follow from seed and step, so they need no state.
//!
//! `step-N/{tensors.safetensors, state.json}`: written under a temporary name, synced, renamed. `state.json`
//! holds the tensors' SHA-256; a checkpoint that does not match it is passed over for the one before.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Result};
use crate::ops::adamw::Moments;
use crate::ops::flat;
use crate::report::{Report, Stage};

use super::Checkpoints;

const TENSORS: &str = "tensors.safetensors";
const STATE: &str = "state.json";

/// Where training stands after a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub step: u64,
    pub tokens: u64,
    pub first_loss: Option<f64>,
    /// Of the last step.
    pub loss: f64,
    /// Since the last logged line.
    pub window_loss: f64,
    pub window_steps: u64,
    /// Of the last evaluation, and the step it followed: a signal can come between step and evaluation.
    pub eval_loss: Option<f64>,
    pub evaluated_step: u64,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    fingerprint: String,
    tensors_sha256: String,
    state: State,
}

/// Writes `step-N` and removes the oldest beyond `keep_max`; the new one is safe before anything is removed.
pub fn save(
    checkpoints: &Checkpoints,
    state: &State,
    params: &Tensor,
    moments: &Moments,
    keep_max: Option<usize>,
) -> Result<()> {
    let folder = &checkpoints.folder;
    let place = folder.join(format!("step-{}", state.step));
    // The same step again (a signal right after a restart): what is there is whole, and replacing it would risk it.
    if read(&place, &checkpoints.fingerprint).is_ok_and(|found| found.is_some_and(|(of, _)| of == *state)) {
        return Ok(());
    }
    let temporary = folder.join(format!(".step-{}.partial", state.step));
    let storage = |doing: &'static str| move |error: std::io::Error| Fault::storage(doing, folder, &error);
    if temporary.exists() {
        fs::remove_dir_all(&temporary).map_err(storage("clear an unfinished checkpoint in"))?;
    }
    fs::create_dir_all(&temporary).map_err(storage("create a checkpoint in"))?;
    let tensors = HashMap::from([
        ("params", params.clone()),
        ("first", moments.first.clone()),
        ("second", moments.second.clone()),
    ]);
    let file = temporary.join(TENSORS);
    candle_core::safetensors::save(&tensors, &file)
        .map_err(|error| storage("write a checkpoint in")(std::io::Error::other(error.to_string())))?;
    let manifest = Manifest {
        fingerprint: checkpoints.fingerprint.clone(),
        tensors_sha256: sha256(&file).map_err(storage("read a checkpoint in"))?,
        state: state.clone(),
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("numbers and texts");
    fs::write(temporary.join(STATE), text).map_err(storage("write a checkpoint in"))?;
    sync(&temporary).map_err(storage("sync a checkpoint in"))?;
    if place.exists() {
        fs::remove_dir_all(&place).map_err(storage("replace a checkpoint in"))?;
    }
    fs::rename(&temporary, &place).map_err(storage("finish a checkpoint in"))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(storage("sync"))?;
    let surplus = keep_max.map_or(0, |keep| list(folder).len().saturating_sub(keep.max(1)));
    for (_, old) in list(folder).into_iter().take(surplus) {
        fs::remove_dir_all(old).map_err(storage("remove an old checkpoint in"))?;
    }
    Ok(())
}

/// Loads the newest whole checkpoint of this run into `params` and `moments`. Damaged ones are passed over;
/// one of another run is a fault, since continuing or overwriting it would both be wrong.
pub fn newest(
    checkpoints: &Checkpoints,
    params: &Tensor,
    moments: &Moments,
    report: &Report,
) -> Result<Option<State>> {
    for (step, place) in list(&checkpoints.folder).into_iter().rev() {
        match read(&place, &checkpoints.fingerprint) {
            Ok(Some((state, tensors))) => {
                for (name, target) in
                    [("params", params), ("first", &moments.first), ("second", &moments.second)]
                {
                    flat::write(target, &tensors[name])?;
                }
                return Ok(Some(state));
            }
            Ok(None) => {
                return Err(Fault::config(format!(
                    "{} holds a checkpoint of another run (other model, data or options)",
                    place.display()
                ))
                .help("use another output folder, or remove this one to begin anew"));
            }
            Err(what) => report
                .warn(Stage::Train, format!("checkpoint of step {step} is not whole ({what}); passed over")),
        }
    }
    Ok(None)
}

/// Checkpoints in ascending order of step.
fn list(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let step = |path: PathBuf| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path));
    let mut list: Vec<(u64, PathBuf)> = entries.filter_map(|entry| step(entry.path())).collect();
    list.sort();
    list
}

type Read = Option<(State, HashMap<String, Tensor>)>;

/// `None`: whole, but of another run.
fn read(place: &Path, fingerprint: &str) -> std::result::Result<Read, String> {
    let text = fs::read(place.join(STATE)).map_err(|error| error.to_string())?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    if manifest.fingerprint != fingerprint {
        return Ok(None);
    }
    let file = place.join(TENSORS);
    if sha256(&file).map_err(|error| error.to_string())? != manifest.tensors_sha256 {
        return Err("its bytes changed".into());
    }
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).map_err(|error| error.to_string())?;
    Ok(Some((manifest.state, tensors)))
}

fn sha256(file: &Path) -> std::io::Result<String> {
    Ok(crate::source::digest(&fs::read(file)?))
}

fn sync(folder: &Path) -> std::io::Result<()> {
    for name in [TENSORS, STATE] {
        File::open(folder.join(name))?.sync_all()?;
    }
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(value: f32) -> (Tensor, Moments) {
        let tensor = |value: f32| Tensor::full(value, 5, &Device::Cpu).unwrap();
        (tensor(value), Moments { first: tensor(value + 1.0), second: tensor(value + 2.0) })
    }

    #[test]
    fn the_newest_whole_checkpoint_is_continued_and_another_runs_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints { folder: folder.path().into(), fingerprint: "a".into() };
        for step in 1..=3u64 {
            let (params, moments) = filled(step as f32);
            let state = State { step, ..State::default() };
            save(&checkpoints, &state, &params, &moments, Some(2)).unwrap();
        }
        assert_eq!(list(folder.path()).iter().map(|(step, _)| *step).collect::<Vec<_>>(), [2, 3]);
        let (params, moments) = filled(0.0);
        let load = |checkpoints: &Checkpoints| newest(checkpoints, &params, &moments, &Report::silent());
        assert_eq!(load(&checkpoints).unwrap().unwrap().step, 3);
        assert_eq!(params.to_vec1::<f32>().unwrap(), [3.0; 5]);
        assert_eq!(moments.second.to_vec1::<f32>().unwrap(), [5.0; 5]);
        // A flipped byte in the newest: the one before is taken.
        let file = folder.path().join("step-3").join(TENSORS);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(load(&checkpoints).unwrap().unwrap().step, 2);
        let other = Checkpoints { fingerprint: "b".into(), ..checkpoints };
        assert!(load(&other).unwrap_err().message.contains("another run"));
    }
}
