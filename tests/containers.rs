//! The same rows in every container give the same conversations, and damage in any container is a data fault.

#[path = "support/data.rs"]
mod data;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Schema};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use data::{OPTIONS, written};
use expect_test::expect;
use hone::dataset::{self, Conversation, Dataset, Options};
use hone::fault::{Fault, Kind};
use hone::report::Report;
use parquet::arrow::ArrowWriter;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

fn read_as(folder: &Path, name: &str, content: &[u8], container: Option<&str>) -> Result<Dataset, Fault> {
    let options = Options { container: container.map(String::from), ..OPTIONS };
    dataset::read(&[written(folder, name, content)], &options, &Report::silent())
}

fn read(name: &str, content: &[u8]) -> Result<Dataset, Fault> {
    read_as(tempfile::tempdir().unwrap().path(), name, content, None)
}

fn told(name: &str, content: &[u8]) -> String {
    let fault = read(name, content).expect_err("must be refused");
    assert_eq!(fault.kind, Kind::Data, "{fault}");
    fault.to_string()
}

/// Returns rows of prompts and answers, long enough to fill several batches.
fn pairs() -> Vec<(String, String)> {
    (0..700).map(|row| (format!("question {row},\n\"é\" 日"), format!("answer {row}"))).collect()
}

fn batch() -> RecordBatch {
    let column = |pick: fn(&(String, String)) -> &str| -> ArrayRef {
        Arc::new(StringArray::from(pairs().iter().map(pick).collect::<Vec<_>>()))
    };
    let kinds: ArrayRef = Arc::new(DictionaryArray::<arrow::datatypes::Int32Type>::from_iter(
        pairs().iter().enumerate().map(|(row, _)| Some(["a", "b"][row % 2])),
    ));
    RecordBatch::try_from_iter([
        ("kind", kinds),
        ("prompt", column(|p| &p.0)),
        ("completion", column(|p| &p.1)),
    ])
    .unwrap()
}

fn ipc_file(compression: Option<CompressionType>) -> Vec<u8> {
    let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
    let mut bytes = Vec::new();
    let mut writer = FileWriter::try_new_with_options(&mut bytes, &batch().schema(), options).unwrap();
    writer.write(&batch().slice(0, 500)).unwrap();
    writer.write(&batch().slice(500, 200)).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

fn ipc_stream() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::try_new(&mut bytes, &batch().schema()).unwrap();
    writer.write(&batch().slice(0, 500)).unwrap();
    writer.write(&batch().slice(500, 200)).unwrap();
    writer.finish().unwrap();
    drop(writer);
    bytes
}

fn parquet_file() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch().schema(), None).unwrap();
    writer.write(&batch()).unwrap();
    writer.close().unwrap();
    bytes
}

fn objects() -> Vec<String> {
    let object = |(prompt, completion): &(String, String)| {
        serde_json::json!({"prompt": prompt, "completion": completion}).to_string()
    };
    pairs().iter().map(object).collect()
}

fn csv(delimiter: char) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let rows =
        pairs().iter().map(|(p, c)| format!("{}{delimiter}{}\r\n", quoted(p), quoted(c))).collect::<String>();
    format!("prompt{delimiter}completion\r\n{rows}")
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstandard(content: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(content, 1).unwrap()
}

fn all() -> Vec<(&'static str, Vec<u8>)> {
    let pretty: Vec<String> = objects()
        .iter()
        .map(|row| {
            serde_json::to_string_pretty(&serde_json::from_str::<serde_json::Value>(row).unwrap()).unwrap()
        })
        .collect();
    vec![
        ("rows.parquet", parquet_file()),
        ("rows.jsonl", (objects().join("\n") + "\n").into_bytes()),
        ("rows.ndjson", objects().join("\r\n\n").into_bytes()),
        ("rows.json", format!("[{}]", objects().join(",")).into_bytes()),
        ("pretty.json", format!("\u{feff}[\n{}\n]\n", pretty.join(",\n")).into_bytes()),
        ("concatenated.json", pretty.join("\n").into_bytes()),
        ("rows.csv", csv(',').into_bytes()),
        ("rows.tsv", csv('\t').into_bytes()),
        ("rows.arrow", ipc_stream()),
        ("rows.feather", ipc_file(Some(CompressionType::LZ4_FRAME))),
        ("rows.arrow", ipc_file(Some(CompressionType::ZSTD))),
        ("https://host/resolve/rows.arrow", ipc_file(None)),
    ]
}

