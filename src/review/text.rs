//! A review -> lines for a terminal or a file.

use super::{Piece, Review, Sample};

const GREEN: &str = "\u{1b}[32m";
const DIM: &str = "\u{1b}[2m";
const BOLD: &str = "\u{1b}[1m";
const PLAIN: &str = "\u{1b}[0m";
/// Characters of the longest bar.
const BAR: usize = 40;

pub(super) fn write(review: &Review, colours: bool) -> String {
    let paint =
        |style: &str, text: &str| if colours { format!("{style}{text}{PLAIN}") } else { text.to_owned() };
    let mut out = format!("{}\n", paint(BOLD, &visible(&review.model)));
    let facts = review.facts();
    let wide = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    facts.iter().for_each(|(name, value)| out += &format!("{name:wide$}  {value}\n"));
    out += "\ntokens of a row\n";
    let most = review.lengths.iter().map(|bar| bar.2).max().unwrap_or(1).max(1);
    for (from, to, rows) in &review.lengths {
        let bar = "#".repeat((rows * BAR).div_ceil(most));
        out += &format!("{from:>7} to {to:<7} {rows:>8}  {bar}\n");
    }
    if !review.warnings.is_empty() {
        out += &format!("\n{}\n", paint(BOLD, "warnings"));
        review
            .warnings
            .iter()
            .for_each(|warning| out += &format!("  {}\n", visible(warning).replace("↵\n", "\n  ")));
    }
    let key = match colours {
        true => format!("{} text is learned, the rest is only shown", paint(GREEN, "green")),
        false => "text in [brackets] is not learned".to_owned(),
    };
    out += &format!("\nas it will be trained; {key}\n");
    review.samples.iter().for_each(|sample| out += &one(sample, colours));
    out
}

fn one(sample: &Sample, colours: bool) -> String {
    let cut = if sample.cut { ", cut" } else { "" };
    let mut out = format!(
        "\n--- {}: {} tokens, {} learned{cut}\n",
        visible(&sample.place),
        sample.tokens,
        sample.learned
    );
    let mut open = false;
    for piece in &sample.pieces {
        if !colours && piece.learned == open {
            out += if open { "]" } else { "[" };
            open = !open;
        }
        out += &match colours {
            true => painted(piece),
            false => visible(&piece.text),
        };
    }
    out + if open { "]\n" } else { "\n" }
}

/// Returns the piece in colour: green if it is learned, bold if it is a special token.
fn painted(piece: &Piece) -> String {
    let colour = if piece.learned { GREEN } else { DIM };
    let weight = if piece.special { BOLD } else { "" };
    format!("{colour}{weight}{}{PLAIN}", visible(&piece.text))
}

/// Makes text safe to print. Line ends are shown and kept. Other control characters, which could move the cursor or
/// change colours, are escaped, and so are characters that change the direction of writing.
pub(super) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out += "↵\n",
            '\t' => out += "⇥",
            c if c.is_control() || is_hidden(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// Returns whether a character has no width or changes the direction of writing.
fn is_hidden(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        assert_eq!(visible("a\u{1b}[2Jb\r\u{7}"), "a\\u{1b}[2Jb\\u{d}\\u{7}");
        assert_eq!(visible("x\n\ty"), "x↵\n⇥y");
        assert_eq!(visible("\u{202e}abc\u{200b}"), "\\u{202e}abc\\u{200b}");
    }

    #[test]
    fn without_colours_brackets_hold_what_is_not_learned() {
        let piece = |text: &str, learned| Piece { text: text.into(), learned, special: false };
        let pieces = vec![
            piece("<s>", false),
            piece("q", false),
            piece("a", true),
            piece("</s>", true),
            piece("!", false),
        ];
        let sample = Sample { place: "f:1".into(), tokens: 5, learned: 2, cut: false, pieces };
        assert_eq!(one(&sample, false), "\n--- f:1: 5 tokens, 2 learned\n[<s>q]a</s>[!]\n");
        assert!(one(&sample, true).contains("\u{1b}[32ma\u{1b}[0m"));
    }
}
