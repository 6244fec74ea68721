//! Readers against damaged and strange data: every container and every layout, mutated by a seeded generator. Whatever
//! comes, the reader gives rows or a fault of the data, in bounded time and memory, and never panics.
//!
//! `cargo test --test fuzz` tries a few hundred cases of each. `HONE_FUZZ_SECONDS=600` goes on for so long (for each
//! test), and `HONE_FUZZ_SEED=N` begins elsewhere. A case that fails is named by its seed and left in a file.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, Int64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use hone::dataset::{self, BadRows, LossOn, Names, Options, TokenOptions, Tokenizer};
use hone::fault::Kind;
use hone::report::Report;
use hone::source;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};

const OPTIONS: Options = Options {
    layout: None,
    messages_column: None,
    prompt_column: None,
    completion_column: None,
    text_column: None,
    question_column: None,
    shares: Vec::new(),
    container: None,
    names: Names::KNOWN,
    bad_rows: BadRows::Refuse,
    shuffle: false,
    seed: 0,
    train_share: 1.0,
    evaluation_from: None,
    group_column: None,
};
/// Cases of a test without `HONE_FUZZ_SECONDS`.
const CASES: u64 = 400;
/// LIMIT: the longest case; a reader's own limits are in seconds.
const CASE_MAX: Duration = Duration::from_secs(20);

/// Numbers that repeat from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Runs `case` with one seed after the other, for as many or as long as the environment says.
fn each_case(case: impl Fn(u64)) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HONE_FUZZ_SEED").unwrap_or(1);
    let end = number("HONE_FUZZ_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut tried = 0;
    for seed in first.. {
        if end.map_or(tried >= CASES, |end| Instant::now() >= end) {
            break;
        }
        case(seed);
        tried += 1;
    }
    println!("{tried} cases from seed {first}");
    assert!(tried > 0);
}

/// Reads the file; `None`: it was refused. Panics, slow cases and faults of another kind are failures.
fn read(seed: u64, name: &str, content: &[u8], options: &Options) -> Option<dataset::Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blob");
    std::fs::write(&path, content).unwrap();
    let bytes = content.len() as u64;
    let file = source::File { path, name: name.into(), bytes, sha256: String::new(), entry: 0 };
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

fn keep(seed: u64, name: &str, content: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("hone-fuzz-{seed}-{}", name.replace('/', "-")));
    std::fs::write(&path, content).unwrap();
    path
}

/// Rows of every layout, as JSON.
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

/// Columns of text, a list of messages, and lists of numbers, as arrow has them.
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

/// Whole files of every container, by a name that says which.
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

/// One to a dozen changes of bytes, or of a whole part of the file.
fn mutated(random: &mut Random, content: &[u8], others: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = content.to_vec();
    let most = if random.below(3) == 0 { 12 } else { 2 };
    for _ in 0..1 + random.below(most) {
        if bytes.is_empty() {
            break;
        }
        // The ends of binary files are their heads.
        let near_end = random.below(3) == 0;
        let at = match near_end {
            true => bytes.len() - 1 - random.below(bytes.len().min(400)),
            false => random.below(bytes.len()),
        };
        let length = (1 + random.below(64)).min(bytes.len() - at);
        match random.below(9) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => {
                let part = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            5 => {
                // Numbers that lengths and counts are made of.
                let numbers: [i64; 8] =
                    [0, -1, i64::MAX, i64::MIN, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 40];
                let number = random.pick(&numbers).to_le_bytes();
                let width = *random.pick(&[2, 4, 8]);
                let width = width.min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            6 => {
                let (_, other) = random.pick(others);
                let from = random.below(other.len());
                let part = other[from..(from + length * 8).min(other.len())].to_vec();
                bytes.splice(at..at + length, part);
            }
            7 => {
                // Varints of thrift and flatbuffers.
                let part: Vec<u8> = (0..random.below(10)).map(|_| 0x80 | random.next() as u8).collect();
                bytes.splice(at..at + part.len().min(length), part);
            }
            _ => {
                let texts: [&[u8]; 12] = [
                    b"\"",
                    b"\\",
                    b"{",
                    b"[",
                    b"]}",
                    b"\n",
                    b"\r\n",
                    b"\0",
                    b"\xff",
                    b"null",
                    b"\xef\xbb\xbf",
                    b"\\ud800",
                ];
                let text = random.pick(&texts).to_vec();
                bytes.splice(at..at, text);
            }
        }
    }
    bytes
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
    each_case(|seed| {
        let mut random = Random(seed);
        let (name, content) = random.pick(&files).clone();
        let bytes = mutated(&mut random, &content, &files);
        // Some come under another file's name.
        let name = if random.below(8) == 0 { random.pick(&files).0.clone() } else { name };
        read(seed, &name, &bytes, &OPTIONS);
    });
}

/// Values that stand where another kind is expected.
fn strange(random: &mut Random) -> Value {
    let list = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(18446744073709551615_u64),
        json!(1e308),
        json!(0.1),
        json!(""),
        json!(" \n"),
        json!("\u{10f0f0}\u{10fffd}\u{f0f0a}"),
        json!("{% endfor %}{{ x }}"),
        json!("[1, 2]"),
        json!("{\"a\": [null]}"),
        json!("<think></think>"),
        json!("<|eot_id|>"),
        json!([]),
        json!([[]]),
        json!({}),
        json!([null]),
        json!([{"role": "user"}]),
        json!({"role": "assistant", "content": "x"}),
        json!({"type": "image_url"}),
        json!("w ".repeat(3000)),
    ];
    random.pick(&list).clone()
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

/// Changes one place of a row: a value, a name, or what a list holds.
fn change(random: &mut Random, value: &mut Value) {
    let stop = random.below(4) == 0;
    match value {
        Value::Object(fields) if !fields.is_empty() && !stop => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = random.pick(&keys).clone();
            match random.below(6) {
                0 => {
                    let moved = fields.remove(&key).unwrap();
                    let name = *random.pick(&NAMES);
                    let name = if random.below(5) == 0 { name.to_uppercase() } else { name.to_owned() };
                    fields.insert(name, moved);
                }
                1 => drop(fields.remove(&key)),
                2 => {
                    let (name, added) = (*random.pick(&NAMES), strange(random));
                    fields.insert(name.to_owned(), added);
                }
                _ => change(random, fields.get_mut(&key).unwrap()),
            }
        }
        Value::Array(items) if !items.is_empty() && !stop => {
            let at = random.below(items.len());
            match random.below(6) {
                0 => drop(items.remove(at)),
                1 => items.insert(at, items[at].clone()),
                2 => items.insert(at, strange(random)),
                _ => change(random, &mut items[at]),
            }
        }
        value => *value = strange(random),
    }
}

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
    each_case(|seed| {
        let mut random = Random(seed);
        let mut rows: Vec<Value> =
            (0..1 + random.below(4)).flat_map(|_| random.pick(&layouts).clone()).collect();
        if random.below(3) > 0 {
            rows = random.pick(&layouts).clone();
        }
        for _ in 0..1 + random.below(4) {
            let at = random.below(rows.len());
            change(&mut random, &mut rows[at]);
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
