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
    pub(super) fn parse(error: &str) -> Self {
        let mut words = error.split(' ');
        let code = words.next().unwrap_or_default();
        let mut redirect = || {
            let slot = words.next()?.parse().ok()?;
            Some((slot, Address::parse(words.next()?, 6379).ok()?))
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
        let at = |port| Address { host: "h".into(), port };
        assert_eq!(ErrorReply::parse("MOVED 7 h:1"), ErrorReply::Moved(7, at(1)));
        assert_eq!(ErrorReply::parse("ASK 7 h:2"), ErrorReply::Ask(at(2)));
        assert_eq!(ErrorReply::parse("NOSCRIPT No matching script."), ErrorReply::NoScript);
        assert_eq!(ErrorReply::parse("LOADING Redis is loading"), ErrorReply::TryAgain);
        assert_eq!(ErrorReply::parse("OOM command not allowed"), ErrorReply::Final);
    }
}
