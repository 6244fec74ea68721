//! A review -> one self-contained HTML page without scripts, links or anything loaded from elsewhere.

use super::text::visible;
use super::{Piece, Review, Sample};

const STYLE: &str = "
:root { color-scheme: light dark; --back: #fff; --ink: #1c2128; --soft: #667; --line: #d8dce2; --card: #f6f7f9;
  --learned: #0b6b3a; --learned-back: #d5f2e0; --special: #7a3e9d; --bar: #4c7fd0; --warn: #8a5300; --warn-back: #fff3d9; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --ink: #e4e7ec; --soft: #9aa3b0; --line: #333a45; --card: #1c2128;
  --learned: #8ce0b0; --learned-back: #123b26; --special: #d3a6f0; --bar: #5f8fdd; --warn: #ffcf80; --warn-back: #3a2c10; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; } td:first-child { color: var(--soft); }
.bars td { padding: 0 .8rem 0 0; vertical-align: middle; font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
.bars td:last-child { width: 100%; } .bar { height: .85rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.warning { background: var(--warn-back); color: var(--warn); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0; white-space: pre-wrap; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; }
.sample header { padding: .4rem .8rem; border-bottom: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
pre { margin: 0; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; color: var(--soft); }
.l { color: var(--learned); background: var(--learned-back); border-radius: 2px; } .s { color: var(--special); font-weight: 600; }
";

/// Returns the whole page.
pub fn page(review: &Review) -> String {
    let row =
        |(name, value): &(&str, String)| format!("<tr><td>{name}</td><td>{}</td></tr>\n", escaped(value));
    let facts: String = review.facts().iter().map(row).collect();
    let most = review.lengths.iter().map(|bar| bar.2).max().unwrap_or(1).max(1);
    let bar = |(from, to, rows): &(usize, usize, usize)| {
        let share = 100.0 * *rows as f64 / most as f64;
        let shown = if *rows == 0 {
            String::new()
        } else {
            format!("<div class=\"bar\" style=\"width:{share:.1}%\"></div>")
        };
        format!("<tr><td>{from} to {to}</td><td>{rows}</td><td>{shown}</td></tr>\n")
    };
    let bars: String = review.lengths.iter().map(bar).collect();
    let warnings: String = review
        .warnings
        .iter()
        .map(|text| format!("<div class=\"warning\">{}</div>\n", escaped(text)))
        .collect();
    let warnings = if warnings.is_empty() { "<p>None.</p>".to_owned() } else { warnings };
    let samples: String = review.samples.iter().map(sample).collect();
    let title = escaped(&review.model);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}: the data as it will be trained</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>{title}: the data as it will be trained</h1>\n<table>\n{facts}</table>\n\
         <h2>Warnings</h2>\n{warnings}\n<h2>Tokens of a row</h2>\n<table class=\"bars\">\n{bars}</table>\n\
         <h2>Rows</h2>\n<p><span class=\"l\">Learned</span> tokens are marked; <span class=\"s\">special</span> tokens are \
         written out.</p>\n{samples}</body>\n</html>\n"
    )
}

fn sample(sample: &Sample) -> String {
    let cut = if sample.cut { ", cut" } else { "" };
    let pieces: String = sample.pieces.iter().map(piece).collect();
    format!(
        "<section class=\"sample\"><header>{}: {} tokens, {} learned{cut}</header><pre>{pieces}</pre></section>\n",
        escaped(&sample.place),
        sample.tokens,
        sample.learned
    )
}

fn piece(piece: &Piece) -> String {
    let text = escaped(&visible(&piece.text));
    match (piece.learned, piece.special) {
        (false, false) => text,
        (true, false) => format!("<span class=\"l\">{text}</span>"),
        (false, true) => format!("<span class=\"s\">{text}</span>"),
        (true, true) => format!("<span class=\"l s\">{text}</span>"),
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        let hostile = Piece {
            text: "</pre><script>alert('x')</script>\u{1b}[0m".into(),
            learned: true,
            special: false,
        };
        assert_eq!(
            piece(&hostile),
            "<span class=\"l\">&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\\u{1b}[0m</span>"
        );
    }
}
