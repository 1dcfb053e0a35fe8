//! The answer that most of several servers agree on.

/// The value that more than half of `of` votes have.
pub(super) fn majority<T: PartialEq>(votes: &[T], of: usize) -> Option<&T> {
    votes.iter().find(|one| 2 * votes.iter().filter(|other| other == one).count() > of)
}
