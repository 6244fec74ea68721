//! Checkpoints: parameters, moments and position, written whole and verified, so that a resumed run ends in the
//! same bytes (on a CPU). The order of the data and dropout follow from seed and step and need no state.
//!
//! A checkpoint is `step-N/{tensors.safetensors, state.json}`, written under a temporary name, synced and renamed.
//! `state.json` holds the SHA-256 of the tensors and a SHA-256 of its own content. A checkpoint that is damaged or
//! belongs to another run is skipped in favour of the one before.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, Result};
use crate::ops::flat;
use crate::report::{Report, Stage};
use crate::whole;

use super::moments::Moments;

const TENSORS: &str = "tensors.safetensors";
const STATE: &str = "state.json";
/// The parameters of the best evaluation, beside the checkpoints that training continues from.
const BEST: &str = "best";
/// LIMIT: a state takes a few hundred bytes.
const STATE_BYTES_MAX: u64 = 1 << 20;
/// LIMIT: names and shapes of tensors take a few hundred bytes.
const HEADER_BYTES_MAX: u64 = 1 << 20;
/// The name of an unfinished checkpoint: `.step-N.partial`.
const PARTIAL_START: &str = ".step-";
const PARTIAL_END: &str = ".partial";

/// The folder of checkpoints, and the run that they must belong to.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// The folder.
    pub folder: PathBuf,
    /// Identifies model, data and options. A checkpoint of another run is not continued.
    pub fingerprint: String,
}

/// The position of training after a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub loss: f64,
    /// Sum of the losses since the last logged line.
    pub window_loss: f64,
    /// Steps since the last logged line.
    pub window_steps: u64,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// The step that the last evaluation followed. A signal can come between a step and its evaluation.
    pub evaluated_step: u64,
    /// The best of the evaluations so far.
    #[serde(default)]
    pub best: super::best::Best,
    /// Whether a loss differed from the first.
    #[serde(default)]
    pub changed: bool,
    /// The values that later steps are compared with to find spikes.
    #[serde(default)]
    pub spikes: super::spike::History,
}

/// The content of `state.json`.
#[derive(Serialize, Deserialize)]
struct Sealed {
    /// Digest of the manifest by `Manifest::seal`.
    sha256: String,
    manifest: Manifest,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    fingerprint: String,
    tensors_sha256: String,
    state: State,
}

impl Manifest {
    /// Returns the digest of all its values. Numbers are written so that they read back to the last bit. So a manifest
    /// that was read has the digest of the written one if and only if nothing in it changed.
    fn seal(&self) -> String {
        crate::source::digest(&serde_json::to_vec(self).expect("numbers and texts"))
    }
}

/// Writes `step-N` and removes the oldest checkpoints beyond `keep_max`. The new one is on disk before any is
/// removed.
pub fn save(
    checkpoints: &Checkpoints,
    state: &State,
    params: &Tensor,
    moments: &Moments,
    keep_max: Option<usize>,
) -> Result<()> {
    let folder = &checkpoints.folder;
    let place = folder.join(format!("step-{}", state.step));
    // The same step again, after a signal right after a restart: the existing checkpoint is whole, and replacing it
    // would risk it.
    let tensors = tensors(params, moments);
    if read(&place, &checkpoints.fingerprint, bytes(&tensors)).is_ok_and(|(of, _)| of == *state) {
        return Ok(());
    }
    let temporary = folder.join(format!("{PARTIAL_START}{}{PARTIAL_END}", state.step));
    let storage = |doing: &'static str| move |error: std::io::Error| Fault::storage(doing, folder, &error);
    remove(&temporary).map_err(storage("clear an unfinished checkpoint in"))?;
    fs::create_dir(&temporary).map_err(storage("create a checkpoint in"))?;
    write(&temporary, &checkpoints.fingerprint, state, &tensors).map_err(storage("write a checkpoint in"))?;
    remove(&place).map_err(storage("replace a checkpoint in"))?;
    fs::rename(&temporary, &place).map_err(storage("finish a checkpoint in"))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(storage("sync"))?;
    // Checkpoints of later steps were skipped when this run started. It does not count or remove them.
    let older: Vec<PathBuf> =
        list(folder).into_iter().filter(|(step, _)| *step < state.step).map(|(_, place)| place).collect();
    let surplus = keep_max.map_or(0, |keep| (older.len() + 1).saturating_sub(keep.max(1)));
    for old in &older[..surplus] {
        remove(old).map_err(storage("remove an old checkpoint in"))?;
    }
    Ok(())
}

