//! Bytes as they arrive -> whether they arrive fast enough to wait for the rest.
//!
//! A server that sends one byte per second keeps every timeout for silence from ending. A job would hold its GPU
//! for hours and train on nothing.

use std::time::Duration;

use tokio::time::Instant;

/// The least speed of a download.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Bytes per second, on average over the window.
    pub least: u64,
    /// The time over which the speed is measured.
    pub window: Duration,
}

impl Speed {
    /// LIMIT: a thirtieth of a slow line. Anything slower does not download a model in a day.
    pub const LEAST: Speed = Speed { least: 16 << 10, window: Duration::from_secs(60) };

    /// Returns the number of bytes that must arrive in a window.
    pub fn window_bytes(&self) -> u64 {
        (self.least as f64 * self.window.as_secs_f64()) as u64
    }

    /// Returns whether an attempt of this duration received too few bytes to count as progress.
    pub fn is_stalled(&self, bytes: u64, time: Duration) -> bool {
        time >= self.window && bytes < self.window_bytes()
    }
}

/// The speed of one body.
pub struct Pace {
    speed: Speed,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// Starts measuring.
    pub fn new(speed: Speed) -> Pace {
        Pace { speed, since: Instant::now(), bytes: 0 }
    }

    /// Counts a piece. After a window with too few bytes it returns the reason.
    pub fn arrived(&mut self, bytes: usize) -> Result<(), String> {
        self.bytes += bytes as u64;
        if self.since.elapsed() < self.speed.window {
            return Ok(());
        }
        if self.bytes < self.speed.window_bytes() {
            return Err(format!(
                "only {} bytes arrived in {:?}, less than {} per second",
                self.bytes, self.speed.window, self.speed.least
            ));
        }
        (self.since, self.bytes) = (Instant::now(), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_must_bring_its_bytes() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let speed = Speed { least: 1000, window: Duration::from_millis(20) };
            let mut pace = Pace::new(speed);
            assert_eq!(pace.arrived(1), Ok(()), "within the window nothing is too slow");
            tokio::time::sleep(speed.window).await;
            assert_eq!(pace.arrived(19), Ok(()));
            tokio::time::sleep(speed.window).await;
            assert!(pace.arrived(19).unwrap_err().contains("only 19 bytes"));
        });
        assert!(Speed::LEAST.is_stalled(10, Duration::from_secs(60)));
        assert!(
            !Speed::LEAST.is_stalled(10, Duration::from_secs(59)),
            "an attempt that ended early is no stall"
        );
        let window_bytes = 60 * (16 << 10);
        for (bytes, stalled) in [(window_bytes - 1, true), (window_bytes, false), (1 << 20, false)] {
            assert_eq!(Speed::LEAST.is_stalled(bytes, Duration::from_secs(60)), stalled, "{bytes}");
        }
    }
}
