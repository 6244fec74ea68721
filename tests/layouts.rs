//! Layouts other than conversations, and several datasets in one run.

#[path = "support/data.rs"]
mod data;

use data::OPTIONS;
use hone::dataset::{
    self, BadRows, Conversation, Dataset, Layout, LossOn, Options, Share, TokenOptions, Tokenizer,
};
use hone::fault::{Fault, Kind};
use hone::report::Report;
use hone::source;
use std::path::Path;

/// Returns files of JSON lines, each an entry of its own.
fn read(entries: &[&str], options: &Options) -> Result<Dataset, Fault> {
    let folder = tempfile::tempdir().unwrap();
    let file = |(entry, content): (usize, &&str)| {
        let name = format!("{entry}.jsonl");
        let path = folder.path().join(&name);
        std::fs::write(&path, content).unwrap();
        source::File { path, name, bytes: content.len() as u64, sha256: String::new(), entry }
    };
    let files: Vec<source::File> = entries.iter().enumerate().map(file).collect();
    dataset::read(&files, options, &Report::silent())
}

fn turns(data: &Dataset) -> Vec<String> {
    let row = |record: &dataset::Record| match &record.conversation {
        Conversation::Messages(messages) => {
            messages.iter().map(|m| format!("{}: {}", m.role, m.text())).collect::<Vec<_>>().join(" | ")
        }
        Conversation::Text(text) => format!("text {text}"),
        other => format!("{other:?}"),
    };
    data.train.iter().map(row).collect()
}

