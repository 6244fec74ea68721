//! Points -> a TensorBoard event file: records of a length, its masked CRC-32C, the event and its masked CRC-32C, and
//! an event is a protocol buffer (tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto).

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Point, Tracker};

/// Writes below `folder`, from the first point on.
pub struct EventFile {
    folder: PathBuf,
    file: Option<File>,
}

impl EventFile {
    /// Returns a file to which nothing was written yet.
    pub fn new(folder: PathBuf) -> EventFile {
        EventFile { folder, file: None }
    }

    fn open(&mut self, first_step: u64) -> std::io::Result<&mut File> {
        if self.file.is_none() {
            fs::create_dir_all(&self.folder)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host: String =
                host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            let name = format!("events.out.tfevents.{}.{host}.{}.0", now.as_nanos(), std::process::id());
            let mut open = OpenOptions::new();
            open.write(true).create_new(true).custom_flags(libc::O_NOFOLLOW);
            let mut file = open.open(self.folder.join(name))?;
            let mut version = header(now.as_secs_f64(), 0);
            text(&mut version, 3, b"brain.Event:2");
            file.write_all(&record(&version))?;
            // SessionLog START: points of an earlier start from this step on are superseded.
            let mut session = header(now.as_secs_f64(), first_step);
            text(&mut session, 7, &[0x08, 1]);
            file.write_all(&record(&session))?;
            self.file = Some(file);
        }
        Ok(self.file.as_mut().expect("just opened"))
    }
}

impl Tracker for EventFile {
    fn name(&self) -> &'static str {
        "TensorBoard"
    }

    fn points(&mut self, points: &[Point]) -> Result<(), String> {
        let bytes: Vec<u8> = points.iter().flat_map(event).collect();
        let first = points.first().map_or(0, |point| point.step);
        let mut write = || -> std::io::Result<()> {
            let file = self.open(first)?;
            file.write_all(&bytes)?;
            file.sync_data()
        };
        write().map_err(|error| error.to_string())
    }
}

/// Returns the tag as transformers writes it: `eval_loss` is `eval/loss`, all else is below `train/`.
fn tag(name: &str) -> String {
    match name.strip_prefix("eval_") {
        Some(rest) => format!("eval/{rest}"),
        None => format!("train/{name}"),
    }
}

fn event(point: &Point) -> Vec<u8> {
    let mut summary = Vec::new();
    for (name, value) in &point.values {
        let mut one = Vec::new();
        text(&mut one, 1, tag(name).as_bytes());
        one.push(2 << 3 | 5); // simple_value, 32 bits
        one.extend((*value as f32).to_le_bytes());
        text(&mut summary, 1, &one);
    }
    let mut event = header(point.milliseconds() as f64 / 1e3, point.step);
    text(&mut event, 5, &summary);
    record(&event)
}

/// Returns the fields wall_time and step.
fn header(wall_time: f64, step: u64) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | 1];
    bytes.extend(wall_time.to_le_bytes());
    bytes.push(2 << 3);
    varint(&mut bytes, step);
    bytes
}

/// Writes a field that has a length.
fn text(bytes: &mut Vec<u8>, field: u8, content: &[u8]) {
    bytes.push(field << 3 | 2);
    varint(bytes, content.len() as u64);
    bytes.extend(content);
}

fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let parts = [&length[..], &masked_crc(&length).to_le_bytes(), event, &masked_crc(event).to_le_bytes()];
    parts.concat()
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Computes CRC-32C (Castagnoli), bit by bit: an event has some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    /// Bytes that the `tensorboard` package's own EventFileWriter makes of this event.
    #[test]
    fn an_event_has_the_bytes_that_tensorboard_writes() {
        let time = UNIX_EPOCH + std::time::Duration::from_millis(1_700_000_000_500);
        let point = Point {
            time,
            step: 300,
            values: vec![("loss".into(), 1.5), ("eval_loss".into(), 0.25)],
            ..Point::now()
        };
        let expected = include_bytes!("../../tests/fixtures/tensorboard_event.bin");
        assert_eq!(event(&point), expected);
    }
}
