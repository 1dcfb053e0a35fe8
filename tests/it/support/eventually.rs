//! Waiting for a condition, and giving up on what never comes.

use std::time::{Duration, Instant};

/// Longer than any single step takes, even on a busy machine, and shorter than the timeouts of weir that would hide a
/// missed wake-up: long-polls last up to 55 s.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// For what includes an election, a restart or a resharding of Redis.
pub const MINUTE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds. Fails the test after [`PATIENCE`]; `what` describes the condition.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl FnMut() -> F) {
    eventually_within(PATIENCE, what, condition).await;
}

/// As [`eventually`], with another limit.
pub async fn eventually_within<F: Future<Output = bool>>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// As [`eventually`], for code that blocks its thread.
pub fn eventually_blocking(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The output of a future that completes within [`PATIENCE`]. Fails the test otherwise.
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it completes in time")
}
