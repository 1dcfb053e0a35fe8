//! The params of weir's own methods. Unknown members are rejected.

use std::{borrow::Cow, time::Duration};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny},
};
use serde_json::value::RawValue;

use crate::{
    bus::Filter,
    channel::{Channel, check_label},
    error::{Code, Error, Result},
    event::IncomingEvent,
    json::{JsonStr, json_error_at_path, parse_json},
    position::Start,
    token::AfterParam,
    transport::{present::PresentParam, query::duration},
};

/// Bytes of the method names that one registration declares.
const MAX_METHODS: usize = 32 * 1024;

/// The one object in `params`: `{…}` or `[{…}]`. Absent params and `[]` are `{}`: libraries send an empty array for a method
/// without arguments.
pub(super) fn object(params: Option<&RawValue>) -> Result<&str> {
    let Some(params) = params else { return Ok("{}") };
    if params.get().starts_with('{') {
        return Ok(params.get());
    }
    match serde_json::from_str::<Vec<&RawValue>>(params.get()).as_deref() {
        Ok([]) => Ok("{}"),
        Ok([object]) if object.get().starts_with('{') => Ok(object.get()),
        _ => Err(Error::params("params of weir's methods are an object, or an array that holds just that")),
    }
}

/// Reads the params of one method.
pub(super) fn read<'a, T: Deserialize<'a>>(params: Option<&'a RawValue>) -> Result<T> {
    parse_json(object(params)?)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NoParams {}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthParams {
    pub(super) token: Box<str>,
}

/// `weir.publish`.
#[derive(Debug)]
pub(super) enum PublishParams<'a> {
    One(Box<IncomingEvent<'a>>),
    Many(Vec<IncomingEvent<'a>>),
}

impl<'a> PublishParams<'a> {
    pub(super) fn read(params: Option<&'a RawValue>) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct ManyEvents<'a> {
            #[serde(borrow)]
            events: Vec<IncomingEvent<'a>>,
        }

        let text = object(params)?;
        match serde_json::from_str(text) {
            Ok(one) => Ok(PublishParams::One(one)),
            Err(not_one) => match serde_json::from_str::<ManyEvents<'_>>(text) {
                Ok(many) => Ok(PublishParams::Many(many.events)),
                // The error is about the form that was meant.
                Err(not_many) if text.contains(r#""events""#) => {
                    Err(json_error_at_path::<ManyEvents<'_>>(text, &not_many))
                }
                Err(_) => Err(json_error_at_path::<IncomingEvent<'_>>(text, &not_one)),
            },
        }
    }
}

/// `weir.subscribe`, as sent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SubscribeParams<'a> {
    #[serde(borrow)]
    pub(super) channels: Vec<ChannelParam<'a>>,
    /// Applies to all of them.
    #[serde(borrow)]
    pub(super) after: Option<AfterText<'a>>,
    /// Makes the client present on all of them, while they are subscribed.
    #[serde(borrow)]
    pub(super) present: Option<PresentParam<'a>>,
}

/// `"chat"`, or `{"channel":"orders","after":"k3Vq00-42","type":["created"]}`.
#[derive(Debug)]
pub(super) struct ChannelParam<'a>(ChannelObject<'a>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChannelObject<'a> {
    #[serde(borrow)]
    channel: JsonStr<'a>,
    #[serde(borrow)]
    after: Option<AfterText<'a>>,
    last: Option<u64>,
    #[serde(borrow, default, rename = "type")]
    kinds: Vec<JsonStr<'a>>,
}

/// A position, offset, token, `earliest` or `now`; a bare offset may be a number.
#[derive(Debug)]
pub(super) struct AfterText<'a>(Cow<'a, str>);

/// One channel to subscribe to.
#[derive(Debug)]
pub(super) struct SubscribeRequest {
    pub(super) channel: Channel,
    /// `None` if not specified: `now`, or the current position of an existing subscription.
    pub(super) start: Option<Start>,
    pub(super) filter: Option<Filter>,
}

