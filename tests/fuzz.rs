//! Readers against damaged and strange data: every container and every layout, mutated by a seeded generator. For every
//! input, the reader gives rows or a fault of the data, in bounded time and memory, and never panics. `fuzz/inputs.rs`
//! does the same for all other inputs of a job.
//!
//! `cargo test --test fuzz` tries a few hundred cases of each. `HONE_FUZZ_SECONDS=600` goes on for so long (for each
//! test), and `HONE_FUZZ_SEED=N` begins elsewhere. A case that fails is named by its seed and left in a file.

#[path = "support/data.rs"]
mod data;
#[path = "support/http.rs"]
mod http;
#[path = "fuzz/inputs.rs"]
mod inputs;
#[path = "support/mutate.rs"]
mod mutate;
#[path = "support/random.rs"]
mod random;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, Int64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use data::{OPTIONS, written};
use hone::dataset::{self, BadRows, LossOn, Options, TokenOptions, Tokenizer};
use hone::fault::Kind;
use hone::report::Report;
use mutate::{change, each_case, keep, mutated};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::WriterProperties;
use random::Random;
use serde_json::{Value, json};

/// LIMIT: the longest case; a reader's own limits are in seconds.
const CASE_MAX: Duration = Duration::from_secs(20);

/// Reads the file; `None`: it was refused. Panics, slow cases and faults of another kind are failures.
fn read(seed: u64, name: &str, content: &[u8], options: &Options) -> Option<dataset::Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), name, content);
    let began = Instant::now();
    let read = catch_unwind(AssertUnwindSafe(|| dataset::read(&[file], options, &Report::silent())));
    let failed = match &read {
        Err(_) => Some("panic".to_owned()),
        Ok(Err(fault)) if fault.kind != Kind::Data => Some(format!("{:?}: {fault}", fault.kind)),
        Ok(Err(fault)) if fault.message.len() > 20_000 => Some("a message without end".into()),
        Ok(_) if began.elapsed() > CASE_MAX => Some(format!("it took {:?}", began.elapsed())),
        Ok(_) => None,
    };
    if let Some(what) = failed {
        let kept = keep(seed, name, content);
        panic!("seed {seed}, {name}: {what}; kept in {}", kept.display());
    }
    read.unwrap().ok()
}

/// Returns rows of every layout, as JSON.
fn layouts() -> Vec<Vec<Value>> {
    let call = json!({"type": "function", "id": "a1", "function": {"name": "f", "arguments": {"x": 1}}});
    vec![
        vec![
            json!({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 1}]}),
            json!({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "é"}]}, {"role": "assistant", "content": "5", "reasoning_content": "hm"}], "tools": [{"name": "f"}]}),
        ],
        vec![
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}),
            json!({"conversations": [{"from": "user", "value": "c"}, {"from": "bing", "value": "d"}]}),
        ],
        vec![
            json!({"messages": [{"role": "user", "content": "w?"}, {"role": "assistant", "content": null, "tool_calls": [call]}, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "x"}], "tools": "[{\"name\": \"f\"}]"}),
        ],
        vec![json!({"prompt": "1 + 1 =", "completion": " 2"}), json!({"prompt": "", "completion": "3"})],
        vec![
            json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]}),
        ],
        vec![
            json!({"instruction": "Add", "input": "1 1", "output": "2"}),
            json!({"instruction": "Go", "input": null, "output": "Gone"}),
        ],
        vec![json!({"question": "Why?", "context": "It is.", "answer": "So."})],
        vec![json!({"text": "some text"}), json!({"text": "日本 more"})],
        vec![
            json!({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}),
            json!({"input_ids": [5, 6], "labels": [5, -100], "attention_mask": [1, 0]}),
        ],
        vec![json!({"input_ids": [5, 6], "completion_mask": [0, 1]})],
    ]
}

fn lines(rows: &[Value]) -> Vec<u8> {
    rows.iter().flat_map(|row| (row.to_string() + "\n").into_bytes()).collect()
}

