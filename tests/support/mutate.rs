//! Content -> the same with changes that a seed draws, for tests that feed readers with it.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::random::{Random, setting};

/// Runs `case` with one seed after the other, so many or for as long as the environment says.
pub fn each_case(cases: u64, case: impl Fn(u64)) {
    let first = setting("HONE_FUZZ_SEED").unwrap_or(1);
    let end = setting("HONE_FUZZ_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut tried = 0;
    for seed in first.. {
        if end.map_or(tried >= cases, |end| Instant::now() >= end) {
            break;
        }
        case(seed);
        tried += 1;
    }
    println!("{tried} cases from seed {first}");
    assert!(tried > 0);
}

/// Keeps a case for a closer look.
pub fn keep(seed: u64, name: &str, content: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("hone-fuzz-{seed}-{}", name.replace('/', "-")));
    std::fs::write(&path, content).unwrap();
    path
}

/// Returns one to a dozen changes of bytes, or of a whole part of the file.
pub fn mutated(random: &mut Random, content: &[u8], others: &[(String, Vec<u8>)]) -> Vec<u8> {
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
                let own = [(String::new(), bytes.clone())];
                let (_, other) = random.pick(if others.is_empty() { &own } else { others });
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

/// Returns values that stand where another kind is expected.
pub fn strange(random: &mut Random) -> Value {
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

/// Changes one place of a value: a value, a name (to one of `names`), or what a list holds.
pub fn change(random: &mut Random, names: &[&str], value: &mut Value) {
    let stop = random.below(4) == 0;
    match value {
        Value::Object(fields) if !fields.is_empty() && !stop => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = random.pick(&keys).clone();
            match random.below(6) {
                0 => {
                    let moved = fields.remove(&key).unwrap();
                    let name = *random.pick(names);
                    let name = if random.below(5) == 0 { name.to_uppercase() } else { name.to_owned() };
                    fields.insert(name, moved);
                }
                1 => drop(fields.remove(&key)),
                2 => {
                    let (name, added) = (*random.pick(names), strange(random));
                    fields.insert(name.to_owned(), added);
                }
                _ => change(random, names, fields.get_mut(&key).unwrap()),
            }
        }
        Value::Array(items) if !items.is_empty() && !stop => {
            let at = random.below(items.len());
            match random.below(6) {
                0 => drop(items.remove(at)),
                1 => items.insert(at, items[at].clone()),
                2 => items.insert(at, strange(random)),
                _ => change(random, names, &mut items[at]),
            }
        }
        value => *value = strange(random),
    }
}
