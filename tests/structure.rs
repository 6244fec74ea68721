//! Promises about the source itself: the order of modules, judged gradients, banned code, the tables of docs/.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hone::cli;
use hone::facts::config::Config;
use hone::facts::family::FAMILIES;
use hone::fault::{self, Kind};
use hone::spec::keys;
use hone::workspace::annotations;
use regex::Regex;
use sha2::{Digest, Sha256};

/// The models of each family in the table of docs/models.md.
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

/// Files of `src/ops` that compare no gradient with autograd of a formula, and why that is enough.
const JUDGED_ELSEWHERE: &[(&str, &str)] = &[
    ("adamw.rs", "no gradient flows through it; tests/parity.rs compares what it makes of gradients"),
    (
        "adamw_8bit.rs",
        "no gradient flows through it; its tests compare with what bitsandbytes makes of gradients",
    ),
    ("adapters.rs", "serving's launches; nothing is trained through them"),
    ("attention", "launches and lists of tiles, compared by attention.rs beside it"),
    ("bias.rs", "adds a frozen vector: the gradient passes unchanged"),
    ("change.rs", "switches of benches, no operation"),
    ("cpu.rs", "access to memory and exp, no operation of its own"),
    ("cuda", "the border to a GPU: every operation compares its kernels with its formula"),
    ("dropout.rs", "linear, its own gradient; src/model/judge.rs judges it inside the decoder"),
    ("embedding.rs", "the table is frozen and nothing lies before it"),
    ("eight_bits.rs", "a number format; all 256 numbers are compared with its definition"),
    ("flat.rs", "fills and clears buffers"),
    ("four_bit.rs", "a stored form of frozen weights; its bits equal recorded ones"),
    ("fp8.rs", "products, compared in f64 in both directions; the rounding has no gradient"),
    ("gemm", "plain products with accumulation, judged by a triple loop"),
    ("judge.rs", "the judge"),
    ("largest.rs", "serving's choice of a token; nothing is trained through it"),
    (
        "row_pairs.rs",
        "serving's finished pairs; nothing is trained through it, and its sums are compared with f64",
    ),
    (
        "low_rank.rs",
        "products, compared in f64 in both directions; src/model/judge.rs judges pairs inside the decoder",
    ),
    ("matmul.rs", "linear; src/model/judge.rs judges its products as each other's gradients"),
    ("mod.rs", "the list"),
    ("noise.rs", "adds what depends on no parameter: the gradient passes unchanged"),
    ("number.rs", "sums without a gradient, compared on both devices"),
    ("slab.rs", "bytes of frozen weights; src/model/residency.rs compares the results bit for bit"),
    ("stash.rs", "copies to the host and back"),
    ("weight.rs", "a stored form, no operation"),
    ("rows.rs", "copies; src/model/judge.rs judges scatter as the gradient of gather"),
    ("draw.rs", "no gradient flows through it; generate/sampling.rs compares its tokens with the host's"),
    ("operand.rs", "no operation: the form in which products read a matrix; matmul's tests read each form"),
];

/// Words that no code may have: marks of unfinished work and of tests that do not run, and candle's layers, whose fused
/// forms drop gradients silently.
const BANNED: [&str; 5] = ["todo!", "unimplemented!", "dbg!", "#[ignore", "candle_nn"];

/// Crates that only some modules may use, so that each stays replaceable in one place. A file's tests are not counted.
const HOMES: &[(&str, &[&str])] = &[
    ("arrow", &["dataset"]),
    (
        "candle_core",
        &[
            "adapter", "bench", "device", "fault", "generate", "job", "memory", "merge", "model", "ops",
            "ranks", "serving", "train", "tuned",
        ],
    ),
    ("clap", &["cli"]),
    ("gemm", &["ops"]),
    ("hyper", &["controller", "endpoint", "server"]),
    ("indicatif", &["report"]),
    ("k8s_openapi", &["controller", "workspace"]),
    ("kube", &["controller", "workspace"]),
    ("memmap2", &["dataset", "model"]),
    ("minijinja", &["dataset"]),
    ("object_store", &["source"]),
    ("oci_client", &["registry"]),
    ("parquet", &["dataset"]),
    ("pulp", &["ops"]),
    ("rcgen", &["controller"]),
    ("reqwest", &["controller", "publish", "registry", "source"]),
    ("rustls", &["controller", "server", "source"]),
    ("serde_saphyr", &["spec", "workspace"]),
    ("signal_hook", &["interrupt"]),
    ("tar", &["registry"]),
    ("tokenizers", &["dataset"]),
    ("tokio", &["controller", "endpoint", "generate", "interrupt", "registry", "server", "source"]),
    ("unicode_normalization", &["dataset"]),
    ("unicode_width", &["trial"]),
    ("zstd", &["dataset"]),
];