/// Returns columns of text, a list of messages, and lists of numbers, as arrow has them.
fn batches() -> Vec<RecordBatch> {
    let text = |name: &str, values: Vec<Option<&str>>| {
        (Field::new(name, DataType::Utf8, true), Arc::new(StringArray::from(values)) as ArrayRef)
    };
    let numbers = |name: &str, values: &[&[i64]]| {
        let mut list = ListBuilder::new(Int64Builder::new());
        for row in values {
            list.values().append_slice(row);
            list.append(true);
        }
        let array = list.finish();
        (Field::new(name, arrow::array::Array::data_type(&array).clone(), true), Arc::new(array) as ArrayRef)
    };
    let batch = |columns: Vec<(Field, ArrayRef)>| {
        let (fields, arrays): (Vec<Field>, Vec<ArrayRef>) = columns.into_iter().unzip();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
    };
    let long = "many words, many rows; ".repeat(20);
    vec![
        batch(vec![messages(300)]),
        batch(vec![
            text("prompt", vec![Some("a"), Some("b"), Some(&long)]),
            text("completion", vec![Some("c"), None, Some("d")]),
        ]),
        batch(vec![text("text", vec![Some("x"); 700])]),
        batch(vec![
            numbers("input_ids", &[&[5, 6, 7], &[8, 9]]),
            numbers("labels", &[&[-100, 6, 7], &[8, 9]]),
        ]),
    ]
}

fn messages(rows: usize) -> (Field, ArrayRef) {
    let fields = Fields::from(vec![
        Field::new("role", DataType::Utf8, true),
        Field::new("content", DataType::Utf8, true),
    ]);
    let builders: Vec<Box<dyn arrow::array::ArrayBuilder>> =
        vec![Box::new(StringBuilder::new()), Box::new(StringBuilder::new())];
    let mut list = ListBuilder::new(StructBuilder::new(fields, builders));
    for row in 0..rows {
        for (role, content) in [("user", format!("question {row}")), ("assistant", format!("answer {row}"))] {
            let turn = list.values();
            turn.field_builder::<StringBuilder>(0).unwrap().append_value(role);
            turn.field_builder::<StringBuilder>(1).unwrap().append_value(content);
            turn.append(true);
        }
        list.append(true);
    }
    let array = list.finish();
    (Field::new("messages", arrow::array::Array::data_type(&array).clone(), true), Arc::new(array))
}

/// Returns the whole files of every container, by a name that says which.
fn files() -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for (number, rows) in layouts().into_iter().enumerate() {
        files.push((format!("{number}.jsonl"), lines(&rows)));
        files.push((format!("{number}.json"), Value::from(rows.clone()).to_string().into_bytes()));
        let pretty: String =
            rows.iter().map(|row| serde_json::to_string_pretty(row).unwrap() + "\n").collect();
        files.push((format!("{number}.pretty.jsonl"), pretty.into_bytes()));
    }
    let csv = "prompt,completion\n\"a, \"\"b\"\"\",c\n\"two\nlines\",é\n,\n";
    files.push(("a.csv".into(), csv.into()));
    files.push(("a.tsv".into(), csv.replace(',', "\t").into()));
    files.push(("b.csv".into(), format!("text\n{}", "row of text\n".repeat(400)).into()));
    for (number, batch) in batches().iter().enumerate() {
        let compressions = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
            Compression::BROTLI(Default::default()),
            Compression::LZ4_RAW,
        ];
        for (kind, compression) in compressions.into_iter().enumerate() {
            let properties =
                WriterProperties::builder().set_compression(compression).set_data_page_size_limit(2000);
            let mut bytes = Vec::new();
            let mut writer =
                ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties.build())).unwrap();
            writer.write(batch).unwrap();
            writer.close().unwrap();
            files.push((format!("{number}-{kind}.parquet"), bytes));
        }
        for compression in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
            let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
            let (mut file, mut stream) = (Vec::new(), Vec::new());
            let mut writer =
                FileWriter::try_new_with_options(&mut file, &batch.schema(), options.clone()).unwrap();
            writer.write(batch).unwrap();
            writer.finish().unwrap();
            let mut writer =
                StreamWriter::try_new_with_options(&mut stream, &batch.schema(), options).unwrap();
            writer.write(batch).unwrap();
            writer.finish().unwrap();
            files.push((format!("{number}-{compression:?}.arrow"), file));
            files.push((format!("{number}-{compression:?}-stream.arrow"), stream));
        }
    }
    let packed: Vec<(String, Vec<u8>)> = files
        .iter()
        .step_by(5)
        .flat_map(|(name, content)| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(content).unwrap();
            let zstd = zstd::stream::encode_all(content.as_slice(), 1).unwrap();
            [(format!("{name}.gz"), gzip.finish().unwrap()), (format!("{name}.zst"), zstd)]
        })
        .collect();
    files.extend(packed);
    files
}

