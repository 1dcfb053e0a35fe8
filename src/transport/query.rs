//! The parameters of a URL, and those that all reading requests share: channels, start and types.

use std::{borrow::Cow, time::Duration};

use crate::{
    channel::{Channel, check_label},
    error::{Code, Error, Result},
    position::Start,
    token::AfterParam,
};

/// Parameters of one URL. More than any request needs, and few enough for a linear search.
const MAX_PARAMETERS: usize = 256;

/// The decoded parameters of a URL. A handler takes those that it knows, and [`finish`](Self::finish) rejects the rest.
#[derive(Debug, Default)]
pub(crate) struct Query<'a> {
    left: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

/// The position at which a client asks to start reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StartParam {
    /// Not specified: the default of the transport.
    Default,
    /// A position, a token, an offset, `earliest` or `now`, not parsed yet.
    After(String),
    /// At so many events before the end.
    Last(u64),
}

// === impl Query ===

impl<'a> Query<'a> {
    /// `text` is what follows the `?`. Values are UTF-8 under percent-encoding, `+` is a space; commas mean nothing.
    pub(crate) fn parse(text: Option<&'a str>) -> Result<Self> {
        let text = text.unwrap_or_default();
        let mut left = Vec::with_capacity(4);
        // One pass over the bytes: every publish and every poll is parsed by this.
        let (mut from, mut equals, mut coded) = (0, None, false);
        for (at, byte) in text.bytes().chain([b'&']).enumerate() {
            match byte {
                b'=' => equals = equals.or(Some(at)),
                b'%' | b'+' => coded = true,
                b'&' => {
                    if at > from {
                        if left.len() == MAX_PARAMETERS {
                            return Err(Error::params(format!("more than {MAX_PARAMETERS} parameters")));
                        }
                        let (name, value) = match equals {
                            Some(equals) => (&text[from..equals], &text[equals + 1..at]),
                            None => (&text[from..at], ""),
                        };
                        left.push(match coded {
                            true => (decode(name, true)?, decode(value, true)?),
                            false => (Cow::Borrowed(name), Cow::Borrowed(value)),
                        });
                    }
                    (from, equals, coded) = (at + 1, None, false);
                }
                _ => {}
            }
        }
        Ok(Query { left })
    }

