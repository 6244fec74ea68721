//! The first bytes of a body -> whether it is a web page, and its title. Login pages and previews come with status
//! 200.

/// Most characters of a title in a message.
const TITLE_CHARS_MAX: usize = 80;

/// Returns whether a body that begins with `first_bytes` is an HTML page. No data format begins with `<!doctype html`
/// or `<html`.
pub fn looks_like_html(first_bytes: &[u8]) -> bool {
    let text = first_bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first_bytes).trim_ascii_start();
    ["<!doctype html", "<html", "<head", "<body"]
        .iter()
        .any(|tag| text.len() >= tag.len() && text[..tag.len()].eq_ignore_ascii_case(tag.as_bytes()))
}

/// Returns the page's title for a message: one line without control characters.
pub fn title(first_bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(first_bytes);
    // Changing ASCII letters to lower case keeps byte positions.
    let lower = text.to_ascii_lowercase();
    let open = lower.find("<title")?;
    let start = open + lower[open..].find('>')? + 1;
    let end = start + lower[start..].find("</title").unwrap_or(lower.len() - start);
    let words: Vec<&str> = text[start..end].split_whitespace().collect();
    let title: String =
        words.join(" ").chars().filter(|char| !char.is_control()).take(TITLE_CHARS_MAX).collect();
    (!title.is_empty()).then_some(title)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_told_from_data() {
        for page in ["<!DOCTYPE html><html>", "\u{feff}\n <HTML lang=en>", "<head><title>x", "<body>"] {
            assert!(looks_like_html(page.as_bytes()), "{page}");
        }
        for data in ["PAR1\x15\x04", "{\"a\": \"<html>\"}", "<", "", "<?xml version=\"1.0\"?>"] {
            assert!(!looks_like_html(data.as_bytes()), "{data}");
        }
    }

    #[test]
    fn a_title_is_one_printable_line() {
        let page = b"<html><Title data-x>\n Sign\tin \x1b[31mnow </TITLE>";
        assert_eq!(title(page).as_deref(), Some("Sign in [31mnow"));
        assert_eq!(title(b"<title>cut of").as_deref(), Some("cut of"));
        assert_eq!(title(b"<html>"), None);
        assert_eq!(title(format!("<title>{}", "é".repeat(500)).as_bytes()).unwrap().chars().count(), 80);
    }
}