/// Writes the parameters of the best evaluation so far in place of those before.
pub fn save_best(checkpoints: &Checkpoints, state: &State, params: &Tensor) -> Result<()> {
    let folder = &checkpoints.folder;
    let (place, temporary) = (folder.join(BEST), folder.join(format!("{PARTIAL_START}{BEST}{PARTIAL_END}")));
    let storage = |error: std::io::Error| Fault::storage("keep the best adapter in", folder, &error);
    remove(&temporary).map_err(storage)?;
    fs::create_dir(&temporary).map_err(storage)?;
    write(&temporary, &checkpoints.fingerprint, state, &[("params", params)]).map_err(storage)?;
    remove(&place).map_err(storage)?;
    fs::rename(&temporary, &place).map_err(storage)?;
    whole::sync_folder(folder)
}

/// Returns the parameters of the best evaluation, if they are those of this run's `step`, and as many as `params`.
pub fn best(checkpoints: &Checkpoints, step: u64, params: &Tensor) -> Option<Tensor> {
    let (place, bytes_max) = (checkpoints.folder.join(BEST), bytes(&[("params", params)]));
    let (state, mut tensors) = read(&place, &checkpoints.fingerprint, bytes_max).ok()?;
    tensors.remove("params").filter(|_| state.step == step)
}

/// Fills an empty folder, and waits until its content is on disk.
fn write(
    folder: &Path,
    fingerprint: &str,
    state: &State,
    tensors: &[(&str, &Tensor)],
) -> std::io::Result<()> {
    let tensors: HashMap<&str, Tensor> =
        tensors.iter().map(|(name, tensor)| (*name, (*tensor).clone())).collect();
    let file = folder.join(TENSORS);
    candle_core::safetensors::save(&tensors, &file)
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    let manifest = Manifest {
        fingerprint: fingerprint.to_owned(),
        tensors_sha256: crate::source::digest(&fs::read(&file)?),
        state: state.clone(),
    };
    let sealed = Sealed { sha256: manifest.seal(), manifest };
    fs::write(folder.join(STATE), serde_json::to_vec_pretty(&sealed).expect("numbers and texts"))?;
    for name in [TENSORS, STATE] {
        File::open(folder.join(name))?.sync_all()?;
    }
    File::open(folder)?.sync_all()
}

/// Removes a folder, a file or a link, but never the target of a link.
fn remove(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Loads the newest whole checkpoint of this run into `params` and `moments`. Damaged ones and those of another run
/// are skipped with a warning. Unfinished ones that killed processes left are removed.
pub fn newest(
    checkpoints: &Checkpoints,
    params: &Tensor,
    moments: &Moments,
    report: &Report,
) -> Result<Option<State>> {
    let folder = &checkpoints.folder;
    remove_partials(folder).map_err(|error| Fault::storage("clear", folder, &error))?;
    let targets = tensors(params, moments);
    for (step, place) in list(folder).into_iter().rev() {
        match read(&place, &checkpoints.fingerprint, bytes(&targets)) {
            Ok((state, found)) if fits(&found, &targets) => {
                targets.iter().try_for_each(|(name, target)| flat::write(target, &found[*name]))?;
                return Ok(Some(state));
            }
            Ok(_) => pass_over(step, "its tensors have other shapes", report),
            Err(what) => pass_over(step, &what, report),
        }
    }
    Ok(None)
}

fn pass_over(step: u64, what: &str, report: &Report) {
    report.warn(Stage::Train, format!("the checkpoint of step {step} is not whole ({what}) and is skipped"));
}

/// Returns the tensors of a checkpoint, by name.
fn tensors<'a>(params: &'a Tensor, moments: &'a Moments) -> Vec<(&'static str, &'a Tensor)> {
    std::iter::once(("params", params)).chain(moments.tensors()).collect()
}

