//! Parquet files to token examples, compared with token ids and masks from transformers, and read from damaged
//! files.

#[path = "support/data.rs"]
mod data;

use arrow::array::*;
use arrow::buffer::OffsetBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields, Schema};
use data::OPTIONS;
use expect_test::{Expect, expect};
use hone::dataset::{
    self, BadRows, Context, Conversation, Dataset, Layout, LossOn, Options, TokenOptions, Tokenizer,
};
use hone::fault::{Fault, Kind};
use hone::report::Report;
use hone::source;
use parquet::arrow::ArrowWriter;
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

fn file(path: &Path) -> source::File {
    let name = path.file_name().unwrap().to_str().unwrap().to_string();
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    source::File { path: path.to_path_buf(), name, bytes, sha256: String::new(), entry: 0 }
}

fn read(path: &Path) -> Result<Dataset, Fault> {
    dataset::read(&[file(path)], &OPTIONS, &Report::silent())
}

fn encode_with(
    data: &Dataset,
    tokenizer: &Tokenizer,
    loss: LossOn,
    template: Option<&str>,
) -> Result<Vec<dataset::Example>, Fault> {
    let options = TokenOptions {
        tokens_max: 4096,
        loss,
        chat_template: template.map(String::from),
        bad_rows: BadRows::Refuse,
    };
    dataset::encode(&data.train, tokenizer, &options, &Report::silent())
}

/// Compares the ids of every row, and the positions that are not learned, with those that the reference wrote.
fn check_golden(data: &str, model: &str, tokens: &str, loss: LossOn) {
    let data = read(&golden(data)).unwrap();
    let tokenizer = Tokenizer::open(&golden(model)).unwrap();
    let examples = encode_with(&data, &tokenizer, loss, None).unwrap();
    let lines = std::fs::read_to_string(golden(tokens)).unwrap();
    assert!(examples.len() == 500 && lines.lines().count() >= 112, "{tokens}: rows");
    for (example, line) in examples.iter().zip(lines.lines()) {
        let expected: serde_json::Value = serde_json::from_str(line).unwrap();
        let row = &expected["row"];
        assert_eq!(serde_json::json!(example.ids), expected["input_ids"], "{model}, row {row}");
        let ignored: Vec<usize> =
            (0..example.ids.len()).filter(|&index| !example.supervised[index]).collect();
        let none = serde_json::json!([]);
        assert_eq!(
            serde_json::json!(ignored),
            *expected.get("ignored").unwrap_or(&none),
            "{model}, row {row}"
        );
    }
}

#[test]
fn conversations_have_the_tokens_that_transformers_gives() {
    check_golden("_data/messages.parquet", "llama3/model", "llama3/tokens.jsonl", LossOn::Everything);
    check_golden("_data/messages.parquet", "phi3/model", "phi3/tokens.jsonl", LossOn::Everything);
    for family in ["mistral", "qwen2", "qwen3", "gemma2", "falcon7b", "phi2"] {
        let (model, tokens) = (format!("{family}/model"), format!("{family}/tokens.jsonl"));
        check_golden("_data/messages.parquet", &model, &tokens, LossOn::Everything);
    }
}

#[test]
fn only_answers_and_their_end_of_turn_are_learned() {
    check_golden(
        "_data/messages.parquet",
        "llama3/model",
        "_variants/assistant_only/tokens.jsonl",
        LossOn::Answers,
    );
}

