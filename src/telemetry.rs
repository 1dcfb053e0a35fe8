//! Logging, as text or JSON, on standard error: standard output is for the data of commands.

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{LogFormat, LogSection};

/// Starts logging for the process. Later calls have no effect, because tests run several nodes in one process.
pub fn start(log: &LogSection) {
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !stderr().is_terminal(),
    };
    let layer = if json {
        tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_writer(stderr)
            .boxed()
    } else {
        tracing_subscriber::fmt::layer().with_ansi(stderr().is_terminal()).with_writer(stderr).boxed()
    };
    // Fails only if logging was started before.
    let _ = tracing_subscriber::registry().with(layer.with_filter(log.level.targets())).try_init();
}