/// Returns the most bytes of a file of such tensors.
fn bytes(tensors: &[(&str, &Tensor)]) -> u64 {
    let values = tensors.iter().map(|(_, tensor)| tensor.elem_count() * tensor.dtype().size_in_bytes());
    values.sum::<usize>() as u64 + HEADER_BYTES_MAX
}

fn fits(found: &HashMap<String, Tensor>, targets: &[(&str, &Tensor)]) -> bool {
    let same = |a: &Tensor, b: &Tensor| a.elem_count() == b.elem_count() && a.dtype() == b.dtype();
    targets.iter().all(|(name, target)| found.get(*name).is_some_and(|found| same(found, target)))
}

fn remove_partials(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PARTIAL_START) && name.ends_with(PARTIAL_END) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Returns the checkpoints of a folder in ascending order of step.
fn list(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let step = |path: PathBuf| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path));
    let mut list: Vec<(u64, PathBuf)> = entries.filter_map(|entry| step(entry.path())).collect();
    list.sort();
    list
}

/// Reads a whole checkpoint of this run, or returns the reason why it is not one.
fn read(
    place: &Path,
    fingerprint: &str,
    bytes_max: u64,
) -> std::result::Result<(State, HashMap<String, Tensor>), String> {
    let sealed: Sealed = serde_json::from_slice(&plain(&place.join(STATE), STATE_BYTES_MAX)?)
        .map_err(|error| error.to_string())?;
    let manifest = sealed.manifest;
    if manifest.seal() != sealed.sha256 {
        return Err("its state file has changed".into());
    }
    if manifest.fingerprint != fingerprint {
        return Err("it belongs to a run with another model, data or options".into());
    }
    let is_best = place.file_name().is_some_and(|name| name == BEST);
    if !is_best && place != place.with_file_name(format!("step-{}", manifest.state.step)) {
        return Err(format!("it belongs to step {}", manifest.state.step));
    }
    let bytes = plain(&place.join(TENSORS), bytes_max)?;
    if crate::source::digest(&bytes) != manifest.tensors_sha256 {
        return Err("its tensors have changed".into());
    }
    let tensors =
        candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| error.to_string())?;
    Ok((manifest.state, tensors))
}

