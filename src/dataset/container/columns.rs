//! JSON objects -> the types of their columns, and arrow arrays of these types.
//!
//! Objects become structs; a key that a row lacks is null. Objects of free form are kept exactly. For instance, the
//! call of a tool has other arguments in each row. So a field of such a name whose objects differ is stored as JSON
//! text, not as a struct with the keys of all. A field whose values have several types is refused with the two lines,
//! if it is read at all.

use crate::fault::{Fault, Result};
use arrow::array::*;
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::sync::Arc;

/// LIMIT: columns of a file.
const COLUMNS_MAX: usize = 10_000;
/// The beginning of the reason if an object has too many keys.
const MANY_KEYS: &str = "more than";
/// LIMIT: different keys in one field's objects. More mean that the keys are data.
const FIELDS_MAX: usize = 1000;
/// LIMIT: levels of structs and lists; conversations have four.
const DEPTH_MAX: usize = 16;

/// Fields whose form depends on a tool, a schema or a template.
const FREE: [&str; 9] = [
    "tools",
    "tool_calls",
    "functions",
    "function_call",
    "function",
    "arguments",
    "parameters",
    "documents",
    "chat_template_kwargs",
];
/// Fields of a message whose own type has a meaning.
const READ: [&str; 13] = [
    "role",
    "from",
    "speaker",
    "content",
    "value",
    "text",
    "type",
    "name",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "weight",
    "train",
];
/// Fields in which text and a list of parts are equivalent.
const WITH_PARTS: [&str; 2] = ["content", "value"];
/// Key of a field's metadata that says why its values have no common type.
const MIXED: &str = "hone.mixed";

/// The type of a field, as far as it has been seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Shape {
    kind: Kind,
    /// Line of the first value that is not null.
    line: u64,
    values: u64,
    nulls: u64,
    /// Whether the column has both whole and other numbers.
    widened: bool,
    /// The reason why there is no common type.
    mixed: Option<String>,
}

#[derive(Clone, Debug, Default)]
enum Kind {
    #[default]
    Null,
    Bool,
    Int,
    Float,
    Text,
    List(Box<Shape>),
    /// Fields in the order of their first appearance, and the number of objects.
    Object(Object),
}

#[derive(Clone, Debug, Default)]
struct Object {
    fields: Vec<(String, Shape)>,
    places: HashMap<String, usize>,
    count: u64,
}

/// Describes a value for messages.
pub(super) fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number",
        Value::Number(_) => "a whole number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Kind {
    fn describe(&self) -> &'static str {
        match self {
            Kind::Null => "null",
            Kind::Bool => "true or false",
            Kind::Int => "a whole number",
            Kind::Float => "a number",
            Kind::Text => "text",
            Kind::List(_) => "a list",
            Kind::Object(_) => "an object",
        }
    }
}

impl Shape {
    /// Adds a row.
    pub fn add(&mut self, row: &Value, line: u64) {
        self.merge("", row, line, 0);
    }

    fn merge(&mut self, name: &str, value: &Value, line: u64, depth: usize) {
        self.values += 1;
        if value.is_null() {
            self.nulls += 1;
            return;
        }
        if self.mixed.is_some() {
            return;
        }
        if depth > DEPTH_MAX {
            self.mixed = Some(format!("more than {DEPTH_MAX} levels of lists and objects in line {line}"));
            return;
        }
        if let Kind::Null = self.kind {
            (self.kind, self.line) = (empty(value), line);
        }
        let with_parts = WITH_PARTS.contains(&name);
        match (&mut self.kind, value) {
            (Kind::Bool, Value::Bool(_))
            | (Kind::Text, Value::String(_))
            | (Kind::Float, Value::Number(_)) => {}
            (Kind::Int, Value::Number(number)) if number.is_i64() => {}
            (Kind::Int, Value::Number(_)) => (self.kind, self.widened) = (Kind::Float, true),
            (Kind::List(item), Value::Array(values)) => {
                values.iter().for_each(|value| item.merge("", value, line, depth + 1));
            }
            (Kind::Object(object), Value::Object(map)) => {
                let limit = if depth == 0 { COLUMNS_MAX } else { FIELDS_MAX };
                if object.merge(map, line, depth) > limit {
                    self.mixed = Some(format!("{MANY_KEYS} {limit} different keys up to line {line}"));
                }
            }
            (Kind::Text, Value::Array(values)) if with_parts => {
                let mut item = Shape::default();
                values.iter().for_each(|value| item.merge("", value, line, depth + 1));
                item.merge("", &part("".into()), line, depth + 1);
                self.kind = Kind::List(Box::new(item));
            }
            (Kind::List(item), Value::String(_)) if with_parts => {
                item.merge("", &part("".into()), line, depth + 1)
            }
            (kind, value) => {
                self.mixed = Some(format!(
                    "{} in line {}, {} in line {line}",
                    kind.describe(),
                    self.line,
                    describe(value)
                ));
            }
        }
        if let (Kind::Float, Value::Number(number)) = (&self.kind, value) {
            self.widened |= !number.is_f64();
        }
    }

