//! Tokens of a dataset through the cache: the same examples and words as from memory, taken again by the next run, made
//! anew if anything differs, never torn.

#[path = "support/job.rs"]
mod job;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hone::dataset::{
    self, BadRows, Example, LossOn, Names, Options, Prepared, Set, Share, TokenCache, TokenOptions,
    Tokenizer, prepare,
};
use hone::fault::{Fault, Kind};
use hone::report::{Event, Progress, Report, Sink};
use hone::source;
use job::Work;
use libc::{SIGKILL, SIGTERM};

const TOKENS: TokenOptions =
    TokenOptions { tokens_max: 64, loss: LossOn::Answers, chat_template: None, bad_rows: BadRows::Refuse };
const DROP: BadRows = BadRows::Drop { share_max: 0.9 };
/// Refuses some rows, hides tools, and writes no end token.
const TEMPLATE: &str = "{% for m in messages %}{% if 'refuse' in m.content %}{{ raise_exception('no such turn') }}{% endif %}\
    {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// Returns options of rows that are shuffled and split.
fn options() -> Options {
    Options { shuffle: true, seed: 7, train_share: 0.8, ..Options::RECOGNISED }
}

/// The messages.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Sink for Heard {
    fn event(&self, event: &Event) {
        let said = match event {
            Event::Note { text, .. } => format!("note {text}"),
            Event::Warning { text, .. } => format!("warning {text}"),
            other => panic!("{other:?}"),
        };
        self.0.lock().unwrap().push(said);
    }

    fn progress(&self, _: &Progress) {}
}

/// Examples of both sets, and the reports.
#[derive(Debug, PartialEq)]
struct Made {
    train: Vec<Example>,
    evaluation: Vec<Example>,
    said: Vec<String>,
}

impl Made {
    fn says(&self, words: &str) -> bool {
        self.said.iter().any(|line| line.contains(words))
    }
}

/// Data files and a tokenizer of its own.
struct Rows {
    folder: tempfile::TempDir,
    files: Vec<source::File>,
}

impl Rows {
    /// Returns files of JSON lines, each an entry of its own.
    fn of(contents: &[String]) -> Rows {
        let folder = tempfile::tempdir().unwrap();
        let file = |(entry, content): (usize, &String)| {
            let name = format!("{entry}.jsonl");
            let path = folder.path().join(&name);
            std::fs::write(&path, content).unwrap();
            let (bytes, sha256) = (content.len() as u64, source::digest(content.as_bytes()));
            source::File { path, name, bytes, sha256, entry }
        };
        let files = contents.iter().enumerate().map(file).collect();
        std::fs::create_dir(folder.path().join("model")).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let from = job::golden_path("llama3/model").join(name);
            std::fs::copy(from, folder.path().join("model").join(name)).unwrap();
        }
        Rows { folder, files }
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::open(&self.folder.path().join("model")).unwrap()
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache/tokens")
    }

    /// Returns the whole stores of the cache.
    fn stores(&self) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(self.cache()).into_iter().flatten().map(|entry| entry.unwrap().path());
        let mut stores: Vec<PathBuf> = entries.filter(|path| path.join("record").is_file()).collect();
        stores.sort();
        stores
    }

    /// Makes the tokens with everything in memory.
    fn in_memory(&self, options: &Options, tokens: &TokenOptions) -> Result<Made, Fault> {
        let heard = Arc::new(Heard::default());
        let report = Report::new(heard.clone());
        let data = dataset::read(&self.files, options, &report)?;
        let tokenizer = self.tokenizer();
        let train = dataset::encode(&data.train, &tokenizer, tokens, &report)?;
        let evaluation = dataset::encode(&data.evaluation, &tokenizer, tokens, &report)?;
        let said = heard.0.lock().unwrap().clone();
        Ok(Made { train, evaluation, said })
    }

    fn prepared(&self, options: &Options, tokens: &TokenOptions, cache: &TokenCache) -> Result<Made, Fault> {
        let heard = Arc::new(Heard::default());
        let report = Report::new(heard.clone());
        let Prepared { train, evaluation, .. } =
            prepare(&self.files, options, tokens, &self.tokenizer(), cache, &report)?;
        let all = |set: &Set| -> Vec<Example> {
            (0..set.len())
                .map(|index| {
                    let example = set.example(index);
                    assert_eq!(set.tokens(index), example.ids.len());
                    let learned = example.supervised.iter().skip(1).filter(|&&learned| learned).count();
                    assert_eq!(set.learned(index), learned as u64);
                    assert!(set.whole(index) >= example.ids.len());
                    example
                })
                .collect()
        };
        let (train, evaluation) = (all(&train), all(&evaluation));
        let said = heard.0.lock().unwrap().clone();
        Ok(Made { train, evaluation, said })
    }

    fn cached(&self, options: &Options, tokens: &TokenOptions) -> Result<Made, Fault> {
        let cache = TokenCache::Folder { path: self.cache(), named: true };
        self.prepared(options, tokens, &cache)
    }
}

