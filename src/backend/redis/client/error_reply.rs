//! [`ErrorReply`]: what an error of Redis means for the command.

use super::url::Address;

/// In all of these cases the command was not executed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ErrorReply {
    /// Another server owns this slot.
    Moved(usize, Address),
    /// The slot is being moved: only this command goes to the other server, behind ASKING.
    Ask(Address),
    NoScript,
    /// The server is a replica.
    NotMaster,
    /// Retry later: the server is loading, handing over a slot, or without a majority.
    TryAgain,
    /// A retry would fail as well.
    Final,
}

impl ErrorReply {
    /// `asked` is the address of the server that replied: in a redirection an empty or unknown host stands for it, as with
    /// `cluster-preferred-endpoint-type unknown-endpoint`.
    pub(super) fn parse(error: &str, asked: &Address) -> Self {
        let mut words = error.split(' ');
        let code = words.next().unwrap_or_default();
        let mut redirect = || {
            let slot = words.next()?.parse().ok()?;
            Some((slot, Address::named_by(asked, words.next()?)?))
        };
        match code {
            "MOVED" => redirect().map_or(ErrorReply::TryAgain, |(slot, address)| ErrorReply::Moved(slot, address)),
            "ASK" => redirect().map_or(ErrorReply::TryAgain, |(_, address)| ErrorReply::Ask(address)),
            "NOSCRIPT" => ErrorReply::NoScript,
            "READONLY" => ErrorReply::NotMaster,
            "TRYAGAIN" | "LOADING" | "CLUSTERDOWN" | "MASTERDOWN" | "BUSY" | "UNBLOCKED" => ErrorReply::TryAgain,
            _ => ErrorReply::Final,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart() {
        let at = |host: &str, port| Address { host: host.into(), port };
        let parse = |error| ErrorReply::parse(error, &at("asked", 6379));
        assert_eq!(parse("MOVED 7 h:1"), ErrorReply::Moved(7, at("h", 1)));
        assert_eq!(parse("ASK 7 h:2"), ErrorReply::Ask(at("h", 2)));
        assert_eq!(parse("NOSCRIPT No matching script."), ErrorReply::NoScript);
        assert_eq!(parse("LOADING Redis is loading"), ErrorReply::TryAgain);
        assert_eq!(parse("OOM command not allowed"), ErrorReply::Final);
    }

    #[test]
    fn redirections_name_a_host_in_any_form_or_none() {
        let asked = Address { host: "fe80::1".into(), port: 6379 };
        for (named, host, port) in [
            (":7001", "fe80::1", 7001),
            ("?:7001", "fe80::1", 7001),
            ("10.0.0.2:7001", "10.0.0.2", 7001),
            ("node-2.example:7001", "node-2.example", 7001),
            ("2001:db8::2:7001", "2001:db8::2", 7001),
            ("[2001:db8::2]:7001", "2001:db8::2", 7001),
            ("::1:7001", "::1", 7001),
        ] {
            let address = Address { host: host.into(), port };
            assert_eq!(ErrorReply::parse(&format!("ASK 7 {named}"), &asked), ErrorReply::Ask(address.clone()));
            assert_eq!(ErrorReply::parse(&format!("MOVED 7 {named}"), &asked), ErrorReply::Moved(7, address));
        }
        for malformed in ["MOVED 7", "MOVED 7 h", "MOVED 7 h:0", "MOVED 7 h:x", "MOVED x h:1", "ASK 7 :"] {
            assert_eq!(ErrorReply::parse(malformed, &asked), ErrorReply::TryAgain, "{malformed}");
        }
    }
}
