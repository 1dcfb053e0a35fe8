//! [`Filter`], a selection of events by their type.

use crate::{
    channel::check_label,
    error::{Error, Result},
    event::Event,
    json::write_json_str,
};

/// Largest number of types in a filter: every event is compared with all of them, partly under its channel's lock.
const MAX_TYPES: usize = 100;

/// Selects the events whose `type` is in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// As JSON text, which is how events store them.
    kinds: Box<[Box<[u8]>]>,
}

impl Filter {
    /// `None` if `kinds` is empty: every event passes.
    ///
    /// # Errors
    /// `invalid_params` if there are more than 100 types, or one is not a valid label.
    pub fn new<S: AsRef<str>>(kinds: &[S]) -> Result<Option<Self>> {
        if kinds.len() > MAX_TYPES {
            return Err(Error::params(format!("type: at most {MAX_TYPES}")));
        }
        let json = |kind: &S| {
            check_label("type", kind.as_ref())?;
            let mut out = Vec::new();
            write_json_str(kind.as_ref(), &mut out);
            Ok(out.into_boxed_slice())
        };
        let kinds = kinds.iter().map(json).collect::<Result<Box<[_]>>>()?;
        Ok((!kinds.is_empty()).then_some(Filter { kinds }))
    }

    pub(super) fn matches(&self, event: &Event) -> bool {
        event.kind_json().is_some_and(|kind| self.kinds.iter().any(|wanted| **wanted == *kind.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_has_a_bound() {
        assert!(Filter::new(&["t"; MAX_TYPES]).unwrap().is_some());
        assert!(Filter::new(&["t"; MAX_TYPES + 1]).is_err());
    }
}
