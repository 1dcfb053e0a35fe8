//! [`ConsumerInfo`], a consumer and its cursors, and [`CursorOp`], an operation on one of them.

use crate::{channel::Channel, position::Position};

/// Operation on a cursor.
#[derive(Clone, Copy, Debug)]
pub enum CursorOp {
    Get,
    /// Moves the cursor forward only: an older position changes nothing.
    Commit(Position),
    /// Moves the cursor to any position.
    Seek(Position),
}

/// A consumer and its cursors.
#[derive(Clone, Debug)]
pub struct ConsumerInfo {
    pub name: Box<str>,
    pub cursors: Vec<(Channel, Position)>,
    /// Time of its last request, Unix milliseconds.
    pub seen: u64,
    /// When it is removed unless it sends another request, Unix milliseconds.
    pub expires: u64,
}