/// Files that may hold `unsafe`, each with its reason.
const UNSAFE: &[(&str, &str)] = &[
    ("src/bounds.rs", "an allocator that counts"),
    ("src/dataset/store.rs", "the memory map of tokens"),
    ("src/interrupt.rs", "a signal's handler"),
    ("src/kaito/sidecars.rs", "signals to KAITO's containers"),
    ("src/kaito/watch.rs", "a child process and its signals"),
    ("src/last_word.rs", "handlers of signals and their stack"),
    ("src/machine.rs", "glibc's mallopt, and a thread's clock"),
    ("src/metrics/machine.rs", "NVML's library, opened at run time"),
    ("src/model/weights.rs", "the memory map of weights"),
    ("src/ops/cpu.rs", "vector instructions, and the call of the gemm crate"),
    ("src/ops/cuda/device.rs", "the CUDA driver"),
    ("src/ops/cuda/graph.rs", "graphs of the driver"),
    ("src/ops/cuda/inputs.rs", "page-locked memory"),
    ("src/ops/cuda/late.rs", "memory of the device"),
    ("src/ops/cuda/launch.rs", "kernel launches"),
    ("src/ops/cuda/lt.rs", "cublasLt"),
    ("src/ops/cuda/mod.rs", "copies on the device"),
    ("src/ops/cuda/pinned.rs", "page-locked memory"),
    ("src/ops/cuda/product.rs", "cuBLAS"),
    ("src/ops/cuda/side.rs", "copies on a second stream"),
    ("src/ops/cuda/tensor_map.rs", "the CUDA driver"),
    ("src/ops/flat.rs", "memory of the device"),
    ("src/ops/gemm/amx.rs", "AMX instructions"),
    ("src/ops/gemm/avx2.rs", "AVX2 instructions"),
    ("src/ops/gemm/avx512.rs", "AVX-512 instructions"),
    ("src/ops/gemm/buffer.rs", "aligned memory"),
    ("src/ops/gemm/drive.rs", "blocks of one matrix on many threads"),
    ("src/ops/gemm/few/mod.rs", "blocks of one matrix on many threads"),
    ("src/ops/gemm/few/tile.rs", "vector instructions"),
    ("src/ops/gemm/few/portable.rs", "loads without alignment"),
    ("src/ops/gemm/few/avx2.rs", "AVX2 instructions"),
    ("src/ops/gemm/few/avx512.rs", "AVX-512 instructions"),
    ("src/ops/gemm/four_bit.rs", "vector instructions"),
    ("src/ops/gemm/pack_bf16.rs", "vector instructions"),
    ("src/ops/gemm/portable.rs", "vector instructions"),
    ("src/ops/mod.rs", "memory of the device"),
    ("src/ops/slab.rs", "copies into a buffer that several tensors share"),
    ("src/ranks/launch.rs", "child processes and their signals"),
    ("src/ranks/nccl.rs", "NCCL's library, opened at run time"),
];

