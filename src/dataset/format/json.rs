//! Arrow arrays of any kind -> JSON values, one row at a time.
//!
//! Nulls inside a struct are left out: files with one schema give every struct the fields of all others, with nulls
//! for fields that were not written (a tool's arguments get those of every tool). If a null is meant, the column
//! must be JSON text.

use super::column::cast;
use crate::fault::{Fault, Result};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, LargeListArray, StringViewArray,
    StructArray, UInt64Array,
};
use arrow::datatypes::DataType;
use serde_json::{Map, Value};

/// Reads a value that a column holds as JSON text. The error completes "a text that is".
pub fn of_text(text: &str) -> std::result::Result<Value, String> {
    serde_json::from_str(text).map_err(|error| match text.contains("{'") {
        true => "Python's own notation and not JSON: write it with json.dumps".into(),
        false => format!("not JSON: {error}"),
    })
}

/// An array whose parts were cast once, so that reading a row needs no look at types.
pub struct Column {
    nulls: ArrayRef,
    values: Values,
}

enum Values {
    Nothing,
    Text(StringViewArray),
    Truth(BooleanArray),
    Whole(Int64Array),
    Unsigned(UInt64Array),
    Number(Float64Array),
    List(LargeListArray, Box<Column>),
    Fields(Vec<(String, Column)>),
    /// Keys and values of Arrow's map type.
    Entries(LargeListArray, Box<Column>, Box<Column>),
}

impl Column {
    /// Casts an array. Errors: `Data` for bytes that are not UTF-8, and for types without a JSON form.
    pub fn of(array: &ArrayRef) -> Result<Column> {
        use DataType::*;
        let values = match array.data_type() {
            Null => Values::Nothing,
            Boolean => Values::Truth(array.as_boolean().clone()),
            Int8 | Int16 | Int32 | Int64 | UInt8 | UInt16 | UInt32 => {
                Values::Whole(cast(array, &Int64)?.as_primitive().clone())
            }
            UInt64 => Values::Unsigned(array.as_primitive().clone()),
            Float16 | Float32 | Float64 | Decimal32(..) | Decimal64(..) | Decimal128(..) | Decimal256(..) => {
                Values::Number(cast(array, &Float64)?.as_primitive().clone())
            }
            Struct(_) => Values::Fields(fields(array.as_struct())?),
            Map(..) => entries(array)?,
            List(field)
            | LargeList(field)
            | ListView(field)
            | LargeListView(field)
            | FixedSizeList(field, _) => {
                let lists = cast(array, &LargeList(field.clone()))?.as_list::<i64>().clone();
                let values = Box::new(Column::of(lists.values())?);
                Values::List(lists, values)
            }
            Dictionary(_, value) => return Column::of(&cast(array, value)?),
            RunEndEncoded(_, value) => return Column::of(&cast(array, value.data_type())?),
            Union(..) => {
                return Err(Fault::data(format!("a column of type {} is not supported", array.data_type())));
            }
            _ => Values::Text(cast(array, &Utf8View)?.as_string_view().clone()),
        };
        Ok(Column { nulls: array.clone(), values })
    }

    /// Returns the value of a row.
    pub fn value(&self, row: usize) -> Value {
        if self.nulls.is_null(row) {
            return Value::Null;
        }
        match &self.values {
            Values::Nothing => Value::Null,
            Values::Text(texts) => texts.value(row).into(),
            Values::Truth(values) => values.value(row).into(),
            Values::Whole(values) => values.value(row).into(),
            Values::Unsigned(values) => values.value(row).into(),
            Values::Number(values) => values.value(row).into(),
            Values::List(lists, values) => range(lists, row).map(|index| values.value(index)).collect(),
            Values::Fields(fields) => {
                let known = fields.iter().map(|(name, column)| (name.clone(), column.value(row)));
                Value::Object(known.filter(|(_, value)| !value.is_null()).collect())
            }
            Values::Entries(lists, keys, values) => {
                let entry = |index| (text(keys.value(index)), values.value(index));
                Value::Object(range(lists, row).map(entry).collect::<Map<_, _>>())
            }
        }
    }
}