    /// Whether a parameter is given and has not been taken.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.left.iter().any(|(given, _)| given == name)
    }

    /// The value of a parameter that may be given once.
    pub(crate) fn take(&mut self, name: &str) -> Result<Option<Cow<'a, str>>> {
        let Some(at) = self.left.iter().position(|(given, _)| given == name) else { return Ok(None) };
        let (_, value) = self.left.swap_remove(at);
        if self.has(name) {
            return Err(Error::params(format!("{name} is given more than once")));
        }
        Ok(Some(value))
    }

    /// As [`take`](Self::take), for a parameter whose empty value has no meaning: it is as if absent. Never for one that
    /// selects or names something (`channel`, `consumer`, `subject`, `before`, `key` …): without it a request does more.
    pub(crate) fn take_nonempty(&mut self, name: &str) -> Result<Option<Cow<'a, str>>> {
        Ok(self.take(name)?.filter(|value| !value.is_empty()))
    }

    /// Every value of a parameter that may be repeated, in order.
    pub(crate) fn take_all(&mut self, name: &str) -> Vec<Cow<'a, str>> {
        let mut taken = Vec::new();
        // `retain_mut` cannot move out: the value that is removed is left empty.
        self.left.retain_mut(|(given, value)| {
            let matches = given == name;
            if matches {
                taken.push(std::mem::take(value));
            }
            !matches
        });
        taken
    }

    /// The repeated `channel`, without repetitions. There may be none.
    ///
    /// `most` is the value of the limit called `limit`.
    pub(crate) fn channels(&mut self, most: usize, limit: &'static str) -> Result<Vec<Channel>> {
        let mut channels = Vec::new();
        for name in self.take_all("channel") {
            let channel = Channel::parse(&name)?;
            if !channels.contains(&channel) {
                channels.push(channel);
            }
        }
        if channels.len() > most {
            return Err(Error::params(format!("{} channels, {limit} is {most}", channels.len())).with("limit", limit));
        }
        Ok(channels)
    }

    /// The parameter `channel` where it may be given once.
    pub(crate) fn channel(&mut self) -> Result<Option<Channel>> {
        self.take("channel")?.map(|name| Channel::parse(&name)).transpose()
    }

    /// The parameter `channel` where there must be one.
    pub(crate) fn one_channel(&mut self) -> Result<Channel> {
        self.channel()?.map_or_else(|| Err(self.no_channel()), Ok)
    }

    /// Like [`channels`](Self::channels), but at least one is required.
    pub(crate) fn some_channels(&mut self, most: usize, limit: &'static str) -> Result<Vec<Channel>> {
        let channels = self.channels(most, limit)?;
        if channels.is_empty() { Err(self.no_channel()) } else { Ok(channels) }
    }

    fn no_channel(&self) -> Error {
        // A likely mistake gets a hint of its own.
        self.hint().err().unwrap_or_else(|| Error::params("channel is missing: say ?channel=NAME"))
    }

    /// The repeated `type`.
    pub(crate) fn types(&mut self) -> Result<Vec<String>> {
        let types = self.take_all("type");
        types.iter().try_for_each(|kind| check_label("type", kind))?;
        Ok(types.into_iter().map(Cow::into_owned).collect())
    }

    /// The start. An `EventSource` that reconnects sends its last id beside the parameters of its URL, so the
    /// precedence is: the header `Last-Event-ID`, `last_event_id` (or `lastEventId`), then `after` or `last`.
    pub(crate) fn start(&mut self, last_event_id: Option<&str>) -> Result<StartParam> {
        // An id that was reset is empty, which means none (WHATWG HTML, section 9.2.4).
        let last_event_id = last_event_id.filter(|id| !id.is_empty());
        let resumed = match (self.take_nonempty("last_event_id")?, self.take_nonempty("lastEventId")?) {
            (None, given) | (given, _) => given,
        };
        let (after, last) = (self.take_nonempty("after")?, self.number("last")?);
        if after.is_some() && last.is_some() {
            return Err(Error::params("after and last exclude each other"));
        }
        Ok(match (last_event_id.map(Cow::Borrowed).or(resumed.as_deref().map(Cow::Borrowed)).or(after), last) {
            (Some(after), _) => StartParam::After(after.into_owned()),
            (None, Some(last)) => StartParam::Last(last),
            (None, None) => StartParam::Default,
        })
    }

    /// A whole number. An empty value is as if absent.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.take_nonempty(name)? else { return Ok(None) };
        match text.parse() {
            Ok(number) if !text.starts_with('+') => Ok(Some(number)),
            _ => Err(Error::params(format!("{name} is a whole number"))),
        }
    }

    /// A [`duration`]. An empty value is as if absent.
    pub(crate) fn duration(&mut self, name: &str) -> Result<Option<Duration>> {
        self.take_nonempty(name)?.map(|text| duration(name, &text)).transpose()
    }

    /// Rejects parameters that have not been taken, unless they begin with `_`.
    pub(crate) fn finish(self) -> Result<()> {
        self.hint()?;
        match self.left.iter().find(|(name, _)| !name.starts_with('_')) {
            Some((name, _)) => Err(Error::params(format!("unknown parameter {name:?}"))),
            None => Ok(()),
        }
    }

    fn hint(&self) -> Result<()> {
        if self.has("channels") {
            return Err(Error::params("there is no parameter channels: repeat channel, as ?channel=a&channel=b"));
        }
        Ok(())
    }
}

// === impl StartParam ===

impl StartParam {
    /// Resolves the start of each of `channels`.
    ///
    /// # Errors
    /// `invalid_position` if the text cannot be parsed.
    pub(crate) fn starts(&self, channels: &[Channel], default: Start) -> Result<Vec<Start>> {
        match self {
            StartParam::Default => Ok(vec![default; channels.len()]),
            StartParam::Last(last) => Ok(vec![Start::Last(*last); channels.len()]),
            StartParam::After(text) => {
                let after: AfterParam =
                    text.parse().map_err(|error| Error::new(Code::InvalidPosition, format!("after is {error}")))?;
                after.starts(channels)
            }
        }
    }
}

/// Parses a parameter or member called `name` in the grammar of [`crate::duration`].
pub(crate) fn duration(name: &str, text: &str) -> Result<Duration> {
    crate::duration::parse(text).map_err(|reason| Error::params(format!("{name}: {reason}")))
}