/// Columns that a line of a comment may have.
const COMMENT_COLUMNS_MAX: usize = 120;
/// Lines that a function may have. Longer ones stand in `LONG` with the reason.
const FUNCTION_LINES_MAX: usize = 60;
/// Functions over the limit.
const LONG: &[(&str, &str, &str)] = &[
    ("src/cli/job.rs", "flags_become_settings_of_the_table", "one list of cases"),
    ("src/controller/mod.rs", "watch_all", "one line for each kind of object"),
    (
        "src/dataset/container/mod.rs",
        "a_container_is_known_by_its_head_and_else_by_its_name",
        "one list of cases",
    ),
    ("src/dataset/words/mod.rs", "sentence_piece_in_each_of_its_forms", "one list of cases"),
    ("src/facts/shapes.rs", "config", "a table of models"),
    ("src/model/judge.rs", "cases", "one list of cases"),
    ("src/ops/adapters.rs", "every_row_gets_the_sum_of_its_own_adapters", "one case with its slow oracle"),
    ("src/ops/adapters.rs", "product_with_adapters", "one case with its slow oracle"),
    ("src/ops/attention.rs", "backward_group", "one derivation, read from top to bottom"),
    (
        "src/ops/attention/cached.rs",
        "a_gpu_turns_what_it_keeps_as_rope_does",
        "one case with its slow oracle",
    ),
    ("src/ops/gemm/amx.rs", "planes", "one loop nest of instructions"),
    ("src/plan/tests.rs", "kaitos_qlora_template", "one list of cases"),
    ("src/plan/training.rs", "train_options", "one line for each option"),
    ("src/server/answer.rs", "parts", "one arm for each form of answer"),
    ("src/server/ask.rs", "kaito", "one line for each of KAITO's arguments"),
    ("src/spec/tests.rs", "single_refusals", "one list of cases"),
];

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
fn the_map_lists_every_module_in_its_order() {
    let row = Regex::new(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|").unwrap();
    let map = text(&root("ARCHITECTURE.md"));
    let names = row
        .captures_iter(&map)
        .flat_map(|row| row[1].split(", ").map(|name| name.trim_matches('`').to_owned()).collect::<Vec<_>>());
    let listed: Vec<String> = names.filter(|name| name != "main").collect();
    assert_eq!(listed, modules(), "rows of the map in ARCHITECTURE.md, and the list in src/lib.rs");
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
    for &(name, why) in JUDGED_ELSEWHERE {
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
fn a_crate_is_used_in_its_homes_only() {
    for &(name, homes) in HOMES {
        // A module of hone's own name (`ops::gemm`) is reached by a path: only a path that begins with the crate
        // counts.
        let used = Regex::new(&format!(r"(?m)(?:^|[^:\w])(?:::)?{name}::|^\s*use {name};")).unwrap();
        let mut found = BTreeSet::new();
        for module in modules() {
            let in_use = |file: &PathBuf| used.is_match(outside_of_tests(&code(file)));
            found.extend(files_of(&module).iter().any(in_use).then_some(module));
        }
        let homes: BTreeSet<String> = homes.iter().map(|home| home.to_string()).collect();
        assert_eq!(found, homes, "modules that use the crate {name}; HOMES lists those that may");
    }
}

#[test]
fn unsafe_stands_in_listed_files_only() {
    let word = Regex::new(r"\bunsafe\b").unwrap();
    let holds = |file: &PathBuf| word.is_match(&code(file));
    let found: BTreeSet<String> =
        rust_files(&root("src")).into_iter().filter(holds).map(|file| relative(&file)).collect();
    let listed: BTreeSet<String> = UNSAFE.iter().map(|(file, _)| file.to_string()).collect();
    assert_eq!(found, listed, "files with `unsafe`; UNSAFE lists those that may");
}

#[test]
fn functions_are_short_or_have_a_reason() {
    let mut long = BTreeSet::new();
    for file in rust_files(&root("src")) {
        for (name, lines) in functions(&text(&file)) {
            long.extend((lines > FUNCTION_LINES_MAX).then(|| (relative(&file), name)));
        }
    }
    let listed: BTreeSet<(String, String)> =
        LONG.iter().map(|(file, name, _)| (file.to_string(), name.to_string())).collect();
    assert_eq!(long, listed, "functions of more than {FUNCTION_LINES_MAX} lines; LONG lists those that may");
}

#[test]
fn lines_of_comments_fit_a_page() {
    let mut files: Vec<PathBuf> =
        ["src", "tests", "benches"].iter().flat_map(|folder| rust_files(&root(folder))).collect();
    files.extend(
        std::fs::read_dir(root("kernels"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file()),
    );
    let mut wide = Vec::new();
    for file in files {
        for (number, line) in text(&file).lines().enumerate() {
            if line.trim_start().starts_with("//") && line.chars().count() > COMMENT_COLUMNS_MAX {
                wide.push(format!("{}:{}", relative(&file), number + 1));
            }
        }
    }
    assert!(wide.is_empty(), "comments over {COMMENT_COLUMNS_MAX} columns: {wide:#?}");
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

/// Users search the page for the words of their message, so it quotes only what the program says.
#[test]
fn the_troubleshooting_page_quotes_messages_that_exist() {
    let comment = Regex::new(r"(?m)^\s*//.*$").unwrap();
    let continued = Regex::new(r"\\\n\s*").unwrap();
    let files = rust_files(&root("src")).into_iter().filter(|file| !file.ends_with("tests.rs"));
    let said: String = files
        .map(|file| {
            let all = text(&file);
            let code = comment.replace_all(outside_of_tests(&all), "").into_owned();
            continued.replace_all(&code, "").into_owned()
        })
        .collect();
    let row = Regex::new(r"(?m)^\| `([^`]+)` \|").unwrap();
    let page = text(&root("docs/troubleshooting.md"));
    let quoted: Vec<&str> = row.captures_iter(&page).map(|row| row.extract::<1>().1[0]).collect();
    assert!(quoted.len() >= 30, "{} messages", quoted.len());
    for message in quoted {
        // `...` stands for names and numbers.
        let missing: Vec<&str> = message.split("...").filter(|part| !said.contains(part.trim())).collect();
        assert!(
            missing.is_empty(),
            "docs/troubleshooting.md quotes {message:?}, but no code says {missing:?}"
        );
    }
}

/// Each row of the fault matrix names a test that there is.
#[test]
fn the_fault_matrix_names_tests_that_exist() {
    let of_row = Regex::new(r"(?m)^\| [A-Z]\d.*\| `(\w+)` \|$").unwrap();
    let matrix = text(&root("tests/faults/MATRIX.md"));
    let named: Vec<String> = of_row.captures_iter(&matrix).map(|row| row[1].to_owned()).collect();
    let rows = matrix.lines().filter(|line| line.starts_with("| ")).count() - 1;
    assert_eq!(named.len(), rows, "rows without the name of a test at their end");
    assert!(rows >= 60, "{rows} rows");
    let files = ["src", "tests"].iter().flat_map(|folder| rust_files(&root(folder)));
    let all: String = files.map(|file| text(&file)).collect();
    let test = Regex::new(r"#\[(?:tokio::)?test\]\s+(?:async )?fn (\w+)\(").unwrap();
    let tests: BTreeSet<String> = test.captures_iter(&all).map(|test| test[1].to_owned()).collect();
    let missing: Vec<&String> = named.iter().filter(|name| !tests.contains(*name)).collect();
    assert!(missing.is_empty(), "the matrix names tests that do not exist: {missing:?}");
}

/// Returns the proofs of each family, as found in `tests`.
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

/// Returns the `model_type` of a case's language model; a variant names the case whose model it takes.
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

/// Returns the text with `table` between the markers of that name.
fn replaced(text: &str, name: &str, table: &str) -> String {
    let markers = [format!("<!-- {name}:begin -->"), format!("<!-- {name}:end -->")];
    for marker in &markers {
        assert_eq!(text.matches(marker).count(), 1, "{marker}");
    }
    let (before, rest) = text.split_once(&markers[0]).unwrap();
    let (_, after) = rest.split_once(&markers[1]).expect("begin before end");
    format!("{before}{}\n\n{}\n\n{}{after}", markers[0], table.trim(), markers[1])
}

/// Returns the modules of `src/lib.rs` in its order.
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

/// Returns the names behind `crate::`, alone or in braces.
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

/// Returns the parts of a group up to its closing brace, split at its own commas.
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

/// Returns the file without comments and the contents of texts.
fn code(file: &Path) -> String {
    let apart = Regex::new(concat!(
        r##"(?s)//[^\n]*|/\*.*?\*/|r"[^"]*"|r#".*?"#|"(?:\\.|[^"\\])*""##,
        r#"|'(?:\\[^']+|[^'\\])'"#
    ));
    apart.unwrap().replace_all(&text(file), "''").into_owned()
}

/// Returns a file's path from the root of the repository.
fn relative(file: &Path) -> String {
    file.strip_prefix(root("")).unwrap().to_string_lossy().into_owned()
}

/// Returns the text before a file's module of tests.
fn outside_of_tests(code: &str) -> &str {
    code.split("#[cfg(test)]\nmod ").next().expect("a split has a first part")
}

/// Returns the name and the number of lines of each function, from its `fn` to the brace in the same column.
fn functions(text: &str) -> Vec<(String, usize)> {
    let head =
        Regex::new(r"^(\s*)(?:pub(?:\([^)]*\))? )?(?:const |async |unsafe |extern \S+ )*fn (\w+)").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let Some(head) = head.captures(line) else { continue };
        let end = format!("{}}}", &head[1]);
        let bodiless = line.ends_with(';') || line.ends_with('}');
        if let Some(more) = lines[first..].iter().position(|line| *line == end).filter(|_| !bodiless) {
            found.push((head[2].to_owned(), more + 1));
        }
    }
    found
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

/// `tests/gpu --detectors` takes 15 minutes, so that it is no part of every run of the tests. It records the code that
/// it has run: the kernels and the operations that launch them, without comments and blanks. Other code has to be run
/// again.
#[test]
fn the_detectors_have_seen_these_kernels() {
    const RECORD: &str = "kernels/checked.txt";
    let kernels = std::fs::read_dir(root("kernels")).unwrap().map(|entry| entry.unwrap().path());
    let is_kernel = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "cu" || ending == "cuh");
    let mut files: Vec<PathBuf> = kernels.filter(is_kernel).collect();
    files.extend(rust_files(&root("src/ops")).into_iter().filter(|file| text(file).contains("Launch::")));
    files.sort();
    let comment = Regex::new(r"//[^\n]*").unwrap();
    let mut code = Sha256::new();
    for file in &files {
        code.update(relative(file) + "\n");
        for word in comment.replace_all(&text(file), "").split_whitespace().filter(|word| *word != "\\") {
            code.update(word);
        }
    }
    let code = format!("sha256 of {} files: {}", files.len(), hex(&code.finalize()));
    if let Ok(tests) = std::env::var("HONE_KERNELS_CHECKED") {
        let text = format!(
            "`tests/gpu --detectors` writes this file if other orders of threads, the sanitizers and the race detector \
             have found nothing.\n\n\
             {code}\nnames of tests that run kernels: {tests}\n"
        );
        std::fs::write(root(RECORD), text).unwrap();
    }
    let record = std::fs::read_to_string(root(RECORD)).unwrap_or_default();
    assert!(
        record.lines().any(|line| line == code),
        "{RECORD}: kernels or their launches have changed: run tests/gpu --detectors"
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A kernel that is launched before the one before it has ended must wait before it uses memory. Loads by the read-only
/// cache are not bound by the wait (PTX ISA, "Scope and applicability" of the memory consistency model), so there are
/// none, and no `__restrict__`, of which the compiler makes some.
#[test]
fn every_kernel_waits_first_for_the_kernels_before_it() {
    const UNORDERED: [&str; 3] = ["__ldg", "__restrict__", "global.nc"];
    let kernel = Regex::new(r"__global__[^{;]*\{[\s\\]*").unwrap();
    let mut kernels = 0;
    for entry in std::fs::read_dir("kernels").unwrap() {
        let path = entry.unwrap().path();
        if !path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for word in UNORDERED {
            assert!(!text.contains(word), "{}: {word} is not ordered behind the wait", path.display());
        }
        for found in kernel.find_iter(&text) {
            let line = text[..found.start()].lines().count();
            let body = &text[found.end()..];
            let is_first = ["wait_for_earlier_kernels();", "read_ahead_and_wait("]
                .iter()
                .any(|wait| body.starts_with(wait));
            assert!(
                is_first,
                "{}:{line}: expected wait_for_earlier_kernels() as the first statement",
                path.display()
            );
            kernels += 1;
        }
    }
    assert!(kernels >= 70, "{kernels} kernels and macros of kernels");
}
