//! The log: text for people, JSON for machines, always on standard error (standard output is for data).

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::{Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{Format, Log};

/// Starts logging for the process. Later calls change nothing: tests build several nodes.
pub fn start(log: &Log) {
    let json = match log.format {
        Format::Json => true,
        Format::Text => false,
        Format::Auto => !stderr().is_terminal(),
    };
    let lines = if json {
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
    // Fails only if somebody has already started one.
    let _ = tracing_subscriber::registry().with(lines.with_filter(log.level.targets())).try_init();
}
