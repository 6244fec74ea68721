//! Promises about the source itself: the order of modules, judged gradients, what is never used, the tables of docs/.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hone::cli;
use hone::facts::config::Config;
use hone::facts::family::FAMILIES;
use hone::fault::{self, Kind};
use hone::spec::keys;
use hone::workspace::annotations;
use regex::Regex;

/// Which models a family of the table in docs/models.md is.
const MODELS: [(&str, &str); 14] = [
    ("falcon", "Falcon 7B, 40B, 11B: fused query_key_value in both orders, parallel layers"),
    ("gemma2", "Gemma 2: soft-caps, window on every other layer, norms before and after"),
    ("gemma3_text", "Gemma 3, alone or inside `gemma3`: qk-norm, two ropes, windows on most layers"),
    ("granite", "Granite 3.x dense: four multipliers"),
    ("llama", "Llama 1, 2, 3.x and models of their shape: grouped heads, biases, own head width"),
    ("ministral", "Ministral: windows by layer"),
    ("ministral3", "Ministral 3, alone or inside `mistral3`: queries scaled by position"),
    ("mistral", "Mistral 7B, Mistral Small (alone or inside `mistral3`): window, own head width"),
    ("olmo2", "OLMo 2: norms behind the layers, qk-norm over all heads"),
    ("phi", "Phi-1, 1.5, 2: parallel layers, LayerNorm, biases, partial rotary"),
    ("phi3", "Phi-3, 3.5, 4, 4-mini: fused projections, longrope, partial rotary, window"),
    ("qwen2", "Qwen 2, 2.5, Coder: qkv biases, window from a layer on"),
    ("qwen3", "Qwen 3 dense: qk-norm"),
    ("smollm3", "SmolLM 3: layers without rope"),
];

/// What stands in `src/ops` without comparing a gradient with autograd of its formula, and why that is enough.
const JUDGED_ELSEWHERE: [(&str, &str); 17] = [
    ("adamw.rs", "no gradient flows through it; tests/parity.rs compares what it makes of gradients"),
    ("adapters.rs", "serving's launches; nothing is trained through them"),
    ("attention", "launches and lists of tiles, compared by attention.rs beside it"),
    ("bias.rs", "adds a frozen vector: the gradient passes unchanged"),
    ("cpu.rs", "access to memory and exp, no operation of its own"),
    ("cuda", "the border to a GPU: every operation compares its kernels with its formula"),
    ("dropout.rs", "linear, its own gradient; src/model/judge.rs judges it inside the decoder"),
    ("embedding.rs", "the table is frozen and nothing lies before it"),
    ("flat.rs", "fills and clears buffers"),
    ("four_bit.rs", "a stored form of frozen weights; its bits equal recorded ones"),
    ("gemm", "plain products with accumulation, judged by a triple loop"),
    ("judge.rs", "the judge"),
    ("largest.rs", "serving's choice of a token; nothing is trained through it"),
    ("matmul.rs", "linear; src/model/judge.rs judges its products as each other's gradients"),
    ("mod.rs", "the list"),
    ("number.rs", "sums without a gradient, compared on both devices"),
    ("rows.rs", "copies; src/model/judge.rs judges scatter as the gradient of gather"),
];

/// What no code may say: unfinished work, tests that do not run, and candle's layers, whose fused forms drop
/// gradients silently.
const BANNED: [&str; 5] = ["todo!", "unimplemented!", "dbg!", "#[ignore", "candle_nn"];

#[test]
fn a_module_uses_only_modules_above_it() {
    let list = modules();
    assert!(list.len() > 10, "found {list:?}");
    for (place, module) in list.iter().enumerate() {
        for file in files_of(module) {
            let used = used_from_the_root(&code(&file));
            let below: Vec<&String> =
                list[place + 1..].iter().filter(|below| used.contains(*below)).collect();
            assert!(below.is_empty(), "{} uses {below:?}, listed below {module}", file.display());
        }
    }
}