/// Returns conversations of several lengths; some rows have fields and columns that are reported, some cannot be used.
fn conversations(rows: usize, bad: bool, from: usize) -> String {
    let row = |number: usize| {
        let long = "word ".repeat(number % 23);
        let content = match number % 50 {
            17 if bad => "null".to_owned(),
            31 if bad => "\"refuse\"".to_owned(),
            _ => format!("\"{long}question {}\"", number + from),
        };
        let tools = if number.is_multiple_of(7) { r#", "tools": [{"name": "f"}]"# } else { "" };
        format!(
            r#"{{"messages": [{{"role": "user", "content": {content}, "mood": "calm"}}, {{"role": "assistant", "content": "{long}answer {number}"}}], "source": "s"{tools}}}"#
        ) + "\n"
    };
    (0..rows).map(row).collect()
}

fn texts(rows: usize) -> String {
    (0..rows).map(|number| format!("{{\"text\": \"row {number} of many\"}}\n")).collect()
}

/// Returns texts in groups of seven rows, and some without a group.
fn in_groups(rows: usize) -> String {
    let group =
        |number: usize| if number.is_multiple_of(11) { "null".into() } else { (number / 7).to_string() };
    (0..rows)
        .map(|number| format!("{{\"text\": \"row {number}\", \"group\": {}}}\n", group(number)))
        .collect()
}

#[test]
fn examples_their_order_and_what_is_said_are_the_same_as_in_memory() {
    let two = || vec![conversations(400, false, 0), conversations(300, false, 9000)];
    let share = |weight, limit| Share { weight, limit, ..Share::default() };
    let dropped = Options { bad_rows: DROP, ..options() };
    let refusing = TokenOptions { chat_template: Some(TEMPLATE.into()), bad_rows: DROP, ..TOKENS };
    let grouped = Options { group_column: Some("group".into()), train_share: 0.7, ..options() };
    let cases: [(&str, Vec<String>, Options, TokenOptions); 11] = [
        ("plain", vec![conversations(300, false, 0)], options(), TOKENS),
        ("in order", vec![conversations(300, false, 0)], Options { shuffle: false, ..options() }, TOKENS),
        ("all train", two(), Options { train_share: 1.0, ..options() }, TOKENS),
        ("cut", two(), options(), TokenOptions { tokens_max: 48, ..TOKENS }),
        ("every token", two(), options(), TokenOptions { loss: LossOn::Everything, ..TOKENS }),
        ("dropped", vec![conversations(300, true, 0)], dropped.clone(), refusing.clone()),
        (
            "limits",
            two(),
            Options { shares: vec![share(None, Some(50)), share(None, None)], ..options() },
            TOKENS,
        ),
        (
            "limits and weights",
            vec![conversations(400, true, 0), conversations(300, true, 9000)],
            Options { shares: vec![share(Some(2.5), Some(90)), share(Some(0.5), Some(70))], ..dropped },
            refusing,
        ),
        ("grouped", vec![in_groups(300)], grouped, TOKENS),
        (
            "one entry evaluates",
            two(),
            Options { evaluation_from: Some(1), train_share: 1.0, ..options() },
            TOKENS,
        ),
        // More rows than one part takes.
        ("many", vec![texts(20_000)], options(), TOKENS),
    ];
    for (name, contents, options, tokens) in cases {
        let rows = Rows::of(&contents);
        let expected = rows.in_memory(&options, &tokens).unwrap();
        assert!(expected.train.len() > 40 && !expected.said.is_empty(), "{name}: {}", expected.train.len());
        assert_eq!(rows.prepared(&options, &tokens, &TokenCache::Off).unwrap(), expected, "{name}: off");
        assert_eq!(rows.cached(&options, &tokens).unwrap(), expected, "{name}: first");
        let mut again = rows.cached(&options, &tokens).unwrap();
        assert!(again.says("are taken from"), "{name}: {:?}", again.said);
        again.said.retain(|line| !line.contains("are taken from"));
        assert_eq!(again, expected, "{name}: again");
    }
}

#[test]
fn what_is_refused_in_memory_is_refused_with_the_same_words_and_leaves_no_store() {
    let refusing = TokenOptions { chat_template: Some(TEMPLATE.into()), ..TOKENS };
    let nothing = TokenOptions { tokens_max: 4, ..TOKENS };
    let few = Options { bad_rows: BadRows::Drop { share_max: 0.01 }, ..options() };
    let cases: [(&str, Vec<String>, Options, TokenOptions); 8] = [
        ("bad rows", vec![conversations(300, true, 0)], options(), TOKENS),
        ("too many bad rows", vec![conversations(300, true, 0)], few, TOKENS),
        (
            "the template refuses",
            vec![conversations(300, false, 0) + &conversations(50, true, 0).replace("null", "\"x\"")],
            options(),
            refusing,
        ),
        ("nothing to learn", vec![conversations(300, false, 0)], options(), nothing),
        ("an empty side", vec![conversations(1, false, 0)], options(), TOKENS),
        ("no rows", vec!["\n".into()], options(), TOKENS),
        ("no columns", vec!["{\"a\": 1}\n".into()], options(), TOKENS),
        ("damage", vec![conversations(9000, false, 0) + "{\"messages\": "], options(), TOKENS),
    ];
    for (name, contents, options, tokens) in cases {
        let rows = Rows::of(&contents);
        let expected = rows.in_memory(&options, &tokens).expect_err(name);
        let found = rows.cached(&options, &tokens).expect_err(name);
        assert_eq!((found.kind, found.to_string()), (expected.kind, expected.to_string()), "{name}");
        let off = rows.prepared(&options, &tokens, &TokenCache::Off).expect_err(name);
        assert_eq!(off.to_string(), expected.to_string(), "{name}");
        // Rows that a template refuses are known of a whole store, too.
        let left = std::fs::read_dir(rows.cache()).unwrap().map(|entry| entry.unwrap().path());
        let parts: Vec<PathBuf> = left.filter(|path| path.extension().is_some()).collect();
        assert!(parts.is_empty(), "{name}: {parts:?}");
    }
}

#[test]
fn a_later_run_takes_the_tokens_without_opening_a_file() {
    let rows = Rows::of(&[conversations(300, false, 0), conversations(100, false, 9000)]);
    let weighed = Options {
        shuffle: false,
        seed: 1,
        train_share: 0.5,
        shares: vec![Share { weight: Some(2.0), ..Share::default() }, Share::default()],
        ..options()
    };
    let expected = rows.in_memory(&weighed, &TOKENS).unwrap();
    rows.cached(&options(), &TOKENS).unwrap();
    rows.files.iter().for_each(|file| std::fs::remove_file(&file.path).unwrap());
    let mut found = rows.cached(&weighed, &TOKENS).unwrap();
    found.said.retain(|line| !line.contains("are taken from"));
    assert_eq!(found, expected, "order, split and weights are made of the same tokens");
    assert_eq!(rows.stores().len(), 1);
}

#[test]
fn whatever_changes_tokens_changes_the_store() {
    let mut rows = Rows::of(&[conversations(100, false, 0)]);
    rows.cached(&options(), &TOKENS).unwrap();
    let mut stores = 1;
    let mut another = |rows: &Rows, what: &str, options: &Options, tokens: &TokenOptions| {
        let made = rows.cached(options, tokens).unwrap();
        stores += 1;
        assert!(!made.says("are taken from"), "{what}");
        assert_eq!(rows.stores().len(), stores, "{what}");
        assert!(rows.cached(options, tokens).unwrap().says("are taken from"), "{what}: again");
    };
    another(&rows, "length", &options(), &TokenOptions { tokens_max: 65, ..TOKENS });
    another(&rows, "loss", &options(), &TokenOptions { loss: LossOn::Everything, ..TOKENS });
    let template = TokenOptions { chat_template: Some(TEMPLATE.into()), ..TOKENS };
    another(&rows, "template", &options(), &template);
    let user = Names { user: vec!["mood".into()], ..Names::KNOWN };
    another(&rows, "names", &Options { names: user, ..options() }, &TOKENS);
    let limit =
        |limit| Options { shares: vec![Share { limit: Some(limit), ..Share::default() }], ..options() };
    another(&rows, "limit", &limit(50), &TOKENS);
    another(&rows, "the seed that chooses", &Options { seed: 8, ..limit(50) }, &TOKENS);
    let config = rows.folder.path().join("model/tokenizer_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "\n").unwrap();
    another(&rows, "tokenizer", &options(), &TOKENS);
    let other = conversations(100, false, 1);
    std::fs::write(&rows.files[0].path, &other).unwrap();
    rows.files[0].sha256 = source::digest(other.as_bytes());
    another(&rows, "data", &options(), &TOKENS);
}

#[test]
fn a_file_that_moved_is_known_and_called_by_its_new_name() {
    let mut rows = Rows::of(&[conversations(300, true, 0).replace("refuse", "refused")]);
    let options = Options { bad_rows: DROP, ..options() };
    let tokens = TokenOptions { chat_template: Some(TEMPLATE.into()), bad_rows: DROP, ..TOKENS };
    assert!(rows.cached(&options, &tokens).unwrap().says("0.jsonl:17"));
    rows.files[0].name = "elsewhere/rows.jsonl".into();
    let expected = rows.in_memory(&options, &tokens).unwrap();
    let mut found = rows.cached(&options, &tokens).unwrap();
    assert!(found.says("are taken from") && found.says("elsewhere/rows.jsonl:17"), "{:?}", found.said);
    found.said.retain(|line| !line.contains("are taken from"));
    assert_eq!(found, expected);
}

#[test]
fn a_store_with_one_wrong_bit_is_made_again() {
    let rows = Rows::of(&[conversations(200, false, 0)]);
    let expected = rows.cached(&options(), &TOKENS).unwrap();
    let [store] = rows.stores().try_into().unwrap();
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 6] = [
        ("tokens", |path| flip(path, 2)),
        ("lines", |path| flip(path, 4)),
        ("record", |path| flip(path, 2)),
        ("tokens", |path| std::fs::write(path, &std::fs::read(path).unwrap()[4..]).unwrap()),
        ("lines", |path| std::fs::remove_file(path).unwrap()),
        ("record", |path| std::fs::write(path, "").unwrap()),
    ];
    for (name, damage) in damages {
        damage(&store.join(name));
        let mut found = rows.cached(&options(), &TOKENS).unwrap();
        assert!(!found.says("are taken from"), "{name}");
        // A record that is no record at all is an unfinished store, not a damaged one.
        assert_eq!(found.says("is damaged"), name != "record", "{name}");
        found.said.retain(|line| !line.contains("is damaged"));
        assert_eq!(found, expected, "{name}");
        assert!(rows.cached(&options(), &TOKENS).unwrap().says("are taken from"), "{name}: whole again");
    }
}

/// Flips a bit in the middle.
fn flip(path: &Path, share: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() / share;
    bytes[at] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_folder_that_cannot_be_used_is_a_fault_if_it_was_named() {
    let rows = Rows::of(&[conversations(200, false, 0)]);
    let path = rows.files[0].path.join("tokens"); // below a file
    let expected = rows.in_memory(&options(), &TOKENS).unwrap();
    let cache = |named| TokenCache::Folder { path: path.clone(), named };
    let fault = rows.prepared(&options(), &TOKENS, &cache(true)).unwrap_err();
    assert_eq!(fault.kind, Kind::Config, "{fault}");
    let mut found = rows.prepared(&options(), &TOKENS, &cache(false)).unwrap();
    assert!(found.said[0].starts_with("warning the token cache cannot be used"), "{:?}", found.said);
    found.said.remove(0);
    assert_eq!(found, expected);
}

/// Makes a run on some 40 MB of text; it takes seconds to make tokens of them.
fn large(work: &Work) {
    work.copy("llama3/model", "model");
    let text = "a pod waits for a node that has room for it, and nobody knows why; ".repeat(30);
    let rows: String = (0..20_000).map(|row| format!("{{\"text\": \"{row} {text}\"}}\n")).collect();
    work.write("data.jsonl", rows);
}

const RUN: [&str; 11] = [
    "run",
    "--log",
    "json",
    "--model",
    "model",
    "--data",
    "data.jsonl",
    "--output",
    "out",
    "--device",
    "cpu",
];

/// Returns the folders of the token cache that are being filled.
fn parts(work: &Work) -> Vec<String> {
    work.list("home/.cache/hone/tokens").into_iter().filter(|name| name.ends_with(".part")).collect()
}

#[test]
fn a_signal_is_heard_while_tokens_are_made_and_nothing_half_is_left() {
    let work = Work::new();
    large(&work);
    let mut running = work.start(&RUN);
    running.until("tokens", || !parts(&work).is_empty());
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(parts(&work).len(), 1, "it is still at work");
    let began = Instant::now();
    running.signal(SIGTERM);
    let (code, log) = running.end();
    assert_eq!(code, Some(31), "{log}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    let mut running = work.start(&RUN);
    running.until("tokens", || !parts(&work).is_empty());
    running.signal(SIGKILL);
    assert_eq!(running.end().0, None);
    assert_eq!(parts(&work).len(), 1, "a killed process leaves its part");

    // Another run, of other data, removes it.
    work.write("data.jsonl", "{\"text\": \"a small one\"}\n".repeat(30));
    work.done(&[&RUN[..], &["--set", "TrainingArguments.max_steps=1", "--earlier-results", "move"]].concat());
    assert_eq!(parts(&work), [""; 0]);
    assert_eq!(work.list("home/.cache/hone/tokens").len(), 2, "the lock and one store");
}