    /// Returns whether structs of this shape return every value as it was written.
    fn is_exact(&self) -> bool {
        self.mixed.is_none()
            && !self.widened
            && self.nulls == 0
            && match &self.kind {
                Kind::Null => false,
                Kind::Object(object) => {
                    let whole =
                        |(_, shape): &(String, Shape)| shape.values == object.count && shape.is_exact();
                    !object.fields.is_empty() && object.fields.iter().all(whole)
                }
                Kind::List(item) => matches!(item.kind, Kind::Null) && item.values == 0 || item.is_exact(),
                _ => true,
            }
    }

    /// Returns whether the field is stored as JSON text.
    fn is_json(&self, name: &str) -> bool {
        let nested = matches!(self.kind, Kind::Object(_) | Kind::List(_));
        self.mixed.is_some() || (FREE.contains(&name) && nested && !self.without_own_nulls().is_exact())
    }

    /// Returns the shape without its own nulls, because a field that is null or absent in some rows can still be a
    /// struct.
    fn without_own_nulls(&self) -> Shape {
        Shape { nulls: 0, ..self.clone() }
    }

    fn field(&self, name: &str) -> Field {
        let kind = match &self.kind {
            _ if self.is_json(name) => DataType::Utf8,
            Kind::Null | Kind::Text => DataType::Utf8,
            Kind::Bool => DataType::Boolean,
            Kind::Int => DataType::Int64,
            Kind::Float => DataType::Float64,
            Kind::List(item) => DataType::List(Arc::new(item.field("item"))),
            Kind::Object(object) => DataType::Struct(object.fields()),
        };
        let free = FREE.contains(&name);
        let mixed = self.mixed.iter().filter(|_| !free).map(|why| (MIXED.to_owned(), why.clone()));
        Field::new(name, kind, true).with_metadata(mixed.collect::<HashMap<String, String>>())
    }

    /// Returns the schema of a file's rows. The error says why there is none.
    pub fn schema(&self) -> std::result::Result<Schema, String> {
        match (&self.kind, &self.mixed) {
            (_, Some(why)) => Err(why.clone()),
            (Kind::Object(object), None) => Ok(Schema::new(object.fields())),
            _ => Ok(Schema::empty()),
        }
    }
}

impl Object {
    /// Adds an object and returns the number of different keys so far.
    fn merge(&mut self, map: &Map<String, Value>, line: u64, depth: usize) -> usize {
        self.count += 1;
        for (name, value) in map {
            let place = match self.places.get(name) {
                Some(&place) => place,
                None => {
                    self.places.insert(name.clone(), self.fields.len());
                    self.fields.push((name.clone(), Shape::default()));
                    self.fields.len() - 1
                }
            };
            self.fields[place].1.merge(name, value, line, depth + 1);
        }
        self.fields.len()
    }

    fn fields(&self) -> Fields {
        self.fields.iter().map(|(name, shape)| shape.field(name)).collect()
    }
}

fn empty(value: &Value) -> Kind {
    match value {
        Value::Null => Kind::Null,
        Value::Bool(_) => Kind::Bool,
        Value::Number(number) if number.is_i64() => Kind::Int,
        Value::Number(_) => Kind::Float,
        Value::String(_) => Kind::Text,
        Value::Array(_) => Kind::List(Box::default()),
        Value::Object(_) => Kind::Object(Object::default()),
    }
}

