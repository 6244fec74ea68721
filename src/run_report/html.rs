//! Pieces of HTML: text that stays text, tables, and the frame of a page that loads nothing.

use sha2::{Digest, Sha256};

use crate::run_folder::REPORT_MARK;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// LIMIT: letters of one value on the page. Longer ones are for `report.json`.
const LETTERS_MAX: usize = 4000;

/// Returns the text from outside, made safe inside elements and attributes. Control characters become visible, secrets
/// of addresses go.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (line, part) in text.split('\n').enumerate() {
        if line > 0 {
            out.push('\n');
        }
        for letter in crate::report::clean::clean(part, LETTERS_MAX).chars() {
            match letter {
                '&' => out += "&amp;",
                '<' => out += "&lt;",
                '>' => out += "&gt;",
                '"' => out += "&quot;",
                '\'' => out += "&#39;",
                letter => out.push(letter),
            }
        }
    }
    out
}

/// Returns two columns: names and values. Values are HTML already.
pub fn facts(rows: &[(&str, String)]) -> String {
    let row =
        |(name, value): &(&str, String)| format!("<tr><th>{}</th><td>{value}</td></tr>\n", escaped(name));
    match rows.is_empty() {
        true => String::new(),
        false => format!("<table class=\"facts\">\n{}</table>\n", rows.iter().map(row).collect::<String>()),
    }
}

/// Returns a table with a head; cells are HTML already.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
        cells.map(|cell| format!("<{tag}>{cell}</{tag}>")).collect::<String>()
    };
    let head = cells("th", &mut head.iter().map(|name| escaped(name)));
    let rows: String =
        rows.iter().map(|row| format!("<tr>{}</tr>\n", cells("td", &mut row.iter().cloned()))).collect();
    format!(
        "<div class=\"wide\"><table class=\"list\">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )
}

/// Returns a section, or nothing if it has no content.
pub fn section(title: &str, content: &str) -> String {
    match content.is_empty() {
        true => String::new(),
        false => format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escaped(title)),
    }
}

/// Returns the details for readers who want more.
pub fn folded(title: &str, content: &str) -> String {
    match content.is_empty() {
        true => String::new(),
        false => format!("<details><summary>{}</summary>\n{content}</details>\n", escaped(title)),
    }
}

/// Returns a whole page. Its policy allows its own style and its one script, which is named by its hash, and no load at
/// all: a script that slipped in by mistake could not run or send anything.
pub fn page(title: &str, body: &str) -> String {
    let hash = crate::words::base64(&Sha256::digest(SCRIPT.as_bytes()));
    format!(
        "{REPORT_MARK}\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hash}'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        escaped(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text() {
        let hostile = "</td><script>alert('x')</script>&\u{1b}[0m\u{202e}\nhttps://user:pw@host/a?token=b";
        assert_eq!(
            escaped(hostile),
            "&lt;/td&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;\\u{1b}[0m\\u{202e}\nhttps://host/a"
        );
    }

    #[test]
    fn a_page_allows_its_own_script_only() {
        let page = page("<title>", "body");
        assert!(page.starts_with(REPORT_MARK) && page.contains("<title>&lt;title&gt;</title>"), "{page}");
        assert_eq!(page.matches("<script").count(), 1);
        assert!(page.contains("script-src 'sha256-") && page.contains("default-src 'none'"));
    }
}
