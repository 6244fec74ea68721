//! A file of lines with numbers (`metrics.jsonl`, `timeline.jsonl`) -> the points of each name, and the lines of
//! evaluations.
//!
//! The folder may come from anybody. The kept values are bounded for all contents of its files: numbers of known size,
//! and few texts.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::story::machines;
use crate::fault::Fault;
use crate::plain;

/// LIMIT: bytes of a file. A line of metrics has some 120 bytes; a million logged steps fit.
const FILE_BYTES_MAX: u64 = 128 << 20;
/// LIMIT: bytes of a line, and of all lines of evaluations.
const LINE_BYTES_MAX: u64 = 64 << 10;
const EVALUATION_BYTES_MAX: usize = 8 << 20;
/// LIMIT: names, and points of all of them.
const NAMES_MAX: usize = 256;
const POINTS_MAX: usize = 8 << 20;

/// The numbers of a file.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    points: BTreeMap<String, Vec<(f64, f64)>>,
    /// Lines with a loss of an evaluation.
    pub evaluations: Vec<Map<String, Json>>,
    /// Number of all such lines, of which those above are the first.
    pub evaluations_told: usize,
    /// The reason why the machine failed to read the file to its end.
    pub unread: Option<Fault>,
}

impl Measured {
    /// Reads a file; one that cannot be read is as good as empty, and lines that are no objects are passed over.
    pub fn read(path: &Path) -> Measured {
        let mut found = Measured::default();
        let file = match plain::open(path) {
            Ok(file) => file,
            Err(error) => return Measured { unread: machines(path, &error), ..found },
        };
        let mut reader = BufReader::new(file.take(FILE_BYTES_MAX));
        let (mut line, mut room, mut evaluation_room) = (Vec::new(), POINTS_MAX, EVALUATION_BYTES_MAX);
        loop {
            match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    found.unread = machines(path, &error);
                    break;
                }
            }
            if let Ok(values) = serde_json::from_slice::<Map<String, Json>>(&line) {
                found.add(&values, &mut room);
                if values.contains_key("eval_loss") {
                    found.evaluations_told += 1;
                    let fits = evaluation_room.checked_sub(line.len());
                    found.evaluations.extend(fits.map(|_| values));
                    evaluation_room = fits.unwrap_or(0);
                }
            }
            line.clear();
        }
        found
    }

    /// Returns the same of a file in which a later line of a step counts.
    pub fn newest(file: &Path) -> Measured {
        let mut found = Measured::read(file);
        for points in found.points.values_mut() {
            points.reverse();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points.dedup_by(|later, kept| later.0 == kept.0);
        }
        found
    }

    fn add(&mut self, values: &Map<String, Json>, room: &mut usize) {
        let Some(step) = values.get("step").and_then(Json::as_f64) else { return };
        for (name, value) in values {
            let Some(value) = value.as_f64().filter(|_| *room > 0) else { continue };
            if self.points.len() < NAMES_MAX || self.points.contains_key(name) {
                self.points.entry(name.clone()).or_default().push((step, value));
                *room -= 1;
            }
        }
    }

    /// Returns whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Returns names in the order of the alphabet.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.points.keys()
    }

    /// Returns points of a metric over the steps.
    pub fn points(&self, name: &str) -> Vec<(f64, f64)> {
        self.points.get(name).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(text: &str, newest: bool) -> Measured {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        if newest { Measured::newest(file.path()) } else { Measured::read(file.path()) }
    }

    #[test]
    fn lines_become_points_and_evaluations() {
        let text = "{\"step\":1,\"loss\":2}\nno json\n[1]\n{\"loss\":9}\n{\"step\":2,\"loss\":1,\"eval_loss\":0.5,\"x\":\"y\"}";
        let found = measured(text, false);
        assert_eq!(found.points("loss"), [(1.0, 2.0), (2.0, 1.0)]);
        assert_eq!(found.points("eval_loss"), [(2.0, 0.5)]);
        assert_eq!((found.evaluations.len(), found.evaluations_told), (1, 1));
        assert_eq!(found.evaluations[0]["x"], "y");
        assert!(found.points("none").is_empty() && !found.is_empty());
    }

    #[test]
    fn a_later_line_of_a_step_counts() {
        let found = measured("{\"step\":2,\"a\":1}\n{\"step\":1,\"a\":2}\n{\"step\":2,\"a\":3}\n", true);
        assert_eq!(found.points("a"), [(1.0, 2.0), (2.0, 3.0)]);
    }

    #[test]
    fn what_is_kept_of_a_hostile_file_is_bounded() {
        let names: String =
            (0..2 * NAMES_MAX).map(|name| format!("{{\"step\":1,\"n{name}\":1}}\n")).collect();
        assert_eq!(measured(&names, false).names().count(), NAMES_MAX);
        let long = format!("{{\"step\":1,\"a\":\"{}\"}}\n{{\"step\":2,\"b\":1}}", "x".repeat(70_000));
        assert_eq!(measured(&long, false).points("b"), [(2.0, 1.0)]);
        let text = "y".repeat(60_000);
        let evaluations: String =
            (0..200).map(|step| format!("{{\"step\":{step},\"eval_loss\":1,\"x\":\"{text}\"}}\n")).collect();
        let found = measured(&evaluations, false);
        assert!(
            found.evaluations.len() < 150 && found.evaluations_told == 200,
            "{}",
            found.evaluations.len()
        );
        assert_eq!(found.points("eval_loss").len(), 200);
        assert!(Measured::read(Path::new("/dev/zero")).is_empty());
    }
}
