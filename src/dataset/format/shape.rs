//! The columns of a file that fits no layout -> the remedy, if the file has the right rows in another shape.

use super::{FORMATS, Options, column, resolve};
use arrow::datatypes::{DataType, Field, Fields, Schema};

/// Returns the remedy for a file whose rows or fields lie deeper than its columns, or whose header is one column.
pub(super) fn remedy(schema: &Schema, options: &Options) -> Option<String> {
    let columns = schema.fields();
    if let [only] = &columns[..]
        && only.name().contains([',', ';', '\t', '|'])
    {
        return Some(
            "the header is one column: separate the values by commas, tabs or semicolons (in a .tsv file by tabs)".into(),
        );
    }
    if !columns.is_empty() && columns.iter().all(|column| is_numbered(column)) {
        return Some(
            "each column is a map from row numbers, as pandas writes it by default: write \
             to_json(path, orient=\"records\", lines=True)"
                .into(),
        );
    }
    columns.iter().find_map(|column| {
        let (name, kind) = (column.name(), column.data_type());
        if let Some(DataType::Struct(fields)) = column::element(kind).map(|item| item.data_type()) {
            let told =
                || format!("the list `{name}` seems to hold the rows: write the list alone, or each of its items in a line");
            return fits(fields, options).then(told);
        }
        match kind {
            DataType::Struct(fields) if fits(fields, options) => Some(format!(
                "`{name}` seems to hold the fields of a row: write each such object in a line of its own"
            )),
            _ => None,
        }
    })
}

/// Returns whether a column's objects have the numbers of rows as their keys.
fn is_numbered(column: &Field) -> bool {
    let is_number = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    matches!(column.data_type(), DataType::Struct(fields)
        if !fields.is_empty() && fields.iter().all(|field| is_number(field.name())))
}

/// Returns whether objects with these fields would be rows of a layout.
fn fits(fields: &Fields, options: &Options) -> bool {
    let schema = Schema::new(fields.clone());
    // A message of a conversation may have a field `text`, but it is not a row.
    let rows = FORMATS.iter().filter(|format| format.layout != crate::dataset::Layout::Text);
    rows.into_iter().any(|format| matches!(resolve(&schema, format, options, None), Ok(Ok(_))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn field(name: &str, kind: DataType) -> Field {
        Field::new(name, kind, true)
    }

    fn object(names: &[&str]) -> DataType {
        DataType::Struct(names.iter().map(|name| field(name, DataType::Utf8)).collect())
    }

    fn list(item: DataType) -> DataType {
        DataType::List(Arc::new(field("item", item)))
    }

    #[test]
    fn the_right_rows_in_another_shape_are_recognised() {
        let told = |columns: Vec<Field>| remedy(&Schema::new(columns), &Options::RECOGNISED);
        for (columns, words) in [
            (vec![field("instruction|output", DataType::Utf8)], "the header is one column"),
            (
                vec![field("question", object(&["0", "1"])), field("answer", object(&["0", "1"]))],
                "orient=\"records\"",
            ),
            (
                vec![field("version", DataType::Utf8), field("data", list(object(&["question", "answer"])))],
                "the list `data` seems to hold the rows",
            ),
            (vec![field("row", object(&["prompt", "completion"]))], "`row` seems to hold the fields"),
            (vec![field("k0", object(&["conversations"]))], "`k0` seems to hold the fields"),
        ] {
            let told = told(columns);
            assert!(told.as_ref().is_some_and(|told| told.contains(words)), "{words}: {told:?}");
        }
        for columns in [
            vec![],
            vec![field("frage", DataType::Utf8), field("antwort", DataType::Utf8)],
            vec![field("turns", list(object(&["speaker", "text"])))],
            vec![field("id", DataType::Int64), field("row", object(&["0", "1"]))],
        ] {
            assert_eq!(told(columns.clone()), None, "{columns:?}");
        }
    }
}
