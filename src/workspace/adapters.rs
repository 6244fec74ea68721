//! An entry of `inference.adapters` -> its name, and the tuning Workspace that it may come from.

use super::kind::Adapter;

/// The prefix of an image that names a tuning Workspace of this namespace. It means the last image that this Workspace
/// pushed.
pub const TUNED: &str = "workspace://";

/// Returns the name of an adapter: its source's name, else one by its place in the list.
pub fn name_of(adapter: &Adapter, place: usize) -> String {
    let name = adapter.source.as_ref().map(|source| source.name.as_str()).unwrap_or_default();
    if name.is_empty() { format!("adapter-{place}") } else { name.to_owned() }
}
