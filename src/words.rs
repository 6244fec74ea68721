//! Numbers, sizes, rates and dates -> the text that people read. Every command writes them the same way.

use std::fmt::Display;
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::civil;

/// Returns bytes in powers of 1024: `0 B`, `1.5 KiB`, `12.0 GiB`.
pub fn size(bytes: u64) -> String {
    let powers = [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match powers.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// Returns a count in words: `134,515,008` is `134.5 million`. Below a million all digits are written.
pub fn count(number: u64) -> String {
    match number {
        0..1_000_000 => number.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} million", number as f64 / 1e6),
        _ => format!("{:.2} billion", number as f64 / 1e9),
    }
}

/// Returns a rate per second with the prefix that leaves one to three digits before the point: `2.9 TB/s`, `2.1
/// GFLOP/s`.
pub fn rate(per_second: f64, unit: &str) -> String {
    let prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match prefixes.into_iter().find(|(one, _)| per_second >= *one) {
        Some((one, prefix)) => format!("{:.1} {prefix}{unit}/s", per_second / one),
        None => format!("{per_second:.1} {unit}/s"),
    }
}

/// Returns the first items, and the number of the others: `q, k, v and 4 more`.
pub fn list(items: &[impl Display], most: usize) -> String {
    let shown = items.len().min(most);
    let text = items[..shown].iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match items.len() - shown {
        0 => text,
        others => format!("{text} and {others} more"),
    }
}

/// Bytes -> lower-case hexadecimal digits.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes -> base64 with padding (RFC 4648).
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let letter = |bits: u32, place: u32| char::from(LETTERS[(bits >> (18 - 6 * place) & 63) as usize]);
    let group = |bytes: &[u8]| -> String {
        let bits = (0..3).fold(0, |bits, i| bits << 8 | u32::from(bytes.get(i).copied().unwrap_or(0)));
        (0..4).map(|place| if place <= bytes.len() as u32 { letter(bits, place) } else { '=' }).collect()
    };
    bytes.chunks(3).map(group).collect()
}

/// Returns a time in UTC by a `strftime` format (the conversions of `jiff::fmt::strtime`). A time that no calendar of
/// four-digit years holds is written as 1970-01-01.
pub fn date(time: SystemTime, format: &str) -> String {
    let epoch = civil::date(1970, 1, 1).at(0, 0, 0, 0);
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    epoch.checked_add(since).unwrap_or(epoch).strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let list = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(list, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(
            [list(&[""; 0], 2), list(&["q", "k"], 2), list(&["q", "k", "v"], 2)],
            ["", "q, k", "q, k and 1 more"]
        );
    }

    #[test]
    fn sizes_read_well() {
        let sizes = [0, 1023, 1536, 5 << 30, u64::MAX].map(size);
        assert_eq!(sizes, ["0 B", "1023 B", "1.5 KiB", "5.0 GiB", "16.0 EiB"]);
    }

    #[test]
    fn counts_and_rates_keep_digits_that_say_something() {
        assert_eq!(
            [999_999, 134_515_008, 8_030_261_248].map(count),
            ["999999", "134.5 million", "8.03 billion"]
        );
        assert_eq!(rate(2.85e12, "B"), "2.9 TB/s");
        assert_eq!(rate(3.1e9, "FLOP"), "3.1 GFLOP/s");
        assert_eq!(rate(0.25, "B"), "0.2 B/s");
    }

    #[test]
    fn dates_are_civil() {
        let at = |seconds| date(UNIX_EPOCH + Duration::from_secs(seconds), "%Y-%m-%d-%H-%M-%S");
        assert_eq!(at(0), "1970-01-01-00-00-00");
        assert_eq!(at(951_827_696), "2000-02-29-12-34-56");
        assert_eq!(at(1_767_225_599), "2025-12-31-23-59-59");
        assert_eq!(at(253_402_300_799), "9999-12-31-23-59-59");
        assert_eq!(at(253_402_300_800), "1970-01-01-00-00-00");
    }
}