#[test]
fn every_source_file_belongs_to_the_list_and_says_what_it_is() {
    let listed: BTreeSet<PathBuf> = modules().iter().flat_map(|module| files_of(module)).collect();
    let roots = [root("src/lib.rs"), root("src/main.rs")];
    for file in rust_files(&root("src")) {
        assert!(listed.contains(&file) || roots.contains(&file), "{} is in no module", file.display());
        assert!(text(&file).starts_with("//! "), "{} does not begin with what it is", file.display());
    }
}

#[test]
fn every_operation_is_judged() {
    let listed = |name: &str| JUDGED_ELSEWHERE.iter().any(|(elsewhere, _)| *elsewhere == name);
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(root("src/ops")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let judged = path.is_file() && {
            let code = code(&path);
            code.contains("#[cfg(test)]") && code.contains("judge::gradient(")
        };
        assert!(
            judged || listed(&name),
            "src/ops/{name}: no test compares its gradient, no reason is listed"
        );
        assert!(
            !judged || !listed(&name),
            "src/ops/{name}: is judged by its own tests: take it off the list"
        );
        names.insert(name);
    }
    for (name, why) in JUDGED_ELSEWHERE {
        assert!(names.contains(name) && !why.is_empty(), "src/ops/{name} is listed and not there");
    }
}

#[test]
fn nothing_banned_is_used() {
    for file in rust_files(&root("src")) {
        let code = code(&file);
        for word in BANNED {
            assert!(!code.contains(word), "{} uses {word}", file.display());
        }
    }
}

#[test]
fn what_a_kind_means_is_what_its_comment_says() {
    let source = text(&root("src/fault.rs"));
    for kind in Kind::ALL {
        let lines = format!("    /// {}\n    {kind:?} = {},\n", kind.meaning(), kind.exit_code());
        assert!(source.contains(&lines), "src/fault.rs does not hold\n{lines}");
    }
}

/// `UPDATE_DOCS=1 cargo test --test structure` writes the tables.
#[test]
fn the_docs_hold_the_tables() {
    let pages = [
        ("docs/models.md", "families", families()),
        ("docs/annotations.md", "annotations", annotations::markdown()),
        ("docs/keys.md", "keys", keys::markdown()),
        ("docs/exit-codes.md", "exit codes", fault::markdown()),
        ("docs/cli.md", "commands", cli::reference::markdown()),
    ];
    for (page, name, table) in pages {
        let file = root(page);
        let found = text(&file);
        let expected = replaced(&found, name, &table);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&file, &expected).unwrap();
        } else {
            assert!(found == expected, "{page}: run UPDATE_DOCS=1 cargo test --test structure");
        }
    }
}

/// Users find things in ten kilobytes, and every link leads somewhere.
#[test]
fn the_readme_is_short_and_links_lead_to_files() {
    assert!(
        text(&root("README.md")).len() <= 10 * 1024,
        "README.md is longer than 10 KB: move details to docs/"
    );
    let link = Regex::new(r"\]\(([^)#:]+)(?:#[^)]*)?\)").unwrap();
    let docs = std::fs::read_dir(root("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = docs.chain(["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(root));
    for page in pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
        for found in link.captures_iter(&text(&page)) {
            let target = page.parent().unwrap().join(&found[1]);
            assert!(target.exists(), "{}: {} leads nowhere", page.display(), &found[1]);
        }
    }
}

