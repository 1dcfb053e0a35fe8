//! Filters: whether a client gets an item, by the metadata of the client and of the item.

use std::collections::BTreeMap;

use super::instructions::Instructions;

/// Whether an item with this metadata passes the filters of the channel with this index.
pub(super) fn passes(instructions: &Instructions, index: usize, item: &BTreeMap<String, String>) -> bool {
    let Some(channel) = instructions.channels.get(index) else { return true };
    let user = instructions.meta.get("user").filter(|user| !user.is_empty());
    channel.filters.iter().all(|filter| match filter.as_str() {
        "skip-self" => user.is_none() || item.get("sender") != user,
        "skip-users" => {
            let skipped = item.get("skip_users").map_or("", String::as_str);
            user.is_none_or(|user| !skipped.split(',').any(|skipped| skipped.trim() == user))
        }
        "require-sub" => {
            let required = item.get("require_sub").filter(|name| !name.is_empty());
            required.is_none_or(|required| instructions.channels.iter().any(|channel| channel.name == *required))
        }
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compat::grip::instructions::HeldChannel;

    #[test]
    fn filters_compare_the_metadata() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let channel = |name: &str, filter: &str| HeldChannel {
            name: name.into(),
            filters: vec![filter.into()],
            ..HeldChannel::default()
        };
        let channels = vec![channel("a", "skip-self"), channel("b", "skip-users"), channel("c", "require-sub")];
        let alice = Instructions { channels, meta: map(&[("user", "alice")]), ..Instructions::default() };
        for (index, item, passed) in [
            (0, ("sender", "alice"), false),
            (0, ("sender", "bob"), true),
            (0, ("other", "alice"), true),
            (1, ("skip_users", "bob, alice"), false),
            (1, ("skip_users", "bob"), true),
            (2, ("require_sub", "a"), true),
            (2, ("require_sub", "d"), false),
            (2, ("sender", "alice"), true),
            (3, ("sender", "alice"), true),
        ] {
            assert_eq!(passes(&alice, index, &map(&[item])), passed, "{index} {item:?}");
        }
        let anonymous = Instructions { meta: BTreeMap::new(), ..alice };
        assert!(
            passes(&anonymous, 0, &map(&[("sender", "")])) && passes(&anonymous, 1, &map(&[("skip_users", "alice")]))
        );
    }
}
