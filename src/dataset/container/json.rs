//! One JSON array of objects, one per row. It is read row by row, however large the array is.

use super::packing::Input;
use super::values::{Division, Objects};
use super::{Container, Rows};
use crate::fault::Result;

/// The container.
pub static CONTAINER: Container = Container {
    name: "json",
    title: "a JSON file",
    endings: &["json"],
    is: |_| false,
    may_begin: |text| text.starts_with('['),
    open,
};

fn open(input: Input) -> Result<Box<dyn Rows>> {
    Ok(Box::new(Objects::open(input, Division::Array)?))
}