/// Encodes a name for the parameter `page`, in characters that need no escaping in a URL.
pub(crate) fn hex(name: &[u8]) -> String {
    name.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Decodes what [`hex`] has encoded.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?)).collect()
}

/// Decodes percent-encoding; `plus` decodes `+` as a space (in a query, not in a path).
pub(crate) fn decode(text: &str, plus: bool) -> Result<Cow<'_, str>> {
    if !text.bytes().any(|byte| byte == b'%' || plus && byte == b'+') {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' if plus => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16));
                match (digit(), digit()) {
                    (Some(high), Some(low)) => (high << 4 | low) as u8,
                    _ => return Err(Error::params("the URL has a % that two hexadecimal digits do not follow")),
                }
            }
            byte => byte,
        });
    }
    String::from_utf8(out).map(Cow::Owned).map_err(|_| Error::params("the URL is not UTF-8 under its percent-encoding"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Query<'_> {
        Query::parse(Some(text)).unwrap()
    }

    #[test]
    fn channels_are_repeated_and_commas_are_part_of_names() {
        let mut query = query("channel=a,b&channel=50%25&channel=x+y&channel=a,b&_=1");
        let channels = query.some_channels(3, "limits.poll_channels").unwrap();
        assert_eq!(channels.iter().map(Channel::as_str).collect::<Vec<_>>(), ["a,b", "50%", "x y"]);
        assert!(query.finish().is_ok());
    }

    #[test]
    fn unusual_but_valid_queries() {
        let mut query = query("&&a=b=c&d&=e&f=&%67=%68&");
        assert_eq!(query.take("a").unwrap().unwrap(), "b=c");
        assert_eq!(query.take("d").unwrap().unwrap(), "");
        assert_eq!(query.take("").unwrap().unwrap(), "e");
        assert_eq!(query.take("f").unwrap().unwrap(), "");
        assert_eq!(query.take("g").unwrap().unwrap(), "h");
        assert!(query.finish().is_ok() && Query::parse(Some("")).unwrap().finish().is_ok());
    }

    #[test]
    fn unknown_parameters_are_rejected() {
        assert!(query("chanel=a").finish().is_err());
        assert!(query("channels=a,b").finish().unwrap_err().detail().contains("repeat channel"));
        assert!(query("channels=a").some_channels(1, "x").unwrap_err().detail().contains("repeat channel"));
        assert!(query("a=1&a=2").take("a").is_err());
        assert!(Query::parse(Some("a=%ff")).is_err());
        assert!(Query::parse(Some("a=%4")).is_err());
        assert!(query("channel=a&channel=b").channels(1, "limits.x").is_err());
    }

    #[test]
    fn a_resumed_stream_ignores_the_start_of_its_url() {
        let begin = |text: &'static str, header| query(text).start(header);
        let after = |text: &str| StartParam::After(text.to_owned());
        assert_eq!(begin("after=earliest", None).unwrap(), after("earliest"));
        assert_eq!(begin("after=earliest", Some("k3Vq00-1")).unwrap(), after("k3Vq00-1"));
        assert_eq!(begin("last=3&lastEventId=k3Vq00-2", None).unwrap(), after("k3Vq00-2"));
        assert_eq!(begin("last=3", None).unwrap(), StartParam::Last(3));
        assert_eq!(begin("", None).unwrap(), StartParam::Default);
        assert_eq!(begin("after=earliest&last_event_id=", Some("")).unwrap(), after("earliest"));
        assert_eq!(begin("last_event_id=&lastEventId=k3Vq00-2", Some("")).unwrap(), after("k3Vq00-2"));
        assert_eq!(begin("after=&last=3", None).unwrap(), StartParam::Last(3));
        assert_eq!(begin("after=&last=", None).unwrap(), StartParam::Default);
        assert!(begin("last=3&after=now", None).is_err());
        assert!(begin("last=-3", None).is_err());
        let channels = [Channel::parse("a").unwrap()];
        assert_eq!(after("what").starts(&channels, Start::Now).unwrap_err().code(), Code::InvalidPosition);
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("wait", "500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("wait", "2m").unwrap(), Duration::from_secs(120));
        assert_eq!(duration("wait", "5").unwrap_err().detail(), "wait: 5 of what? write 5s or 5ms");
    }
}
