//! The number of a failed attempt -> how long to wait before the next one.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

/// Returns the pause after `failures` failed attempts: `first`, doubled with each further failure up to `longest`, then
/// shortened at random by up to a half, so that many processes do not come back at the same moment.
pub fn pause(first: Duration, longest: Duration, failures: u32) -> Duration {
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(longest);
    let random = RandomState::new().hash_one(failures) as f64 / u64::MAX as f64;
    doubled.mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_differ() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(1));
        for (failures, doubled) in [(0, 100), (1, 100), (2, 200), (4, 800), (5, 1000), (u32::MAX, 1000)] {
            let found = pause(first, longest, failures).as_millis();
            assert!((doubled / 2..=doubled).contains(&found), "{failures}: {found} ms");
        }
        let some: std::collections::BTreeSet<_> = (0..20).map(|_| pause(first, longest, 3)).collect();
        assert!(some.len() > 1, "no two processes wait equally long");
    }
}