impl SubscribeParams<'_> {
    /// Checks everything but permissions.
    pub(super) fn requests(mut self) -> Result<Vec<SubscribeRequest>> {
        // As in a URL, an empty position is none.
        let is_position = |after: &AfterText<'_>| !after.as_str().is_empty();
        self.after = self.after.filter(is_position);
        if self.channels.is_empty() {
            return Err(Error::params("channels is empty"));
        }
        let mut requests = Vec::with_capacity(self.channels.len());
        for ChannelParam(topic) in self.channels {
            let channel = Channel::parse(&topic.channel)?;
            let start = match (topic.after.as_ref().filter(|after| is_position(after)), topic.last, &self.after) {
                (None, None, _) => None,
                (_, _, Some(_)) | (Some(_), Some(_), _) => {
                    return Err(Error::params(format!("channel {channel} has more than one of after and last")));
                }
                (None, Some(last), None) => Some(Start::Last(last)),
                (Some(after), None, None) => Some(after.read()?.starts(std::slice::from_ref(&channel))?[0]),
            };
            let kinds: Vec<&str> = topic.kinds.iter().map(|kind| &**kind).collect();
            requests.push(SubscribeRequest { channel, start, filter: Filter::new(&kinds)? });
        }
        let mut names: Vec<&Channel> = requests.iter().map(|requests| &requests.channel).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::params(format!("channel {} is named twice", twice[0])));
        }
        if let Some(after) = &self.after {
            let channels: Vec<Channel> = requests.iter().map(|requests| requests.channel.clone()).collect();
            let starts = after.read()?.starts(&channels)?;
            requests.iter_mut().zip(starts).for_each(|(requests, start)| requests.start = Some(start));
        }
        Ok(requests)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UnsubscribeParams<'a> {
    #[serde(borrow)]
    pub(super) channels: Vec<JsonStr<'a>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CommitParams<'a> {
    #[serde(borrow)]
    pub(super) consumer: JsonStr<'a>,
    #[serde(borrow)]
    pub(super) after: AfterText<'a>,
    /// The channels of the token, if not all channels of the consumer.
    #[serde(borrow)]
    pub(super) channels: Option<Vec<JsonStr<'a>>>,
}

/// `weir.call`, as sent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CallParams<'a> {
    #[serde(borrow)]
    pub(super) service: JsonStr<'a>,
    #[serde(borrow)]
    pub(super) method: JsonStr<'a>,
    #[serde(borrow)]
    pub(super) params: Option<&'a RawValue>,
    #[serde(borrow)]
    timeout: Option<JsonStr<'a>>,
    #[serde(borrow)]
    wait: Option<JsonStr<'a>>,
    #[serde(default)]
    pub(super) late: bool,
    stream: Option<IgnoredAny>,
    all: Option<IgnoredAny>,
}

