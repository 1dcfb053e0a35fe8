//! Filters: what of a channel one client is not to get, by what is known of the client and of the publisher.

use std::collections::BTreeMap;

use super::instruct::Instruct;

/// Whether the client of these instructions gets an item of its `nth` channel, whose publisher said `theirs`.
pub fn passes(instruct: &Instruct, nth: usize, theirs: &BTreeMap<String, String>) -> bool {
    let Some(channel) = instruct.channels.get(nth) else { return true };
    let user = instruct.meta.get("user").filter(|user| !user.is_empty());
    channel.filters.iter().all(|filter| match filter.as_str() {
        "skip-self" => user.is_none() || theirs.get("sender") != user,
        "skip-users" => {
            let skipped = theirs.get("skip_users").map_or("", String::as_str);
            user.is_none_or(|user| !skipped.split(',').any(|skipped| skipped.trim() == user))
        }
        "require-sub" => {
            let required = theirs.get("require_sub").filter(|name| !name.is_empty());
            required.is_none_or(|required| instruct.channels.iter().any(|channel| channel.name == *required))
        }
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compat::grip::instruct::Channel;

    #[test]
    fn who_gets_what() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let channel = |name: &str, filter: &str| Channel {
            name: name.into(),
            filters: vec![filter.into()],
            ..Channel::default()
        };
        let channels = vec![channel("a", "skip-self"), channel("b", "skip-users"), channel("c", "require-sub")];
        let alice = Instruct { channels, meta: map(&[("user", "alice")]), ..Instruct::default() };
        for (nth, theirs, gets) in [
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
            assert_eq!(passes(&alice, nth, &map(&[theirs])), gets, "{nth} {theirs:?}");
        }
        let nobody = Instruct { meta: BTreeMap::new(), ..alice };
        assert!(passes(&nobody, 0, &map(&[("sender", "")])) && passes(&nobody, 1, &map(&[("skip_users", "alice")])));
    }
}