#[test]
fn whole_files_are_read() {
    let mut sum = 0;
    for (name, content) in files() {
        // A null completion is a bad row.
        let options = Options { bad_rows: BadRows::Drop { share_max: 0.9 }, ..OPTIONS };
        let data = read(0, &name, &content, &options).unwrap_or_else(|| panic!("{name} is refused"));
        assert!(!data.train.is_empty(), "{name}");
        sum += 1;
    }
    assert!(sum > 80, "{sum} files");
}

#[test]
fn no_damage_of_a_file_breaks_its_reader() {
    let files = files();
    each_case(400, |seed| {
        let mut random = Random(seed);
        let (name, content) = random.pick(&files).clone();
        let bytes = mutated(&mut random, &content, &files);
        // Some come under another file's name.
        let name = if random.below(8) == 0 { random.pick(&files).0.clone() } else { name };
        read(seed, &name, &bytes, &OPTIONS);
    });
}

/// Names that readers look for.
const NAMES: [&str; 28] = [
    "messages",
    "conversations",
    "conversation",
    "dialog",
    "role",
    "from",
    "content",
    "value",
    "speaker",
    "text",
    "system",
    "tools",
    "tool_calls",
    "function_call",
    "functions",
    "weight",
    "train",
    "name",
    "documents",
    "chat_template_kwargs",
    "reasoning_content",
    "prompt",
    "completion",
    "instruction",
    "input_ids",
    "labels",
    "label",
    "id",
];

#[test]
fn no_strange_row_breaks_its_layout_or_its_template() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3/model");
    let tokenizer = Tokenizer::open(&model).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat_templates.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let templates: Vec<String> = fixture["templates"]
        .as_object()
        .unwrap()
        .values()
        .map(|text| text.as_str().unwrap().into())
        .collect();
    let layouts = layouts();
    each_case(400, |seed| {
        let mut random = Random(seed);
        let mut rows: Vec<Value> =
            (0..1 + random.below(4)).flat_map(|_| random.pick(&layouts).clone()).collect();
        if random.below(3) > 0 {
            rows = random.pick(&layouts).clone();
        }
        for _ in 0..1 + random.below(4) {
            let at = random.below(rows.len());
            change(&mut random, &NAMES, &mut rows[at]);
        }
        let bad_rows = BadRows::Drop { share_max: 1.0 };
        let options = Options { bad_rows, ..OPTIONS };
        let content = lines(&rows);
        let Some(data) = read(seed, "rows.jsonl", &content, &options) else { return };
        let tokens = TokenOptions {
            tokens_max: 1 + random.below(200),
            loss: *random.pick(&[LossOn::Answers, LossOn::Everything]),
            chat_template: (random.below(3) > 0).then(|| random.pick(&templates).clone()),
            bad_rows,
        };
        let encoded = catch_unwind(AssertUnwindSafe(|| {
            dataset::encode(&data.train, &tokenizer, &tokens, &Report::silent())
        }));
        match encoded {
            Ok(Ok(examples)) => examples.iter().for_each(|example| {
                assert!(
                    example.ids.len() <= tokens.tokens_max && example.ids.len() == example.supervised.len()
                );
                assert!(example.supervised.iter().skip(1).any(|&learned| learned), "seed {seed}");
            }),
            Ok(Err(fault)) if fault.kind == Kind::Data => {}
            Ok(Err(fault)) => {
                panic!("seed {seed}: {fault}; kept in {}", keep(seed, "rows.jsonl", &content).display())
            }
            Err(_) => panic!("seed {seed}: panic; kept in {}", keep(seed, "rows.jsonl", &content).display()),
        }
    });
}