fn range(lists: &LargeListArray, row: usize) -> std::ops::Range<usize> {
    lists.value_offsets()[row] as usize..lists.value_offsets()[row + 1] as usize
}

fn fields(array: &StructArray) -> Result<Vec<(String, Column)>> {
    let both = array.fields().iter().zip(array.columns());
    both.map(|(field, column)| Ok((field.name().clone(), Column::of(column)?))).collect()
}

/// Casts a map, which is stored as a list of structs with two fields.
fn entries(array: &ArrayRef) -> Result<Values> {
    let map = array.as_map();
    let offsets = map.offsets().iter().map(|&offset| i64::from(offset)).collect::<Vec<_>>();
    let field =
        std::sync::Arc::new(arrow::datatypes::Field::new("entry", map.entries().data_type().clone(), true));
    let entries: ArrayRef = std::sync::Arc::new(map.entries().clone());
    let offsets = arrow::buffer::OffsetBuffer::new(offsets.into());
    let lists = LargeListArray::new(field, offsets, entries, map.nulls().cloned());
    let (keys, values) = (Column::of(map.keys())?, Column::of(map.values())?);
    Ok(Values::Entries(lists, Box::new(keys), Box::new(values)))
}

fn text(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::*;
    use arrow::datatypes::{Field, Int32Type};
    use serde_json::json;
    use std::sync::Arc;

    fn check(array: impl Array + 'static, expected: Value) {
        let array: ArrayRef = Arc::new(array);
        let column = Column::of(&array).unwrap();
        let values: Value = (0..array.len()).map(|row| column.value(row)).collect();
        assert_eq!(values, expected, "{}", array.data_type());
    }

    #[test]
    fn every_kind_of_array_has_a_json_form() {
        check(StringArray::from(vec![Some("é"), None]), json!(["é", null]));
        check(StringViewArray::from(vec!["a"]), json!(["a"]));
        check(BinaryArray::from(vec![&b"b"[..]]), json!(["b"]));
        check(vec![Some("x"), None].into_iter().collect::<DictionaryArray<Int32Type>>(), json!(["x", null]));
        check(BooleanArray::from(vec![Some(true), None]), json!([true, null]));
        check(UInt8Array::from(vec![7]), json!([7]));
        check(UInt64Array::from(vec![u64::MAX]), json!([u64::MAX]));
        check(Float32Array::from(vec![Some(0.5), None]), json!([0.5, null]));
        check(NullArray::new(2), json!([null, null]));
        check(Date32Array::from(vec![19_723]), json!(["2024-01-01"]));
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([
            Some(vec![Some(1), None]),
            None,
            Some(vec![]),
        ]);
        check(lists, json!([[1, null], null, []]));
    }

    #[test]
    fn nulls_inside_a_struct_are_left_out() {
        let field = |name: &str, kind| Arc::new(Field::new(name, kind, true));
        let city: ArrayRef = Arc::new(StringArray::from(vec![Some("Paris"), None]));
        let days: ArrayRef = Arc::new(Int64Array::from(vec![None, Some(3)]));
        let inner = StructArray::from(vec![
            (field("city", DataType::Utf8), city),
            (field("days", DataType::Int64), days),
        ]);
        check(inner, json!([{"city": "Paris"}, {"days": 3}]));
    }

    #[test]
    fn maps_are_objects() {
        let mut builder = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
        builder.keys().append_value("a");
        builder.values().append_value(1);
        builder.append(true).unwrap();
        builder.append(false).unwrap();
        check(builder.finish(), json!([{"a": 1}, null]));
    }

    #[test]
    fn bytes_that_are_not_text_are_a_data_fault() {
        let array: ArrayRef = Arc::new(BinaryArray::from(vec![&b"\xff"[..]]));
        assert_eq!(Column::of(&array).err().unwrap().kind, crate::fault::Kind::Data);
    }
}