/// Returns a text as the only part of a content that other rows write in parts.
fn part(text: String) -> Value {
    serde_json::json!({"type": "text", "text": text})
}

/// Refuses a column without a common type, and such a field inside it if rows are made from that field.
///
/// # Errors
/// Data: the message names the two types and their lines.
pub(super) fn refuse_mixed(schema: &Schema, names: &[String]) -> Result<()> {
    for name in names {
        let Ok(field) = schema.field_with_name(name) else { continue };
        if let Some((path, why)) = mixed(field, true) {
            if why.starts_with(MANY_KEYS) {
                return Err(Fault::data(format!("`{path}` holds objects with {why}, so the keys are data")).help(
                    "write each row as an object of its own: pandas' to_json needs orient=\"records\", lines=True; a map \
                     with free keys belongs in a JSON text",
                ));
            }
            return Err(Fault::data(format!("`{path}` has values of several types: {why}"))
                .help("give all rows one type; numbers that are meant as text need quotes"));
        }
    }
    Ok(())
}

fn mixed(field: &Field, is_column: bool) -> Option<(String, String)> {
    let name = field.name();
    let own =
        field.metadata().get(MIXED).filter(|_| is_column || name == "item" || READ.contains(&name.as_str()));
    if let Some(why) = own {
        return Some((name.clone(), why.clone()));
    }
    let below = match field.data_type() {
        DataType::List(item) => mixed(item, false),
        DataType::Struct(fields) => fields.iter().find_map(|field| mixed(field, false)),
        _ => None,
    };
    below.map(|(path, why)| match path.as_str() {
        "item" => (format!("{name}[]"), why),
        path if name == "item" => (path.to_owned(), why),
        path => (format!("{name}.{path}"), why),
    })
}

/// Arrays that grow by rows.
pub(super) struct Columns {
    columns: Vec<(String, Column)>,
    rows: usize,
}

impl Columns {
    /// Arrays for the columns at these places of the shape's schema.
    pub fn new(shape: &Shape, places: &[usize]) -> Columns {
        let Kind::Object(object) = &shape.kind else { return Columns { columns: Vec::new(), rows: 0 } };
        let column = |&place: &usize| {
            let (name, shape) = &object.fields[place];
            (name.clone(), Column::of(name, shape))
        };
        Columns { columns: places.iter().map(column).collect(), rows: 0 }
    }

    /// Returns the number of rows so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds a row. The error names a value of another type than the file had when its types were read.
    pub fn push(&mut self, row: &Value) -> std::result::Result<(), String> {
        self.rows += 1;
        for (name, column) in &mut self.columns {
            column.push(row.get(name.as_str()).filter(|value| !value.is_null())).map_err(|value| {
                format!(
                    "`{name}` holds {value} that it did not hold before: the file changed while it was read"
                )
            })?;
        }
        Ok(())
    }

    /// Returns the rows so far and starts again.
    pub fn take(&mut self) -> Vec<ArrayRef> {
        self.rows = 0;
        self.columns.iter_mut().map(|(_, column)| column.take()).collect()
    }
}

enum Column {
    Text(StringBuilder),
    /// JSON text.
    Json(StringBuilder),
    Bool(BooleanBuilder),
    Int(Int64Builder),
    Float(Float64Builder),
    List {
        field: Arc<Field>,
        item: Box<Column>,
        lengths: Vec<usize>,
        valid: Vec<bool>,
    },
    Struct {
        fields: Fields,
        columns: Vec<(String, Column)>,
        valid: Vec<bool>,
    },
}

