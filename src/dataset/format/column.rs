//! Arrow arrays of any string or list kind -> strings and message lists.

use super::super::Message;
use super::{EXTRA_FIELDS, ROLES};
use crate::fault::{Fault, Result};
use arrow::array::{Array, ArrayRef, AsArray, LargeListArray, StringViewArray, StructArray};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field};
use std::sync::Arc;

/// What the two strings of a message are called in the file.
pub struct Keys {
    pub role: &'static str,
    pub content: &'static str,
    /// A role as the file writes it -> as templates write it.
    pub rename: fn(&str) -> &str,
}

pub fn is_string(kind: &DataType) -> bool {
    use DataType::*;
    match kind {
        Utf8 | LargeUtf8 | Utf8View | Binary | LargeBinary | BinaryView => true,
        Dictionary(_, value) => is_string(value),
        _ => false,
    }
}

/// A list of structs that have both strings.
pub fn is_messages(kind: &DataType, keys: &Keys) -> bool {
    let Some(DataType::Struct(fields)) = element(kind).map(|field| field.data_type()) else { return false };
    [keys.role, keys.content]
        .iter()
        .all(|key| fields.find(key).is_some_and(|(_, field)| is_string(field.data_type())))
}

/// Every string kind as one, without copying a text; bytes are checked to be UTF-8.
pub fn strings(array: &ArrayRef) -> Result<StringViewArray> {
    Ok(cast(array, &DataType::Utf8View)?.as_string_view().clone())
}

/// Bytes of all texts in an array, each counted as often as a row names it.
pub fn text_bytes(array: &ArrayRef) -> u64 {
    // The length is the lower half of a view's first 8 bytes.
    let lengths = |views: &[u128]| views.iter().map(|view| u64::from(*view as u32)).sum();
    match array.data_type() {
        DataType::Utf8View => lengths(array.as_string_view().views()),
        DataType::BinaryView => lengths(array.as_binary_view().views()),
        DataType::List(_) => text_bytes(array.as_list::<i32>().values()),
        DataType::LargeList(_) => text_bytes(array.as_list::<i64>().values()),
        DataType::Struct(_) => array.as_struct().columns().iter().map(text_bytes).sum(),
        _ => array.get_buffer_memory_size() as u64,
    }
}

/// One list of messages a row, or what is wrong with it.
pub fn messages(array: &ArrayRef, keys: &Keys) -> Result<Vec<std::result::Result<Vec<Message>, String>>> {
    let lists = lists(array)?;
    let turns = Turns::of(lists.values().as_struct(), keys)?;
    let row = |row: usize| {
        if lists.is_null(row) {
            return Err("the list of messages is null".to_string());
        }
        let range = lists.value_offsets()[row] as usize..lists.value_offsets()[row + 1] as usize;
        if range.is_empty() {
            return Err("the list of messages is empty".to_string());
        }
        range.map(|index| turns.message(index, keys)).collect()
    };
    Ok((0..lists.len()).map(row).collect())
}

/// The columns of all messages of a batch, row after row.
struct Turns {
    turns: StructArray,
    role: StringViewArray,
    content: StringViewArray,
    extra: Vec<(&'static str, StringViewArray)>,
}

impl Turns {
    fn of(turns: &StructArray, keys: &Keys) -> Result<Turns> {
        let column = |name: &str| turns.column_by_name(name).expect("`is_messages` saw both keys");
        let mut extra = Vec::new();
        for name in EXTRA_FIELDS {
            if let Some(array) = turns.column_by_name(name).filter(|array| is_string(array.data_type())) {
                extra.push((name, strings(array)?));
            }
        }
        let (role, content) = (strings(column(keys.role))?, strings(column(keys.content))?);
        Ok(Turns { turns: turns.clone(), role, content, extra })
    }

    fn message(&self, index: usize, keys: &Keys) -> std::result::Result<Message, String> {
        if self.turns.is_null(index) {
            return Err("a message is null".into());
        }
        let role = value(&self.role, index).ok_or("a message's role is null")?;
        let role = (keys.rename)(role);
        if !ROLES.contains(&role) {
            let shown: String = role.chars().take(40).collect();
            return Err(format!("unknown role {shown:?}, expected one of {}", ROLES.join(", ")));
        }
        if self.calls_tools(index) {
            return Err("a message has tool_calls, which are not supported".into());
        }
        let content = value(&self.content, index).ok_or_else(|| format!("the {role}'s content is null"))?;
        if content.trim().is_empty() {
            return Err(format!("the {role}'s content is empty"));
        }
        let extra = self.extra.iter();
        let extra = extra.filter_map(|(name, array)| Some((*name, value(array, index)?.to_string())));
        Ok(Message { role: role.to_string(), content: content.to_string(), extra: extra.collect() })
    }

    /// Dropping calls would teach answers out of nothing.
    fn calls_tools(&self, index: usize) -> bool {
        self.turns.column_by_name("tool_calls").is_some_and(|array| {
            let list = array.as_list_opt::<i32>().map(|list| list.value_length(index) as usize);
            let list =
                list.or_else(|| array.as_list_opt::<i64>().map(|list| list.value_length(index) as usize));
            !array.is_null(index) && array.data_type() != &DataType::Null && list != Some(0)
        })
    }
}

pub fn value(array: &StringViewArray, index: usize) -> Option<&str> {
    (!array.is_null(index)).then(|| array.value(index))
}

fn lists(array: &ArrayRef) -> Result<LargeListArray> {
    let field: &Arc<Field> = element(array.data_type()).expect("`is_messages` saw a list");
    Ok(cast(array, &DataType::LargeList(field.clone()))?.as_list::<i64>().clone())
}

fn element(kind: &DataType) -> Option<&Arc<Field>> {
    use DataType::*;
    match kind {
        List(field) | LargeList(field) | ListView(field) | LargeListView(field) | FixedSizeList(field, _) => {
            Some(field)
        }
        _ => None,
    }
}

fn cast(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    cast_with_options(array, to, &strict)
        .map_err(|error| Fault::data(format!("cannot read it as text: {error}")))
}