/// Reads a regular file. A pipe would never end, and a link leads out of the checkpoint.
fn plain(file: &Path, bytes_max: u64) -> std::result::Result<Vec<u8>, String> {
    let found = fs::symlink_metadata(file).map_err(|error| error.to_string())?;
    match found.is_file() && found.len() <= bytes_max {
        true => fs::read(file).map_err(|error| error.to_string()),
        false => Err(format!("{} is not a regular file of a plausible size", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::adamw;

    fn filled(value: f32) -> (Tensor, Moments) {
        let tensor = |value: f32| Tensor::full(value, 5, &Device::Cpu).unwrap();
        let moments = adamw::Moments { first: tensor(value + 1.0), second: tensor(value + 2.0) };
        (tensor(value), Moments::Full(moments))
    }

    fn folder_of(steps: std::ops::RangeInclusive<u64>) -> (tempfile::TempDir, Checkpoints) {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints { folder: folder.path().into(), fingerprint: "a".into() };
        for step in steps {
            put(&checkpoints, step, None);
        }
        (folder, checkpoints)
    }

    fn put(checkpoints: &Checkpoints, step: u64, keep_max: Option<usize>) {
        let (params, moments) = filled(step as f32);
        let state = State { step, loss: 0.1 + step as f64 / 3.0, ..State::default() };
        save(checkpoints, &state, &params, &moments, keep_max).unwrap();
    }

    /// Returns the step after which a new start would continue.
    fn found(checkpoints: &Checkpoints) -> Option<u64> {
        let (params, moments) = filled(0.0);
        let state = newest(checkpoints, &params, &moments, &Report::silent()).unwrap()?;
        let step = state.step as f32;
        assert_eq!(params.to_vec1::<f32>().unwrap(), [step; 5]);
        assert_eq!(moments.tensors()[1].1.to_vec1::<f32>().unwrap(), [step + 2.0; 5]);
        Some(state.step)
    }

    fn steps(checkpoints: &Checkpoints) -> Vec<u64> {
        list(&checkpoints.folder).into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn the_best_parameters_are_those_of_their_step_and_no_checkpoint() {
        let (folder, checkpoints) = folder_of(1..=3);
        for step in [1, 2] {
            save_best(&checkpoints, &State { step, ..State::default() }, &filled(step as f32).0).unwrap();
        }
        put(&checkpoints, 4, Some(1));
        assert_eq!((steps(&checkpoints), found(&checkpoints)), (vec![4], Some(4)), "the best is not counted");
        let params = filled(0.0).0;
        let kept = best(&checkpoints, 2, &params).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(kept, [2.0; 5]);
        assert!(best(&checkpoints, 1, &params).is_none(), "it is of another step");
        let other = Checkpoints { fingerprint: "b".into(), ..checkpoints.clone() };
        assert!(best(&other, 2, &params).is_none(), "it is of another run");
        fs::write(folder.path().join(BEST).join(STATE), "{").unwrap();
        assert!(best(&checkpoints, 2, &params).is_none());
    }

    #[test]
    fn moments_in_8_bits_come_back_and_are_not_taken_for_others() {
        use crate::ops::adamw_8bit::{self, Matrix};
        let (_folder, checkpoints) = folder_of(1..=1);
        let params = Tensor::zeros(5000, DType::F32, &Device::Cpu).unwrap();
        let empty = || {
            let whole = vec![Matrix { values: 0..5000, faster: false }];
            Moments::EightBit(adamw_8bit::Moments::zeros(&params, whole).unwrap())
        };
        let (written, read) = (empty(), empty());
        for (i, (_, tensor)) in written.tensors().into_iter().enumerate() {
            let filled = (tensor.ones_like().unwrap() * (i as f64 + 3.0)).unwrap();
            flat::write(tensor, &filled).unwrap();
        }
        let newest = |moments| newest(&checkpoints, &params, moments, &Report::silent()).unwrap();
        assert_eq!(newest(&read), None, "the checkpoint of step 1 has other moments");
        let state = State { step: 2, ..State::default() };
        save(&checkpoints, &state, &params, &written, None).unwrap();
        assert_eq!(newest(&read), Some(state));
        for ((_, a), (_, b)) in written.tensors().into_iter().zip(read.tensors()) {
            assert_eq!(crate::ops::cpu::to_f64(a).unwrap(), crate::ops::cpu::to_f64(b).unwrap());
        }
    }

    #[test]
    fn the_newest_whole_checkpoint_is_continued() {
        let (folder, checkpoints) = folder_of(1..=3);
        assert_eq!(found(&checkpoints), Some(3));
        let file = folder.path().join("step-3").join(TENSORS);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(found(&checkpoints), Some(2));
    }

    /// Flips each bit of the state, one at a time: the run continues from the written state or from the checkpoint
    /// before.
    #[test]
    fn no_flipped_bit_of_a_state_is_believed() {
        let (folder, checkpoints) = folder_of(1..=2);
        let file = folder.path().join("step-2").join(STATE);
        let bytes = fs::read(&file).unwrap();
        let whole = read(&folder.path().join("step-2"), "a", 1 << 20).unwrap().0;
        let mut passed_over = 0;
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, flipped).unwrap();
            match read(&folder.path().join("step-2"), "a", 1 << 20) {
                Ok((state, _)) => assert_eq!(state, whole, "bit {bit}"),
                Err(_) => passed_over += 1,
            }
        }
        assert!(passed_over > bytes.len() * 4, "only white space may change: {passed_over}");
        fs::write(&file, String::from_utf8(bytes).unwrap().replace("\"step\": 2", "\"step\": 16")).unwrap();
        assert_eq!(found(&checkpoints), Some(1));
    }

    #[test]
    fn what_another_run_or_nobody_wrote_is_passed_over() {
        use std::os::unix::fs::symlink;
        let (folder, checkpoints) = folder_of(1..=2);
        let other = Checkpoints { fingerprint: "b".into(), ..checkpoints.clone() };
        put(&other, 7, None);
        fs::create_dir(folder.path().join("step-8")).unwrap();
        fs::write(folder.path().join("step-9"), "").unwrap();
        symlink(folder.path().join("step-2"), folder.path().join("step-10")).unwrap();
        assert_eq!(found(&checkpoints), Some(2));
        assert_eq!(found(&Checkpoints { fingerprint: "c".into(), ..checkpoints.clone() }), None);
        // None of them is counted or removed, unless its own step comes.
        put(&checkpoints, 3, Some(1));
        assert_eq!(steps(&checkpoints), [3, 7, 8, 9, 10]);
        put(&checkpoints, 10, Some(2));
        assert_eq!(steps(&checkpoints), [9, 10]);
        assert_eq!(found(&checkpoints), Some(10));
    }

    #[test]
    fn tensors_of_another_shape_type_or_number_are_no_checkpoint() {
        let (folder, checkpoints) = folder_of(1..=1);
        let state = State { step: 2, ..State::default() };
        let tensor = |count: usize, dtype| Tensor::zeros(count, dtype, &Device::Cpu).unwrap();
        let place = folder.path().join("step-2");
        for (odd, count, dtype) in [
            ("params", 4, DType::F32),
            ("first", 6, DType::F32),
            ("second", 5, DType::F64),
            ("none of the three", 5, DType::F32),
        ] {
            let mut tensors: Vec<(&str, Tensor)> =
                ["params", "first", "second"].map(|name| (name, tensor(5, DType::F32))).into();
            let at = tensors.iter().position(|(name, _)| *name == odd).unwrap_or(1);
            tensors[at] = (odd, tensor(count, dtype));
            let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
            remove(&place).unwrap();
            fs::create_dir(&place).unwrap();
            write(&place, "a", &state, &named).unwrap();
            assert_eq!(found(&checkpoints), Some(1), "{odd} of {count} {dtype:?}");
        }
    }

    #[test]
    fn a_checkpoint_under_another_steps_name_is_passed_over() {
        let (folder, checkpoints) = folder_of(1..=2);
        fs::rename(folder.path().join("step-2"), folder.path().join("step-7")).unwrap();
        assert_eq!(found(&checkpoints), Some(1));
    }

    /// White space changes only the size.
    #[test]
    fn a_state_is_read_up_to_a_plausible_size() {
        let (folder, checkpoints) = folder_of(1..=2);
        let file = folder.path().join("step-2").join(STATE);
        let text = fs::read(&file).unwrap();
        for (bytes, expected) in [(STATE_BYTES_MAX, 2), (STATE_BYTES_MAX + 1, 1)] {
            let mut padded = text.clone();
            padded.resize(bytes as usize, b' ');
            fs::write(&file, padded).unwrap();
            assert_eq!(found(&checkpoints), Some(expected), "{bytes} bytes");
        }
    }

    /// A whole checkpoint of the same state stays as it is; one of another state is replaced. However few are to be
    /// kept, the new one is.
    #[test]
    fn the_same_step_again_is_written_only_if_it_differs() {
        use std::os::unix::fs::MetadataExt;
        let (folder, checkpoints) = folder_of(1..=2);
        let file = || fs::metadata(folder.path().join("step-2").join(TENSORS)).unwrap().ino();
        let first = file();
        put(&checkpoints, 2, None);
        assert_eq!(file(), first);
        let (params, moments) = filled(2.0);
        let other = State { step: 2, loss: 9.0, ..State::default() };
        save(&checkpoints, &other, &params, &moments, Some(0)).unwrap();
        let read = newest(&checkpoints, &params, &moments, &Report::silent()).unwrap();
        assert_eq!((read, steps(&checkpoints)), (Some(other), vec![2]));
    }

    /// A file of gigabytes in a checkpoint's place is not read: it has no room in memory.
    #[test]
    fn tensors_of_an_absurd_size_are_passed_over_unread() {
        let (folder, checkpoints) = folder_of(1..=2);
        let file = File::options().write(true).open(folder.path().join("step-2").join(TENSORS)).unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(found(&checkpoints), Some(1));
    }

    #[test]
    fn only_unfinished_checkpoints_are_collected() {
        let (folder, checkpoints) = folder_of(1..=1);
        for name in [".step-notes", "thesis.partial", ".step-3.partial"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        assert_eq!(found(&checkpoints), Some(1));
        let left = |name: &str| folder.path().join(name).exists();
        assert_eq!([".step-notes", "thesis.partial", ".step-3.partial"].map(left), [true, true, false]);
    }

    #[test]
    fn the_last_good_checkpoint_is_never_removed() {
        let (folder, checkpoints) = folder_of(1..=1);
        for step in 2..=9 {
            // The checkpoint before is damaged, so the new one must not be the only one that is relied on.
            fs::write(folder.path().join(format!("step-{}", step - 1)).join(STATE), "{").unwrap();
            put(&checkpoints, step, Some(1));
            assert_eq!((steps(&checkpoints), found(&checkpoints)), (vec![step], Some(step)));
        }
    }

    /// The warnings of a start.
    #[derive(Default)]
    struct Heard(std::sync::Mutex<Vec<String>>);

    impl crate::report::Sink for Heard {
        fn event(&self, event: &crate::report::Event) {
            self.0.lock().unwrap().push(format!("{event:?}"));
        }
        fn progress(&self, _: &crate::report::Progress) {}
    }

    #[test]
    fn a_checkpoint_that_is_passed_over_is_told_with_its_reason() {
        let (folder, checkpoints) = folder_of(1..=2);
        fs::write(folder.path().join("step-2").join(TENSORS), "cut").unwrap();
        let heard = std::sync::Arc::new(Heard::default());
        let (params, moments) = filled(0.0);
        newest(&checkpoints, &params, &moments, &Report::new(heard.clone())).unwrap().unwrap();
        let heard = heard.0.lock().unwrap();
        assert_eq!(heard.len(), 1, "{heard:?}");
        assert!(heard[0].contains("step 2 is not whole (its tensors have changed)"), "{heard:?}");
    }

    /// A file that cannot be removed is reported, never taken for removed.
    #[test]
    fn only_what_is_not_there_counts_as_removed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        remove(&file.path().with_file_name("no such file")).unwrap();
        assert_eq!(
            remove(&file.path().join("below a file")).unwrap_err().kind(),
            std::io::ErrorKind::NotADirectory
        );
    }

    #[test]
    fn a_tensor_file_is_read_up_to_the_bytes_of_its_values_and_a_header() {
        let (params, moments) = filled(0.0);
        assert_eq!(bytes(&tensors(&params, &moments)), 3 * 5 * 4 + HEADER_BYTES_MAX);
    }

    #[test]
    fn leftovers_are_collected_and_planted_links_are_not_followed() {
        use std::os::unix::fs::symlink;
        let (folder, checkpoints) = folder_of(1..=1);
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("precious"), "x").unwrap();
        fs::create_dir(folder.path().join(".step-5.partial")).unwrap();
        symlink(outside.path(), folder.path().join(".step-6.partial")).unwrap();
        fs::write(folder.path().join(".step-7.partial"), "a file").unwrap();
        assert_eq!(found(&checkpoints), Some(1));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        symlink(outside.path(), folder.path().join(".step-2.partial")).unwrap();
        symlink(outside.path(), folder.path().join("step-2")).unwrap();
        put(&checkpoints, 2, None);
        assert_eq!(found(&checkpoints), Some(2));
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