impl CallParams<'_> {
    /// Rejects a call that cannot be forwarded.
    pub(super) fn check(&self) -> Result<()> {
        for (name, given) in [("stream", &self.stream), ("all", &self.all)] {
            if given.is_some() {
                return Err(not_yet(name));
            }
        }
        if self.params.is_some_and(|params| !params.get().starts_with(['{', '['])) {
            return Err(Error::params("params of a call is an object or an array"));
        }
        check_label("method", &self.method)
    }

    pub(super) fn timeout(&self) -> Result<Option<Duration>> {
        self.timeout.as_deref().map(|text| duration("timeout", text)).transpose()
    }

    pub(super) fn wait(&self) -> Result<Option<Duration>> {
        self.wait.as_deref().map(|text| duration("wait", text)).transpose()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProvideParams<'a> {
    #[serde(borrow)]
    pub(super) service: JsonStr<'a>,
    #[serde(default)]
    pub(super) exclusive: bool,
    #[serde(default)]
    pub(super) takeover: bool,
    pub(super) concurrency: Option<u32>,
    #[serde(default)]
    pub(super) names: NamesParam,
    #[serde(default)]
    pub(super) meta: bool,
    #[serde(borrow, default)]
    pub(super) methods: Vec<JsonStr<'a>>,
    standby: Option<IgnoredAny>,
    idempotent: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum NamesParam {
    #[default]
    Bare,
    Full,
}

impl ProvideParams<'_> {
    /// Rejects an invalid registration.
    pub(super) fn check(&self) -> Result<()> {
        for (name, given) in [("standby", &self.standby), ("idempotent", &self.idempotent)] {
            if given.is_some() {
                return Err(not_yet(name));
            }
        }
        if self.concurrency == Some(0) {
            return Err(Error::params("concurrency is at least 1"));
        }
        self.methods.iter().try_for_each(|method| check_label("method", method))?;
        // They are kept as long as the registration, and other nodes learn them.
        match self.methods.iter().map(|method| method.len()).sum::<usize>() > MAX_METHODS {
            true => Err(Error::params(format!("the names in methods have at most {MAX_METHODS} bytes together"))),
            false => Ok(()),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WithdrawParams<'a> {
    #[serde(borrow)]
    pub(super) service: JsonStr<'a>,
}

#[derive(Debug, Deserialize)]
pub(super) struct CancelParams<'a> {
    /// The id as the client sent it. (`$/cancelRequest` may have more members.)
    #[serde(borrow)]
    pub(super) id: &'a RawValue,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServicesParams<'a> {
    #[serde(borrow)]
    pub(super) prefix: Option<JsonStr<'a>>,
}

/// The error for a member that is reserved for a later version.
fn not_yet(name: &str) -> Error {
    Error::params(format!("{name}: not yet"))
}

impl AfterText<'_> {
    pub(super) fn read(&self) -> Result<AfterParam> {
        self.0.parse().map_err(|error| Error::new(Code::InvalidPosition, format!("after is {error}")))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for AfterText<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?.get();
        match super::jsonrpc::string(raw) {
            Some(text) => Ok(AfterText(text)),
            None if raw.bytes().all(|byte| byte.is_ascii_digit()) => Ok(AfterText(Cow::Borrowed(raw))),
            None => Err(de::Error::custom("after is a position, a token, an offset, earliest or now")),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for ChannelParam<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?.get();
        // Not an untagged enum, as its errors do not name the member.
        if let Some(channel) = super::jsonrpc::string(raw) {
            return Ok(ChannelParam(ChannelObject {
                channel: JsonStr(channel),
                after: None,
                last: None,
                kinds: Vec::new(),
            }));
        }
        serde_json::from_str(raw).map(ChannelParam).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(json: &str) -> Option<&RawValue> {
        Some(serde_json::from_str(json).unwrap())
    }

    fn requests(json: &str) -> Result<Vec<SubscribeRequest>> {
        read::<SubscribeParams<'_>>(raw(json))?.requests()
    }

    #[test]
    fn one_object_in_an_array_is_that_object() {
        assert_eq!(object(raw(r#"[ {"a":1} ]"#)).unwrap(), r#"{"a":1}"#);
        assert_eq!((object(None).unwrap(), object(raw("[ ]")).unwrap()), ("{}", "{}"));
        for bad in ["[1]", r#"[{},{}]"#, r#"[[{}]]"#] {
            assert_eq!(object(raw(bad)).unwrap_err().code(), Code::InvalidParams, "{bad}");
        }
    }

    #[test]
    fn an_unknown_member_is_named() {
        let error = read::<WithdrawParams<'_>>(raw(r#"{"service":"a","force":true}"#)).unwrap_err();
        assert_eq!(error.code(), Code::InvalidParams);
        assert!(error.detail().contains("force"), "{error}");
        assert!(requests(r#"{"channels":[{"channel":"a","afer":1}]}"#).unwrap_err().detail().contains("afer"));
        assert!(PublishParams::read(raw(r#"{"channel":"a","dta":1}"#)).unwrap_err().detail().contains("dta"));
        assert!(PublishParams::read(raw(r#"{"events":[{"dta":1}]}"#)).unwrap_err().detail().contains("dta"));
    }

    #[test]
    fn a_malformed_member_is_named() {
        let error = read::<CallParams<'_>>(raw(r#"{"service":"a","method":"b","timeout":5}"#)).unwrap_err();
        assert!(error.detail().starts_with("timeout: "), "{error}");
        assert!(requests(r#"{"channels":"a"}"#).unwrap_err().detail().starts_with("channels: "));
        let error = PublishParams::read(raw(r#"{"events":[{"channel":"a"},{"channel":1}]}"#)).unwrap_err();
        assert!(error.detail().starts_with("events[1].channel: "), "{error}");
        // An error that names its member already does not name it twice.
        assert!(PublishParams::read(raw(r#"{"data":1}"#)).unwrap_err().detail().starts_with("missing field `channel`"));
    }

    #[test]
    fn subscriptions() {
        let list = requests(r#"{"channels":["chat",{"channel":"orders","after":"k3Vq00-42","type":["created"]},{"channel":"log","last":20},{"channel":"b","after":7}]}"#).unwrap();
        assert_eq!(list[0].start, None);
        assert_eq!(list[1].start, Some(Start::After("k3Vq00-42".parse().unwrap())));
        assert!(list[1].filter.is_some());
        assert_eq!(list[2].start, Some(Start::Last(20)));
        assert_eq!(list[3].start, Some(Start::AfterOffset(7)));
        let list = requests(r#"{"channels":["a",{"channel":"b","after":"","last":2}],"after":""}"#).unwrap();
        assert_eq!((list[0].start, list[1].start), (None, Some(Start::Last(2))));
        for bad in [
            r#"{"channels":[]}"#,
            r#"{"channels":["a","a"]}"#,
            r#"{"channels":[""]}"#,
            r#"{"channels":[{"channel":"a","after":"now","last":1}]}"#,
            r#"{"channels":[{"channel":"a","after":-1}]}"#,
            r#"{"channels":["a"],"present":"c"}"#,
            r#"{"channels":["a"],"present":{"client":"c","nick":1}}"#,
            r#"{"channels":"a"}"#,
        ] {
            assert_eq!(requests(bad).unwrap_err().code(), Code::InvalidParams, "{bad}");
        }
        assert_eq!(
            requests(r#"{"channels":[{"channel":"a","after":"x-y-z"}]}"#).unwrap_err().code(),
            Code::InvalidPosition
        );
        assert_eq!(requests(r#"{"channels":["a","b"],"after":"earliest"}"#).unwrap()[1].start, Some(Start::Earliest));
    }

    #[test]
    fn reserved_members() {
        let call = |json| read::<CallParams<'_>>(raw(json)).and_then(|call| call.check());
        assert!(call(r#"{"service":"a","method":"b/c","params":[]}"#).is_ok());
        assert!(call(r#"{"service":"a","method":"b","stream":true}"#).unwrap_err().detail().contains("not yet"));
        assert!(call(r#"{"service":"a","method":"b","params":1}"#).is_err());
        assert!(call(r#"{"service":"a","method":"b\n"}"#).is_err());
        let provide = |json| read::<ProvideParams<'_>>(raw(json)).and_then(|provide| provide.check());
        assert!(provide(r#"{"service":"a","names":"full","methods":["x"]}"#).is_ok());
        assert!(provide(r#"{"service":"a","standby":true}"#).unwrap_err().detail().contains("standby"));
        assert!(provide(r#"{"service":"a","concurrency":0}"#).is_err());
        assert!(provide(r#"{"service":"a","names":"short"}"#).is_err());
    }
}
