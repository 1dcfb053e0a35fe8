//! [`Tail`], the handle that keeps a topic filled by its backend.

use std::sync::Arc;

/// Keeps a topic filled while any clone of it lives. Empty where the topic's ring is the log itself.
#[derive(Clone, Default)]
pub struct Tail(pub(crate) Option<Arc<dyn Backfill>>);

/// Fetches events that are older than a window.
pub(crate) trait Backfill: Send + Sync {
    /// Begins to fetch what the readers of the window [wait for](super::window::Window::next_wanted), until none of
    /// them waits any more. Called for the first reader that begins to wait.
    fn fetch(&self);
}
