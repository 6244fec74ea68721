//! JSON lines: one object a line, or objects that take several lines each, one behind the other.

use super::packing::Input;
use super::values::{Division, Objects, first_line_is_whole};
use super::{Container, Rows};
use crate::fault::Result;

/// JSON lines.
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