#[test]
fn alpaca_and_question_answer_become_two_turns() {
    let alpaca = r#"{"instruction": "Add", "input": "1 1", "output": "2"}
{"instruction": "Greet", "input": "", "output": "Hi"}
{"instruction": "Go", "input": null, "output": "Gone"}"#;
    let data = read(&[alpaca], &OPTIONS).unwrap();
    assert_eq!(data.layout, Layout::Alpaca);
    assert_eq!(
        turns(&data),
        ["user: Add\n\n1 1 | assistant: 2", "user: Greet | assistant: Hi", "user: Go | assistant: Gone"]
    );
    let plain = read(&[r#"{"instruction": "a", "output": "b"}"#], &OPTIONS).unwrap();
    assert_eq!(turns(&plain), ["user: a | assistant: b"]);

    let pairs = r#"{"question": "Why?", "context": "It is.", "answer": "So."}"#;
    let data = read(&[pairs], &OPTIONS).unwrap();
    assert_eq!(
        (data.layout, turns(&data)),
        (Layout::QuestionAnswer, vec!["user: It is.\n\nWhy? | assistant: So.".into()])
    );

    let mapped = Options {
        layout: Some(Layout::QuestionAnswer),
        question_column: Some("q".into()),
        prompt_column: Some("passage_text".into()),
        completion_column: Some("gold".into()),
        ..OPTIONS
    };
    let data =
        read(&[r#"{"q": "Why?", "passage_text": "P", "gold": "G", "answer": "no"}"#], &mapped).unwrap();
    assert_eq!(turns(&data), ["user: P\n\nWhy? | assistant: G"]);
    let fault = read(&[r#"{"instruction": "a", "output": ""}"#], &OPTIONS).unwrap_err();
    assert!(
        fault.kind == Kind::Data && fault.message.contains("1 x the output is empty (0.jsonl:0)"),
        "{fault}"
    );
}

/// A column that belongs to the layout is never left out because its type is wrong: the answer would be learned without
/// what it depends on.
#[test]
fn a_column_of_the_wrong_type_is_not_left_out() {
    for (row, words) in [
        (r#"{"instruction": "Double it", "input": 4, "output": "8"}"#, "`input` is Int64; text is needed"),
        (r#"{"question": "Why?", "context": ["a", "b"], "answer": "So."}"#, "`context` is List"),
    ] {
        let fault = read(&[row], &OPTIONS).unwrap_err();
        assert!(fault.kind == Kind::Data && fault.message.contains(words), "{row}: {fault}");
    }
    let printed = r#"{"messages": "[{'role': 'user', 'content': 'a'}]"}"#;
    let fault = read(&[printed], &OPTIONS).unwrap_err();
    assert!(fault.message.contains("write it with json.dumps (0.jsonl:0)"), "{fault}");
    // A layout that lacks a column has no wrong type.
    let fault = read(&[r#"{"query": "q", "answers": "a"}"#], &OPTIONS).unwrap_err();
    assert!(fault.message.contains("there is `query` but no `answer`"), "{fault}");
    assert!(fault.help.is_some_and(|help| help.starts_with("rename the columns")));
    let fault = read(&[r#"{"question": "q", "choices": ["a"], "answer": 1}"#], &OPTIONS).unwrap_err();
    assert!(
        fault.message.starts_with("0.jsonl: `answer` is Int64; text is needed; columns found"),
        "{fault}"
    );
}

#[test]
fn a_text_column_comes_before_its_own_parts_as_today() {
    let row = r#"{"instruction": "a", "output": "b", "text": "a b"}"#;
    assert_eq!(turns(&read(&[row], &OPTIONS).unwrap()), ["text a b"]);
    let asked = Options { layout: Some(Layout::Alpaca), ..OPTIONS };
    assert_eq!(turns(&read(&[row], &asked).unwrap()), ["user: a | assistant: b"]);
}

/// The ids of each row, and whether each is learned.
type Rows = Vec<(Vec<u32>, Vec<bool>)>;

fn examples(content: &str) -> Result<Rows, Fault> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama3/model");
    let tokenizer = Tokenizer::open(&model).unwrap();
    let options =
        TokenOptions { tokens_max: 4, loss: LossOn::Answers, chat_template: None, bad_rows: BadRows::Refuse };
    let data = read(&[content], &OPTIONS)?;
    let examples = dataset::encode(&data.train, &tokenizer, &options, &Report::silent())?;
    Ok(examples.into_iter().map(|example| (example.ids, example.supervised)).collect())
}

#[test]
fn rows_of_tokens_are_taken_as_they_are() {
    let labels = r#"{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "attention_mask": [1, 1, 1, 1, 1]}
{"input_ids": [0, 5, 6], "labels": [-100, 5, 6], "attention_mask": [0, 1, 1]}"#;
    assert_eq!(
        examples(labels).unwrap(),
        [(vec![5, 6, 7, 8], vec![false, false, true, true]), (vec![5, 6], vec![true, true])]
    );
    let mask = r#"{"input_ids": [5, 6], "completion_mask": [0, 1]}"#;
    assert_eq!(examples(mask).unwrap(), [(vec![5, 6], vec![false, true])]);
    let flags = r#"{"input_ids": [5, 6, 0], "completion_mask": [false, true, true], "attention_mask": [true, true, false]}"#;
    assert_eq!(examples(flags).unwrap(), [(vec![5, 6], vec![false, true])]);
    assert_eq!(examples(r#"{"input_ids": [5, 6]}"#).unwrap(), [(vec![5, 6], vec![true, true])]);
    assert_eq!(examples(r#"{"input_ids": "[5, 6]"}"#).unwrap(), [(vec![5, 6], vec![true, true])]);
    for (row, words) in [
        (r#"{"input_ids": [5, 1024]}"#, "input_ids holds 1024, the model's tokenizer has ids below 1024"),
        (r#"{"input_ids": [5, -1]}"#, "-1 is no token id"),
        (
            r#"{"input_ids": [5, 6], "labels": [6, -100]}"#,
            "a label is neither -100 nor the token at its place",
        ),
        (r#"{"input_ids": [5, 6], "labels": [5]}"#, "have different lengths"),
        (r#"{"input_ids": [5, 6], "loss_mask": [0, 2]}"#, "a mask holds something else than 0 and 1"),
        (r#"{"input_ids": [1.5]}"#, "a list of whole numbers is needed"),
        (r#"{"input_ids": [true]}"#, "a list of whole numbers is needed"),
        (r#"{"input_ids": [5, 6], "labels": [-100.0, 6.0]}"#, "`labels` is List(Float64)"),
        (r#"{"input_ids": [5, 6], "loss_mask": {"a": 1}}"#, "`loss_mask` is Struct"),
        ("{\"input_ids\": [5]}\n{\"input_ids\": []}", "input_ids is empty"),
    ] {
        let fault = examples(row).unwrap_err();
        assert!(fault.kind == Kind::Data && fault.message.contains(words), "{row}: {fault}");
    }
}

#[test]
fn entries_have_their_own_layout_limit_and_weight() {
    let texts: String = (0..10).map(|row| format!("{{\"text\": \"t{row}\"}}\n")).collect();
    let alpaca = r#"{"instruction": "a", "output": "b", "text": "no"}"#;
    let shares = vec![
        Share { limit: Some(3), ..Share::default() },
        Share { layout: Some(Layout::Alpaca), weight: Some(2.0), ..Share::default() },
    ];
    let data = read(&[&texts, alpaca], &Options { shares: shares.clone(), ..OPTIONS }).unwrap();
    assert_eq!(
        turns(&data),
        ["text t0", "text t1", "text t2", "user: a | assistant: b", "user: a | assistant: b"]
    );

    // With shuffling, the limit chooses rows by the seed, the same each time.
    let shuffled = Options { shares: vec![shares[0].clone()], shuffle: true, seed: 3, ..OPTIONS };
    let chosen = turns(&read(&[&texts], &shuffled).unwrap());
    assert_eq!(chosen.len(), 3);
    assert_eq!(chosen, turns(&read(&[&texts], &shuffled).unwrap()));
    assert_ne!(turns(&read(&[&texts], &Options { seed: 4, ..shuffled }).unwrap()), chosen);

    // A weight below one leaves rows out of training but never out of evaluation, and copies never reach
    // evaluation.
    let half = vec![Share { weight: Some(0.5), ..Share::default() }];
    let many: String = (0..1000).map(|row| format!("{{\"text\": \"t{row}\"}}\n")).collect();
    let options = Options { shares: half, train_share: 0.8, shuffle: true, ..OPTIONS };
    let data = read(&[&many], &options).unwrap();
    assert!((350..450).contains(&data.train.len()) && data.evaluation.len() == 200, "{}", data.train.len());
    let twice = Options { shares: vec![Share { weight: Some(2.0), ..Share::default() }], ..options };
    let data = read(&[&many], &twice).unwrap();
    assert_eq!((data.train.len(), data.evaluation.len()), (1600, 200));
    let trained: Vec<u64> = data.train.iter().map(|record| record.row).collect();
    assert!(data.evaluation.iter().all(|record| !trained.contains(&record.row)));
}

#[test]
fn entries_of_two_layouts_may_meet_and_files_of_one_may_not() {
    let (a, b) = (r#"{"text": "t"}"#, r#"{"prompt": "p", "completion": "c"}"#);
    assert_eq!(read(&[a, b], &OPTIONS).unwrap().train.len(), 2);
}