impl Column {
    fn of(name: &str, shape: &Shape) -> Column {
        let (lengths, valid) = (Vec::new(), Vec::new());
        match &shape.kind {
            _ if shape.is_json(name) => Column::Json(StringBuilder::new()),
            Kind::Null | Kind::Text => Column::Text(StringBuilder::new()),
            Kind::Bool => Column::Bool(BooleanBuilder::new()),
            Kind::Int => Column::Int(Int64Builder::new()),
            Kind::Float => Column::Float(Float64Builder::new()),
            Kind::List(item) => {
                let field = Arc::new(item.field("item"));
                Column::List { field, item: Box::new(Column::of("item", item)), lengths, valid }
            }
            Kind::Object(object) => {
                let columns = object.fields.iter();
                let columns = columns.map(|(name, shape)| (name.clone(), Column::of(name, shape))).collect();
                Column::Struct { fields: object.fields(), columns, valid }
            }
        }
    }

    /// Adds a value. The error names the type that does not fit.
    fn push(&mut self, value: Option<&Value>) -> std::result::Result<(), &'static str> {
        match (self, value) {
            (Column::Text(builder), None) | (Column::Json(builder), None) => builder.append_null(),
            // A text in such a place is JSON already.
            (Column::Text(builder) | Column::Json(builder), Some(Value::String(text))) => {
                builder.append_value(text)
            }
            (Column::Json(builder), Some(value)) => builder.append_value(value.to_string()),
            (Column::Bool(builder), None) => builder.append_null(),
            (Column::Bool(builder), Some(Value::Bool(value))) => builder.append_value(*value),
            (Column::Int(builder), None) => builder.append_null(),
            (Column::Int(builder), Some(value)) if value.is_i64() => builder.append_option(value.as_i64()),
            (Column::Float(builder), None) => builder.append_null(),
            (Column::Float(builder), Some(Value::Number(number))) => builder.append_option(number.as_f64()),
            (Column::List { lengths, valid, .. }, None) => {
                lengths.push(0);
                valid.push(false);
            }
            (Column::List { item, lengths, valid, .. }, Some(Value::Array(values))) => {
                for value in values {
                    item.push(Some(value).filter(|value| !value.is_null()))?;
                }
                lengths.push(values.len());
                valid.push(true);
            }
            (Column::List { item, lengths, valid, .. }, Some(Value::String(text))) => {
                item.push(Some(&part(text.clone())))?;
                lengths.push(1);
                valid.push(true);
            }
            (Column::Struct { columns, valid, .. }, None) => {
                columns.iter_mut().try_for_each(|(_, column)| column.push(None))?;
                valid.push(false);
            }
            (Column::Struct { columns, valid, .. }, Some(Value::Object(map))) => {
                for (name, column) in columns.iter_mut() {
                    column.push(map.get(name.as_str()).filter(|value| !value.is_null()))?;
                }
                valid.push(true);
            }
            (_, Some(value)) => return Err(describe(value)),
        }
        Ok(())
    }

    fn take(&mut self) -> ArrayRef {
        match self {
            Column::Text(builder) | Column::Json(builder) => Arc::new(builder.finish()),
            Column::Bool(builder) => Arc::new(builder.finish()),
            Column::Int(builder) => Arc::new(builder.finish()),
            Column::Float(builder) => Arc::new(builder.finish()),
            Column::List { field, item, lengths, valid } => {
                let offsets = OffsetBuffer::<i32>::from_lengths(std::mem::take(lengths));
                let valid = NullBuffer::from(std::mem::take(valid));
                Arc::new(ListArray::new(field.clone(), offsets, item.take(), Some(valid)))
            }
            Column::Struct { fields, columns, valid } => {
                let valid = std::mem::take(valid);
                let (rows, valid) = (valid.len(), NullBuffer::from(valid));
                let columns: Vec<ArrayRef> = columns.iter_mut().map(|(_, column)| column.take()).collect();
                match columns.is_empty() {
                    true => Arc::new(StructArray::new_empty_fields(rows, Some(valid))),
                    false => Arc::new(StructArray::new(fields.clone(), columns, Some(valid))),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    /// Prints the types of rows, and the rows converted back to JSON.
    fn check(rows: &[&str], expected: Expect) {
        let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect();
        let mut shape = Shape::default();
        for (index, row) in rows.iter().enumerate() {
            shape.add(row, index as u64 + 1);
        }
        let schema = shape.schema().unwrap();
        let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
        let mut shown = String::new();
        let mut columns = Columns::new(&shape, &(0..names.len()).collect::<Vec<_>>());
        rows.iter().for_each(|row| columns.push(row).unwrap());
        for (field, array) in schema.fields().iter().zip(columns.take()) {
            assert_eq!(field.data_type(), array.data_type());
            let values: Vec<String> = (0..array.len())
                .map(|row| match array.is_null(row) {
                    true => "null".into(),
                    false => arrow::util::display::array_value_to_string(&array, row).unwrap(),
                })
                .collect();
            shown += &format!("{}: {}\n  {}\n", field.name(), field.data_type(), values.join(" | "));
            if let Err(fault) = refuse_mixed(&schema, &[field.name().clone()]) {
                shown += &format!("  {}\n", fault.message);
            }
        }
        expected.assert_eq(&shown);
    }

    #[test]
    fn nested_objects_are_structs_and_missing_keys_null() {
        check(
            &[
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}"#,
                r#"{"messages": [], "id": 7}"#,
                r#"{"messages": null, "id": 2.5, "flag": true}"#,
            ],
            expect![[r#"
                messages: List(Struct("role": Utf8, "content": Utf8, "weight": Int64))
                  [{role: user, content: a, weight: }, {role: assistant, content: b, weight: 0}] | [] | null
                id: Float64
                  null | 7.0 | 2.5
                flag: Boolean
                  null | null | true
            "#]],
        );
    }

    #[test]
    fn calls_are_structs_where_all_have_the_same_keys_and_else_exact_text() {
        check(
            &[
                r#"{"tool_calls": [{"name": "f", "arguments": {"a": 1}}], "tools": [{"name": "f", "b": 1}]}"#,
                r#"{"tool_calls": [{"name": "g", "arguments": {"a": 2}}], "tools": [{"name": "g", "a": null}]}"#,
                r#"{"tools": "[]"}"#,
            ],
            expect![[r#"
                tool_calls: List(Struct("name": Utf8, "arguments": Struct("a": Int64)))
                  [{name: f, arguments: {a: 1}}] | [{name: g, arguments: {a: 2}}] | null
                tools: Utf8
                  [{"name":"f","b":1}] | [{"name":"g","a":null}] | []
            "#]],
        );
    }

    #[test]
    fn contents_in_text_and_in_parts_meet_and_other_mixtures_are_told() {
        check(
            &[
                r#"{"m": [{"content": "a"}], "x": "t", "y": {"role": 1, "z": 1}}"#,
                r#"{"m": [{"content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}], "x": 1, "y": {"role": "r", "z": "1"}}"#,
            ],
            expect![[r#"
                m: List(Struct("content": List(Struct("type": Utf8, "text": Utf8))))
                  [{content: [{type: text, text: a}]}] | [{content: [{type: text, text: b}, {type: text, text: c}]}]
                x: Utf8
                  t | 1
                  `x` has values of several types: text in line 1, a whole number in line 2
                y: Struct("role": Utf8, metadata: {"hone.mixed": "a whole number in line 1, text in line 2"}, "z": Utf8, metadata: {"hone.mixed": "a whole number in line 1, text in line 2"})
                  {role: 1, z: 1} | {role: r, z: 1}
                  `y.role` has values of several types: a whole number in line 1, text in line 2
            "#]],
        );
    }

    #[test]
    fn keys_that_are_data_and_nesting_without_end_are_no_types() {
        let mut shape = Shape::default();
        for key in 0..=FIELDS_MAX {
            shape.add(&serde_json::json!({"map": {key.to_string(): 1}}), 1 + key as u64);
        }
        let deep = (0..100).fold(Value::from(1), |value, _| serde_json::json!([value]));
        shape.add(&serde_json::json!({ "deep": deep }), 9);
        let schema = shape.schema().unwrap();
        assert!(
            schema
                .fields()
                .iter()
                .all(|field| field.data_type() == &DataType::Utf8 || field.name() == "deep")
        );
        let told = |name: &str| refuse_mixed(&schema, &[name.into()]).unwrap_err().message;
        assert!(told("map").contains("more than 1000 different keys up to line 1001"), "{}", told("map"));
        assert!(told("deep").contains("levels of lists"), "{}", told("deep"));
    }
}