/// What is proven of each family, from what stands in `tests`.
fn families() -> String {
    let golden = root("tests/golden");
    let runs: Vec<String> = ["", "_variants"]
        .iter()
        .flat_map(|folder| folders(&golden.join(folder)))
        .filter(|folder| folder.join("loss.jsonl").exists())
        .map(|folder| family_of(&folder))
        .collect();
    let peft: Vec<String> = folders(&root("tests/fixtures/peft_logits"))
        .iter()
        .map(|folder| folder.file_name().unwrap().to_str().unwrap().split('-').next().unwrap().to_owned())
        .map(|model| family_of(&golden.join(model)))
        .collect();
    let logits = code(&root("tests/logits.rs"));
    let listed: Vec<&str> = MODELS.iter().map(|(family, _)| *family).collect();
    assert_eq!(FAMILIES.map(|(family, _)| family).to_vec(), listed, "MODELS and FAMILIES");
    let mut table =
        "| family | models | recorded runs | logits of candle-transformers | adapters in peft |\n|---|---|---|---|---|\n"
            .to_owned();
    for (family, models) in MODELS {
        let count = |list: &[String]| list.iter().filter(|name| *name == family).count();
        assert!(count(&runs) > 0, "{family} has no recorded run");
        let dash = |proven: bool, text: String| if proven { text } else { "-".into() };
        let other = dash(logits.contains(&format!("fn {family}(config: &Value")), "equal".into());
        let adapters = dash(count(&peft) > 0, format!("{} checked", count(&peft)));
        table += &format!("| `{family}` | {models} | {} | {other} | {adapters} |\n", count(&runs));
    }
    table
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

/// `model_type` of a case's language model; a variant names the case whose model it takes.
fn family_of(case: &Path) -> String {
    let own = case.join("model");
    let model = if own.exists() {
        own
    } else {
        let meta: serde_json::Value = serde_json::from_str(&text(&case.join("meta.json"))).unwrap();
        let name = Path::new(meta["args"]["model"].as_str().unwrap()).file_name().unwrap().to_owned();
        root("tests/golden").join(name).join("model")
    };
    let config = Config::read(&model).unwrap().language_part().unwrap();
    config.text("model_type").unwrap().unwrap()
}

/// The text with `table` between the markers of that name.
fn replaced(text: &str, name: &str, table: &str) -> String {
    let markers = [format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->")];
    for marker in &markers {
        assert_eq!(text.matches(marker).count(), 1, "{marker}");
    }
    let (before, rest) = text.split_once(&markers[0]).unwrap();
    let (_, after) = rest.split_once(&markers[1]).expect("begin before end");
    format!("{before}{}\n\n{}\n\n{}{after}", markers[0], table.trim(), markers[1])
}

/// The modules of `src/lib.rs` in its order.
fn modules() -> Vec<String> {
    let module = Regex::new(r"(?m)^pub mod (\w+);$").unwrap();
    module.captures_iter(&text(&root("src/lib.rs"))).map(|found| found[1].to_owned()).collect()
}

fn files_of(module: &str) -> Vec<PathBuf> {
    let folder = root("src").join(module);
    let mut files = if folder.is_dir() { rust_files(&folder) } else { Vec::new() };
    files.extend(Some(folder.with_extension("rs")).filter(|file| file.exists()));
    assert!(!files.is_empty(), "module {module} has no file");
    files
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// What follows `crate::`, alone or in braces.
fn used_from_the_root(code: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => _ = used.insert(word(rest)),
            Some(group) => used.extend(parts(group).map(word)),
        }
    }
    used
}

/// The parts of a group up to its closing brace, split at its own commas.
fn parts(group: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    let mut borders = vec![0];
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' if depth == 0 => borders.push(at + 1),
            '}' => {
                borders.push(at + 1);
                break;
            }
            _ => {}
        }
    }
    borders.windows(2).map(|pair| group[pair[0]..pair[1]].trim()).collect::<Vec<_>>().into_iter()
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The file without comments and the contents of texts.
fn code(file: &Path) -> String {
    let apart = Regex::new(concat!(
        r##"(?s)//[^\n]*|/\*.*?\*/|r"[^"]*"|r#".*?"#|"(?:\\.|[^"\\])*""##,
        r#"|'(?:\\[^']+|[^'\\])'"#
    ));
    apart.unwrap().replace_all(&text(file), "''").into_owned()
}

fn text(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tests above see what they must see.
#[test]
fn code_is_read_without_comments_and_texts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.rs");
    let source = r##"//! crate::comment
        use crate::{alpha, beta::{Inner, crate_free}, gamma}; /* crate::block */
        const A: (&str, char) = ("https://x // \" crate::text", '"'); use crate::delta::Thing;
        fn f<'a>(x: &'a str) { crate::epsilon::call(x, r#"crate::raw "quoted""#, '\'') }"##;
    std::fs::write(&file, source).unwrap();
    let used: Vec<String> = used_from_the_root(&code(&file)).into_iter().collect();
    assert_eq!(used, ["alpha", "beta", "delta", "epsilon", "gamma"]);
}
