//! JSON lines: one object per line, or objects of several lines each, one after the other.

use super::packing::Input;
use super::values::{Division, Objects, first_line_is_whole};
use super::{Container, Rows};
use crate::fault::Result;

/// The container.
pub static CONTAINER: Container = Container {
    name: "jsonl",
    title: "a file of JSON lines",
    endings: &["jsonl", "ndjson", "jsonlines"],
    is: |_| false,
    may_begin: |text| text.starts_with('{'),
    open,
};

fn open(input: Input) -> Result<Box<dyn Rows>> {
    let division = if first_line_is_whole(&input)? { Division::Lines } else { Division::Sequence };
    Ok(Box::new(Objects::open(input, division)?))
}