/// `tests/scripts/generation_marks.py` wrote what transformers learns of templates with `{% generation %}`.
#[test]
fn answers_that_a_template_marks_are_those_that_transformers_learns() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/generation_marks.json");
    let fixture: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let tokenizer = Tokenizer::open(&golden("llama3/model")).unwrap();
    let mut refused = 0;
    for case in fixture["cases"].as_array().unwrap() {
        let (name, messages) = (case["template"].as_str().unwrap(), case["messages"].as_array().unwrap());
        let message = |message: &serde_json::Value| {
            dataset::Message::new(message["role"].as_str().unwrap(), message["content"].as_str().unwrap())
        };
        let record = dataset::Record {
            conversation: Conversation::Messages(messages.iter().map(message).collect()),
            context: Context::default(),
            file: "talks".into(),
            row: 0,
            entry: 0,
            group: None,
        };
        let data = Dataset { train: vec![record], evaluation: Vec::new(), layout: Layout::Messages };
        let template = fixture["templates"][name].as_str().unwrap();
        let examples = encode_with(&data, &tokenizer, LossOn::Answers, Some(template));
        if case["refused"].is_string() {
            assert!(examples.is_err(), "{name}: {messages:?}");
            refused += 1;
            continue;
        }
        let example = &examples.unwrap_or_else(|fault| panic!("{name}: {fault}: {messages:?}"))[0];
        assert_eq!(example.ids.len(), case["tokens"].as_u64().unwrap() as usize, "{name}: {messages:?}");
        let mut runs: Vec<[usize; 2]> = Vec::new();
        for index in (0..example.ids.len()).filter(|&index| example.supervised[index]) {
            match runs.last_mut().filter(|run| run[1] + 1 == index) {
                Some(run) => run[1] = index,
                None => runs.push([index, index]),
            }
        }
        assert_eq!(
            serde_json::json!(runs),
            case["learned"],
            "{name}: {}",
            dataset::show(example, &tokenizer)
        );
    }
    assert!(fixture["cases"].as_array().unwrap().len() - refused > 200);
}

#[test]
fn only_completions_are_learned() {
    check_golden(
        "_data/prompt_completion.parquet",
        "llama3/model",
        "_variants/completion_only/tokens.jsonl",
        LossOn::Answers,
    );
}

#[test]
fn plain_text_ends_with_the_end_token_and_is_all_learned() {
    let data = read(&golden("_data/text.parquet")).unwrap();
    assert_eq!(data.layout, Layout::Text);
    let tokenizer = Tokenizer::open(&golden("llama3/model")).unwrap();
    for example in encode_with(&data, &tokenizer, LossOn::Answers, None).unwrap() {
        assert_eq!(example.ids.last(), Some(&tokenizer.eos_id()));
        assert_eq!(Some(example.ids[0]), tokenizer.bos_id());
        assert!(example.supervised.iter().all(|&learned| learned));
    }
}

fn message(role: &str, content: &str) -> dataset::Message {
    dataset::Message::new(role, content)
}

fn of(conversation: Conversation) -> Dataset {
    let context = Context::default();
    let record =
        dataset::Record { conversation, context, file: "f.parquet".into(), row: 3, entry: 0, group: None };
    Dataset { train: vec![record], evaluation: vec![], layout: Layout::Messages }
}

/// Compares the mask of a conversation, as text; a fault begins with `!`.
fn check_mask(model: &str, template: Option<&str>, conversation: Conversation, expected: Expect) {
    let tokenizer = Tokenizer::open(&golden(model)).unwrap();
    let shown = match encode_with(&of(conversation), &tokenizer, LossOn::Answers, template) {
        Ok(examples) => dataset::show(&examples[0], &tokenizer),
        Err(fault) => format!("! {:?} {fault}", fault.kind),
    };
    expected.assert_eq(&shown);
}

fn two_turns() -> Conversation {
    Conversation::Messages(vec![
        message("user", "2+2?"),
        message("assistant", "4"),
        message("user", "Größe?"),
        message("assistant", "  ein Meter ünd 日\n"),
    ])
}

