//! Promises about the source itself: the order of modules, judged gradients, what is never used, README's tables.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hone::fault::{self, Kind};
use hone::spec::keys;
use regex::Regex;

/// What stands in `src/ops` without comparing a gradient with autograd of its formula, and why that is enough.
const JUDGED_ELSEWHERE: [(&str, &str); 11] = [
    ("adamw.rs", "no gradient flows through it; tests/parity.rs compares what it makes of gradients"),
    ("bias.rs", "adds a frozen vector: the gradient passes unchanged"),
    ("cpu.rs", "access to memory and exp, no operation of its own"),
    ("dropout.rs", "linear, its own gradient; src/model/judge.rs judges it inside the decoder"),
    ("embedding.rs", "the table is frozen and nothing lies before it"),
    ("four_bit.rs", "a stored form of frozen weights; its bits equal recorded ones"),
    ("gemm", "plain products with accumulation, judged by a triple loop"),
    ("judge.rs", "the judge"),
    ("matmul.rs", "linear; src/model/judge.rs judges its products as each other's gradients"),
    ("mod.rs", "the list"),
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

/// `UPDATE_README=1 cargo test --test structure` writes the tables.
#[test]
fn readme_holds_the_tables_of_keys_and_exit_codes() {
    let file = root("README.md");
    let found = text(&file);
    let expected = [("keys", keys::markdown()), ("exit codes", fault::markdown())]
        .iter()
        .fold(found.clone(), |readme, (name, table)| replaced(&readme, name, table));
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(&file, &expected).unwrap();
    } else {
        assert!(found == expected, "README.md: run UPDATE_README=1 cargo test --test structure");
    }
}

/// The text with `table` between the markers of that name.
fn replaced(text: &str, name: &str, table: &str) -> String {
    let markers = [format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->")];
    for marker in &markers {
        assert_eq!(text.matches(marker).count(), 1, "README.md: {marker}");
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