#[test]
fn the_same_rows_come_out_of_every_container_and_packing() {
    for (name, content) in all() {
        for (ending, packed) in
            [("", content.clone()), (".gz", gzip(&content)), (".zst", zstandard(&content))]
        {
            let name = format!("{name}{ending}");
            let data = read(&name, &packed).unwrap_or_else(|fault| panic!("{name}: {fault}"));
            let found: Vec<(String, String)> = data
                .train
                .iter()
                .map(|record| match &record.conversation {
                    Conversation::PromptText { prompt, completion } => (prompt.clone(), completion.clone()),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert!(found == pairs(), "{name}");
            assert_eq!(data.train[699].row, 699, "{name}");
        }
    }
}

#[test]
fn kaitos_extension_says_what_a_file_without_a_name_is() {
    let folder = tempfile::tempdir().unwrap();
    let read =
        |content: &[u8], container| read_as(folder.path(), "export?format=1", content, Some(container));
    assert_eq!(read(csv(',').as_bytes(), "csv").unwrap().train.len(), 700);
    assert_eq!(read(objects().join("\n").as_bytes(), "json").unwrap().train.len(), 700);
    assert_eq!(read(&ipc_stream(), "arrow").unwrap().train.len(), 700);
    let fault = read(&parquet_file(), "csv").unwrap_err();
    assert!(fault.message.contains("not a CSV file but a parquet file"), "{fault}");
}

#[test]
fn conversations_of_json_lines_keep_their_structure() {
    let lines = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1}
{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "meta": {"x": [1, "y"]}}
"#;
    let data = read("rows.jsonl", lines.as_bytes()).unwrap();
    let turns: Vec<usize> = data
        .train
        .iter()
        .map(|record| match &record.conversation {
            Conversation::Messages(messages) => messages.len(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(turns, [2, 3]);
}

#[test]
fn places_of_what_is_wrong_are_lines_and_columns() {
    expect![[r#"
        rows.jsonl: line 2, column 12: not valid JSON: expected value
          help: correct this place, or export the file again"#]]
    .assert_eq(&told("rows.jsonl", b"{\"text\": \"a\"}\n{\"text\":   b}\n"));
    expect![[r#"
        rows.jsonl: line 3, column 1: expected a row as an object of column names and values, found text
          help: write each row as {"messages": [...]} or {"prompt": "...", "completion": "..."}"#]]
    .assert_eq(&told("rows.jsonl", b"{\"text\": \"a\"}\n\n\"b\"\n"));
    expect![[r#"
        rows.jsonl: line 2, column 11: not UTF-8 text (byte 10 of the row)
          help: save the file as UTF-8"#]]
    .assert_eq(&told("rows.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n"));
    expect![[r#"
        rows.jsonl: line 2, column 20: not valid JSON: the key "text" is there twice
          help: keep one of the two values"#]]
    .assert_eq(&told("rows.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\", \"text\": \"c\"}\n"));
    for value in ["NaN", "Infinity", "-Infinity"] {
        let told = told("rows.jsonl", format!("{{\"text\": \"a\", \"score\": {value}}}\n").as_bytes());
        assert!(told.contains("not valid JSON") && told.contains("write null"), "{told}");
    }
    for text in ["a\\ud83d", "a\\ude00", "a\\ud83dx"] {
        let told = told("rows.jsonl", format!("{{\"text\": \"{text}\"}}\n").as_bytes());
        assert!(told.contains("half a character"), "{told}");
    }
    expect![[r#"
        rows.json: line 3, column 10: not valid JSON: expected `,` or `}`
          help: correct this place, or export the file again"#]]
    .assert_eq(&told("rows.json", b"[{\"text\": \"a\"},\n {\"text\":\n     \"b\" x}]"));
    expect![[r#"
        rows.json: line 2: the array of rows has no end: the file is cut off
          help: fetch or export the file again"#]]
    .assert_eq(&told("rows.json", b"[{\"text\": \"a\"},\n"));
    expect![[r#"
        rows.json: line 1, column 16: expected `,` or `]` behind a row, found `{`
          help: correct this place, or export the file again"#]]
    .assert_eq(&told("rows.json", b"[{\"text\": \"a\"} {\"text\": \"b\"}]"));
    expect![[r#"
        rows.jsonl: `text` has values of several types: text in line 1, a whole number in line 2
          help: give all rows one type; numbers that are meant as text need quotes"#]]
    .assert_eq(&told("rows.jsonl", b"{\"text\": \"a\"}\n{\"text\": 5}\n"));
    expect![[r#"
        rows.jsonl: `messages.content` has values of several types: text in line 1, a whole number in line 2
          help: give all rows one type; numbers that are meant as text need quotes"#]]
    .assert_eq(&told(
        "rows.jsonl",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": 7}]}\n",
    ));
}

#[test]
fn a_column_that_nobody_reads_may_hold_anything() {
    let lines = b"{\"text\": \"a\", \"meta\": 1}\n{\"text\": \"b\", \"meta\": [\"x\"]}\n{\"text\": \"c\", \"meta\": {\"k\": null}}\n";
    assert_eq!(read("rows.jsonl", lines).unwrap().train.len(), 3);
}

#[test]
fn what_is_no_data_is_called_by_its_name() {
    for (name, content, words) in [
        (
            "rows.jsonl.gz",
            gzip(b"<!doctype html><title>x</title>"),
            "not a file of JSON lines but an HTML page",
        ),
        ("rows.zip", b"PK\x03\x04....".to_vec(), "not a data file but a ZIP archive"),
        ("rows.feather", b"FEA1....".to_vec(), "not an Arrow IPC file but a feather file of version 1"),
        ("rows.csv", b"\xff\xfea\0,\0".to_vec(), "not a CSV file but text in UTF-16"),
        ("rows.jsonl", b"\xff\xfe{\0".to_vec(), "save the file as UTF-8"),
        ("rows.jsonl.bz2", b"BZh91AY&SY".to_vec(), "unpack it, and give the data files inside"),
        ("rows.parquet.gz", gzip(b"PAR1"), "a truncated parquet file: 4 bytes"),
    ] {
        let told = told(name, &content);
        assert!(told.contains(words), "{name}: {told}");
    }
}

/// A few kilobytes that unpack to gigabytes: one row without an end.
#[test]
fn a_bomb_is_refused_before_it_takes_the_memory() {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(b"{\"text\": \"").unwrap();
    let part = vec![b'a'; 1 << 20];
    for _ in 0..300 {
        encoder.write_all(&part).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    let told = told("rows.jsonl.zst", &bomb);
    assert!(told.contains("line 1: a row of more than 268435456 bytes"), "{told}");
}

/// A record batch that claims to unpack to more bytes than there is memory for.
#[test]
fn an_arrow_buffer_that_lies_about_its_size_is_refused() {
    let mut bytes = ipc_file(Some(CompressionType::ZSTD));
    // Each compressed buffer begins with its unpacked length; zstd's own head follows.
    let at = bytes.windows(4).position(|window| window == b"\x28\xb5\x2f\xfd").unwrap() - 8;
    bytes[at..at + 8].copy_from_slice(&(1_i64 << 60).to_le_bytes());
    let told = told("rows.arrow", &bytes);
    assert!(told.contains("unpacks to") && told.contains("limit 4294967296"), "{told}");
}

/// Reading never panics or ends the process: it returns rows, or a fault that blames the data.
#[test]
fn damage_gives_rows_or_a_data_fault() {
    let small: Vec<(&str, Vec<u8>)> = all().into_iter().collect();
    let folder = tempfile::tempdir().unwrap();
    let mut random = 12345_u64;
    let mut next = move |below: usize| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as usize % below
    };
    let mut refused = 0;
    for (name, content) in &small {
        for round in 0..60 {
            let mut bytes = content.clone();
            match round % 4 {
                0 => bytes.truncate(next(content.len())),
                1 => {
                    let at = next(bytes.len() - 9);
                    bytes[at..at + 8].copy_from_slice(&(1_u64 << next(64)).to_le_bytes());
                }
                // The places of headers and footers.
                2 => {
                    let end = bytes.len().min(2000);
                    let at = if next(2) == 0 { next(end) } else { bytes.len() - 1 - next(end) };
                    bytes[at] ^= 1 << next(8);
                }
                _ => {
                    let at = next(bytes.len());
                    bytes[at] ^= 1 << next(8);
                }
            }
            for packed in [bytes.clone(), gzip(&bytes)].into_iter().take(if round % 10 == 0 { 2 } else { 1 })
            {
                match read_as(folder.path(), name, &packed, None) {
                    Ok(_) => {}
                    Err(fault) => {
                        assert_eq!(fault.kind, Kind::Data, "{name}: {fault}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 250, "{refused} refused");
}

#[test]
fn an_arrow_type_that_holds_no_text_is_told_as_such() {
    let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Int64, true)]));
    let column: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let batch = RecordBatch::try_new(schema.clone(), vec![column]).unwrap();
    let mut bytes = Vec::new();
    let mut writer = StreamWriter::try_new(&mut bytes, &schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    assert!(told("rows.arrow", &bytes).contains("`text`: Int64"));
}