#[test]
fn masks_of_golden_templates() {
    check_mask(
        "phi3/model",
        None,
        two_turns(),
        expect![[r#"
        [<|user|> 2+2?<|end|><|assistant|>]4<|end|>[<|user|> Größe?<|end|><|assistant|>]ein Meter ünd 日
        <|end|><|endoftext|>"#]],
    );
    check_mask(
        "llama3/model",
        None,
        two_turns(),
        expect![[r#"
        [<|begin_of_text|><|start_header_id|>system<|end_header_id|>

        Today is 26 Jul 2024

        <|eot_id|><|start_header_id|>user<|end_header_id|>

        2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

        ]4<|eot_id|>[<|start_header_id|>user<|end_header_id|>

        Größe?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

        ]ein Meter ünd 日<|eot_id|>"#]],
    );
    let Conversation::Messages(messages) = two_turns() else { unreachable!() };
    let (prompt, completion) = (messages[..3].to_vec(), messages[3..].to_vec());
    check_mask(
        "phi3/model",
        None,
        Conversation::Prompt { prompt, completion },
        expect![[r#"
        [<|user|> 2+2?<|end|><|assistant|> 4<|end|><|user|> Größe?<|end|><|assistant|>]ein Meter ünd 日
        <|end|><|endoftext|>"#]],
    );
    let plain = Conversation::PromptText { prompt: "2+2=".into(), completion: "4".into() };
    check_mask("phi3/model", None, plain, expect!["[2+2=]4<|endoftext|>"]);
}

#[test]
fn masks_of_other_templates() {
    let fixture: serde_json::Value = serde_json::from_str(include_str!("fixtures/templates.json")).unwrap();
    let check = |name: &str, conversation, expected| {
        check_mask(
            "llama3/model",
            Some(fixture["templates"][name].as_str().unwrap()),
            conversation,
            expected,
        );
    };
    check(
        "chatml",
        two_turns(),
        expect![[r#"
        [<|im_start|>user
        2+2?<|im_end|>
        <|im_start|>assistant
        ]4<|im_end|>
        [<|im_start|>user
        Größe?<|im_end|>
        <|im_start|>assistant
        ]  ein Meter ünd 日
        <|im_end|>
    "#]],
    );
    check(
        "mistral",
        two_turns(),
        expect![
            "[<|begin_of_text|>[INST] 2+2?[/INST]] 4<|eot_id|>[[INST] Größe?[/INST]] ein Meter ünd 日<|eot_id|>"
        ],
    );
    check(
        "generation",
        two_turns(),
        expect![[r#"
        [<|user|>
        2+2?<|end|>
        <|assistant|>
        ]4<|end|>[
        <|user|>
        Größe?<|end|>
        <|assistant|>
        ]  ein Meter ünd 日
        <|end|>[
        ]"#]],
    );
    check(
        "generation_plain_crlf",
        two_turns(),
        expect![[r#"
        [  User: 2+2?
          A: ]4<|eot_id|>[
          User: Größe?
          A:]   ein Meter ünd 日
        <|eot_id|>[
        ]"#]],
    );
    let thoughts = Conversation::Messages(vec![
        message("user", "2+2?"),
        message("assistant", "<think>\nhm\n</think>\n\nFour"),
        message("user", "sure?"),
        message("assistant", "<think>\nyes\n</think>\n\nYes"),
    ]);
    check(
        "thinking",
        thoughts,
        expect![[r#"
        [<|im_start|>user
        2+2?<|im_end|>
        <|im_start|>assistant
        ]Four<|im_end|>
        [<|im_start|>user
        sure?<|im_end|>
        <|im_start|>assistant
        ]<think>
        yes
        </think>

        Yes<|im_end|>
    "#]],
    );
    check(
        "thinking",
        two_turns(),
        expect![[r#"
        [<|im_start|>user
        2+2?<|im_end|>
        <|im_start|>assistant
        ]4<|im_end|>
        [<|im_start|>user
        Größe?<|im_end|>
        <|im_start|>assistant
        ]<think>

        </think>

          ein Meter ünd 日
        <|im_end|>
    "#]],
    );
    // The same words occur in question and answer. The answer is found after the question.
    let echo = Conversation::Messages(vec![
        message("user", "yes"),
        message("assistant", "yes"),
        message("user", "yes"),
        message("assistant", "yes"),
    ]);
    check_mask(
        "phi3/model",
        None,
        echo,
        expect![
            "[<|user|> yes<|end|><|assistant|>]yes<|end|>[<|user|> yes<|end|><|assistant|>]yes<|end|><|endoftext|>"
        ],
    );
}

/// Short answers occur in headers, and questions in answers.
#[test]
fn an_answer_is_not_found_in_a_header_or_a_question() {
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let turns = [
        ("user", "user a"),
        ("assistant", "a"),
        ("user", "s"),
        ("assistant", "assistant"),
        ("user", "\u{1f642}"),
        ("assistant", "s"),
    ];
    let talk = || Conversation::Messages(turns.iter().map(|(role, text)| message(role, text)).collect());
    check_mask(
        "llama3/model",
        Some(chatml),
        talk(),
        expect![[r#"
        [<|im_start|>user
        user a<|im_end|><|im_start|>assistant
        ]a<|im_end|>[<|im_start|>user
        s<|im_end|><|im_start|>assistant
        ]assistant<|im_end|>[<|im_start|>user
        🙂<|im_end|><|im_start|>assistant
        ]s<|im_end|>"#]],
    );
    check_mask(
        "phi3/model",
        None,
        talk(),
        expect![
            "[<|user|> user a<|end|><|assistant|>]a<|end|>[<|user|> s<|end|><|assistant|>]assistant<|end|>[<|user|> 🙂<|end|><|assistant|>]s<|end|><|endoftext|>"
        ],
    );
}

#[test]
fn templates_that_hide_or_refuse_a_row_are_named_with_it() {
    let hides = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    check_mask(
        "llama3/model",
        Some(hides),
        two_turns(),
        expect![[r#"
            ! Data 1 of 1 rows cannot be used:
              1 x the chat template does not show what the assistant says (f.parquet:3)
              help: correct these rows, set ModelConfig.chat_template, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)"#]],
    );
    let refuses = "{{ raise_exception('roles must alternate') }}";
    check_mask(
        "llama3/model",
        Some(refuses),
        two_turns(),
        expect![[r#"
            ! Data 1 of 1 rows cannot be used:
              1 x the chat template refuses it: roles must alternate (f.parquet:3)
              help: correct these rows, set ModelConfig.chat_template, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)"#]],
    );
    check_mask(
        "llama3/model",
        Some("{% if %}"),
        two_turns(),
        expect![
            "! Config ModelConfig.chat_template: the chat template fails at line 1: syntax error: unexpected end of block"
        ],
    );
}

#[test]
fn a_tokenizer_folder_is_checked_before_use() {
    let folder = tempfile::tempdir().unwrap();
    let problem = |folder: &Path| Tokenizer::open(folder).err().map(|fault| (fault.kind, fault.message));
    assert!(
        problem(folder.path())
            .is_some_and(|(kind, text)| kind == Kind::Model && text.contains("tokenizer.json is missing"))
    );
    std::fs::copy(golden("llama3/model/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    assert!(
        problem(folder.path()).is_some_and(
            |(kind, text)| kind == Kind::Model && text.contains("tokenizer_config.json is missing")
        )
    );
    let config = folder.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"eos_token": {"content": "<|eot_id|>"}, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(
        (tokenizer.chat_template(), tokenizer.eos_id(), tokenizer.vocab_size()),
        (Some("d"), 1023, 1024)
    );
    std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(Tokenizer::open(folder.path()).unwrap().chat_template(), Some("file"));
    std::fs::write(&config, "{}").unwrap();
    assert!(problem(folder.path()).is_some_and(|(_, text)| text.contains("no end-of-sequence token")));
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [1019, 1023]}"#)
        .unwrap();
    assert_eq!(Tokenizer::open(folder.path()).unwrap().eos(), "<|end_of_text|>");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let fault = encode_with(&of(two_turns()), &tokenizer, LossOn::Answers, None).unwrap_err();
    assert!(fault.kind == Kind::Config && fault.help.unwrap().contains("ModelConfig.chat_template"));
}

#[test]
fn cutting_drops_what_has_no_answer_left_and_refuses_to_learn_nothing() {
    let data = read(&golden("_data/messages.parquet")).unwrap();
    let tokenizer = Tokenizer::open(&golden("llama3/model")).unwrap();
    let encode = |tokens_max| {
        let options = TokenOptions {
            tokens_max,
            loss: LossOn::Answers,
            chat_template: None,
            bad_rows: BadRows::Refuse,
        };
        dataset::encode(&data.train, &tokenizer, &options, &Report::silent())
    };
    let some = encode(60).unwrap();
    assert!(!some.is_empty() && some.len() < 500 && some.iter().all(|example| example.ids.len() <= 60));
    assert!(some.iter().all(|example| example.supervised[1..].contains(&true)));
    let fault = encode(5).unwrap_err();
    assert!(
        fault.kind == Kind::Data
            && fault.message.starts_with("nothing left to supervise: 500 rows, 500 of them cut"),
        "{fault}"
    );
}

// ---- parquet files of every kind

fn strings(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// Returns one list of messages per row, with fields in the given order.
fn lists(rows: &[&[(&str, &str)]], names: [&str; 2], kind: &DataType) -> ArrayRef {
    let all: Vec<_> = rows.iter().flat_map(|row| row.iter()).collect();
    let column = |role: bool| {
        let values: Vec<_> = all.iter().map(|(r, c)| Some(if role { *r } else { *c })).collect();
        cast(&strings(&values), kind).unwrap()
    };
    let is_role = |name: &str| name == "role" || name == "from";
    let extra: ArrayRef = Arc::new(Int32Array::from(vec![7; all.len()]));
    let fields: Fields = vec![
        Field::new(names[0], kind.clone(), true),
        Field::new("number", DataType::Int32, true),
        Field::new(names[1], kind.clone(), true),
    ]
    .into();
    let turns = StructArray::new(
        fields.clone(),
        vec![column(is_role(names[0])), extra, column(is_role(names[1]))],
        None,
    );
    let offsets = OffsetBuffer::<i32>::from_lengths(rows.iter().map(|row| row.len()));
    Arc::new(ListArray::new(
        Arc::new(Field::new("item", DataType::Struct(fields), true)),
        offsets,
        Arc::new(turns),
        None,
    ))
}

const ROWS: [&[(&str, &str)]; 3] = [
    &[("user", "a"), ("assistant", "é")],
    &[("system", "s"), ("user", "b"), ("assistant", "日本")],
    &[("user", "c"), ("assistant", "d")],
];

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>, compression: Compression, version: WriterVersion) {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let batch =
        RecordBatch::try_new(schema.clone(), columns.into_iter().map(|(_, array)| array).collect()).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_writer_version(version)
        .set_max_row_group_row_count(Some(2))
        .build();
    let mut writer =
        ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn written(columns: Vec<(&str, ArrayRef)>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    write(&path, columns, Compression::SNAPPY, WriterVersion::PARQUET_1_0);
    (folder, path)
}

fn conversations(data: &Dataset) -> Vec<Vec<(String, String)>> {
    let turns = |record: &dataset::Record| match &record.conversation {
        Conversation::Messages(messages) => {
            messages.iter().map(|m| (m.role.clone(), m.text().to_owned())).collect()
        }
        other => panic!("{other:?}"),
    };
    data.train.iter().map(turns).collect()
}

fn expected() -> Vec<Vec<(String, String)>> {
    ROWS.iter().map(|row| row.iter().map(|(r, c)| (r.to_string(), c.to_string())).collect()).collect()
}

#[test]
fn every_codec_string_kind_list_kind_and_field_order_reads_the_same() {
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(ZstdLevel::default()),
        Compression::GZIP(GzipLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::BROTLI(BrotliLevel::default()),
    ];
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let kinds = [DataType::Utf8, DataType::LargeUtf8, DataType::Utf8, DataType::Binary, dictionary];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.parquet");
    let check = |array: ArrayRef, codec, version, what: &str| {
        let index: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3]));
        write(&path, vec![("__index_level_0__", index), ("messages", array)], codec, version);
        let data = read(&path).unwrap_or_else(|fault| panic!("{what}: {fault}"));
        assert_eq!((conversations(&data), data.layout), (expected(), Layout::Messages), "{what}");
        assert_eq!(data.train.iter().map(|record| record.row).collect::<Vec<_>>(), [0, 1, 2], "{what}");
    };
    for codec in codecs {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            check(lists(&ROWS, ["role", "content"], &DataType::Utf8), codec, version, &format!("{codec:?}"));
        }
    }
    for kind in kinds {
        for names in [["role", "content"], ["content", "role"]] {
            check(
                lists(&ROWS, names, &kind),
                Compression::SNAPPY,
                WriterVersion::PARQUET_1_0,
                &format!("{kind} {names:?}"),
            );
        }
    }
    let list = lists(&ROWS, ["role", "content"], &DataType::Utf8);
    let DataType::List(field) = list.data_type().clone() else { unreachable!() };
    let large = cast(&list, &DataType::LargeList(field)).unwrap();
    check(large, Compression::SNAPPY, WriterVersion::PARQUET_1_0, "LargeList");
}

#[test]
fn other_layouts_are_found_by_their_columns() {
    let from: [&[(&str, &str)]; 1] = [&[("human", "a"), ("gpt", "b")]];
    let (_keep, path) = written(vec![("conversations", lists(&from, ["from", "value"], &DataType::Utf8))]);
    assert_eq!(
        conversations(&read(&path).unwrap()),
        [[("user".into(), "a".into()), ("assistant".into(), "b".into())]]
    );
    let (_keep, path) =
        written(vec![("completion", strings(&[Some("b")])), ("prompt", strings(&[Some("a")]))]);
    let text = Conversation::PromptText { prompt: "a".into(), completion: "b".into() };
    assert_eq!(read(&path).unwrap().train[0].conversation, text);
    let prompt: [&[(&str, &str)]; 1] = [&[("user", "a")]];
    let completion: [&[(&str, &str)]; 1] = [&[("assistant", "b")]];
    let list = |rows| lists(rows, ["role", "content"], &DataType::Utf8);
    let (_keep, path) = written(vec![("prompt", list(&prompt)), ("completion", list(&completion))]);
    let both = Conversation::Prompt {
        prompt: vec![message("user", "a")],
        completion: vec![message("assistant", "b")],
    };
    assert_eq!(read(&path).unwrap().train[0].conversation, both);
    // A layout or a column name from the configuration takes precedence over detection.
    let (_keep, path) = written(vec![
        ("messages", list(&prompt)),
        ("text", strings(&[Some("t")])),
        ("body", strings(&[Some("x")])),
    ]);
    let read = |options: Options| dataset::read(&[file(&path)], &options, &Report::silent());
    let data = read(Options { layout: Some(Layout::Text), ..OPTIONS }).unwrap();
    assert_eq!(data.train[0].conversation, Conversation::Text("t".into()));
    let data = read(Options { text_column: Some("body".into()), ..OPTIONS }).unwrap();
    assert_eq!(data.train[0].conversation, Conversation::Text("x".into()));
    let fault = read(Options { text_column: Some("boddy".into()), ..OPTIONS }).unwrap_err();
    assert!(
        fault.kind == Kind::Data
            && fault.message.contains(
                "there is no column `boddy`, which TrainingArguments.dataset_text_field names; columns found: `messages`"
            ),
        "{fault}"
    );
}

fn check_fault(columns: Vec<(&str, ArrayRef)>, expected: Expect) {
    let (_keep, path) = written(columns);
    let fault = read(&path).unwrap_err();
    assert_eq!(fault.kind, Kind::Data);
    expected.assert_eq(&fault.to_string());
}

#[test]
fn rows_that_cannot_be_used_are_counted_by_kind_and_named() {
    let rows: [&[(&str, &str)]; 4] = [&[], &[("user", " ")], &[("usr", "a")], &[("user", "")]];
    check_fault(
        vec![("messages", lists(&rows, ["role", "content"], &DataType::Utf8))],
        expect![[r#"
            2 of 4 rows cannot be used:
              1 x the list of messages is empty (data.parquet:0)
              1 x unknown role "usr"; known are system, system_prompt, developer, user, human, prompter, customer, client, instruction, question, assistant, gpt, chatgpt, bing, bard, claude, gemini, model, bot, chatbot, ai, llm, agent, response, answer, output, function_call, tool, tool_response, tool_result, observation, function_response, function, ipython (name yours with `user_names` or `assistant_names`) (data.parquet:2)
              help: correct these rows, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)"#]],
    );
    check_fault(
        vec![("text", strings(&[Some("a"), None, None]))],
        expect![[r#"
            2 of 3 rows cannot be used:
              2 x the text is null (data.parquet:1, data.parquet:2)
              help: correct these rows, or leave them out with `bad_rows: drop` (places are file:row, counted from 0)"#]],
    );
    check_fault(
        vec![("question", strings(&[Some("a")])), ("id", Arc::new(Int32Array::from(vec![1])))],
        expect![[r#"
            data.parquet: there is `question` but no `answer` (name it with DatasetConfig.response_column); columns found: `question`: Utf8, `id`: Int32
              help: rename the columns, or name them with DatasetConfig.messages_column, DatasetConfig.context_column, DatasetConfig.response_column, TrainingArguments.dataset_text_field, question_column"#]],
    );
    check_fault(
        vec![("text", strings(&[]))],
        expect![[r#"
        the dataset has 0 rows in 1 file(s): data.parquet
          help: check the export that wrote the files, and the path or URL they were taken from"#]],
    );
    let bytes: ArrayRef = Arc::new(BinaryArray::from(vec![&b"ok"[..], b"\xff\xfe"]));
    check_fault(
        vec![("text", bytes)],
        expect![
            "data.parquet: row group 0: cannot read it as text: Invalid argument error: Encountered non-UTF-8 data at index 1: invalid utf-8 sequence of 1 bytes from index 0"
        ],
    );
}

#[test]
fn files_of_two_layouts_are_refused_by_name() {
    let (keep, first) = written(vec![("text", strings(&[Some("a")]))]);
    let second = keep.path().join("other.parquet");
    write(
        &second,
        vec![("prompt", strings(&[Some("a")])), ("completion", strings(&[Some("b")]))],
        Compression::SNAPPY,
        WriterVersion::PARQUET_1_0,
    );
    let fault = dataset::read(&[file(&first), file(&second)], &OPTIONS, &Report::silent()).unwrap_err();
    assert_eq!(
        fault.message,
        "the files do not have one layout: data.parquet holds text, other.parquet holds prompt and completion"
    );
}

#[test]
fn files_follow_in_the_order_given() {
    let (keep, first) = written(vec![("text", strings(&[Some("a"), Some("b")]))]);
    let second = keep.path().join("other.parquet");
    write(&second, vec![("text", strings(&[Some("c")]))], Compression::SNAPPY, WriterVersion::PARQUET_1_0);
    let options = Options { train_share: 0.67, ..OPTIONS };
    let data = dataset::read(&[file(&second), file(&first)], &options, &Report::silent()).unwrap();
    let place = |record: &dataset::Record| format!("{}:{}", record.file, record.row);
    assert_eq!(
        data.train.iter().chain(&data.evaluation).map(place).collect::<Vec<_>>(),
        ["other.parquet:0", "data.parquet:0", "data.parquet:1"]
    );
    assert_eq!(data.evaluation.len(), 1);
}

// ---- damage

/// Returns whether the bytes are read as rows. Reading never panics or ends the process; a fault blames the data.
fn survives(path: &Path, bytes: &[u8]) -> bool {
    std::fs::write(path, bytes).unwrap();
    match read(path) {
        Ok(_) => true,
        Err(fault) => {
            assert_eq!(fault.kind, Kind::Data, "{fault}");
            assert!(fault.message.contains("data.parquet") || fault.message.contains("rows"), "{fault}");
            false
        }
    }
}

#[test]
fn truncated_files_are_data_faults_wherever_they_end() {
    let (_keep, path) = written(vec![("messages", lists(&ROWS, ["role", "content"], &DataType::Utf8))]);
    let whole = std::fs::read(&path).unwrap();
    assert!(survives(&path, &whole));
    for length in (0..whole.len()).step_by(7).chain(whole.len() - 12..whole.len()) {
        assert!(!survives(&path, &whole[..length]), "{length} of {} bytes", whole.len());
    }
    // The end of a cut file may look like that of a whole one.
    for length in (0..whole.len() - 12).step_by(31) {
        assert!(!survives(&path, &[&whole[..length], &whole[whole.len() - 8..]].concat()), "{length}");
    }
}

#[test]
fn flipped_bits_are_rows_or_data_faults() {
    let (_keep, path) = written(vec![("messages", lists(&ROWS, ["role", "content"], &DataType::Utf8))]);
    for codec in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())] {
        write(
            &path,
            vec![("messages", lists(&ROWS, ["role", "content"], &DataType::Utf8))],
            codec,
            WriterVersion::PARQUET_1_0,
        );
        let whole = std::fs::read(&path).unwrap();
        let (mut random, mut refused) = (12345_u64, 0);
        for _ in 0..400 {
            let mut bytes = whole.clone();
            for _ in 0..2 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let bit = (random >> 33) as usize % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            refused += usize::from(!survives(&path, &bytes));
        }
        assert!(refused > 150, "{codec:?}: {refused} of 400 damaged files refused");
    }
}
