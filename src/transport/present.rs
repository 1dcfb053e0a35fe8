//! Presence as parameters: `GET /v1/presence` and `weir.presence` list the members of a channel; a subscription can
//! make its client a member.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::query::{Query, hex, unhex};
use crate::{
    auth::Identity,
    channel::Channel,
    config::LimitsSection,
    error::{Error, Result},
    json::{JsonStr, write_json_str},
    metrics::{MetricLabel as _, Transport},
    presence::{MemberList, Presence, PresenceLease, PresentClient},
};

/// Members of one answer: the maximum, and the default.
const MAX_LIMIT: u64 = 1_000;

/// A validated request for the members of a channel.
#[derive(Debug)]
pub(crate) struct MembersRequest {
    channel: Channel,
    /// Only the number of members.
    count: bool,
    limit: usize,
    /// The last name of the previous page.
    after: Option<String>,
    bytes: usize,
}

/// The params of `weir.presence`, as sent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembersParams<'a> {
    #[serde(borrow)]
    channel: JsonStr<'a>,
    #[serde(default)]
    count: bool,
    limit: Option<u64>,
    #[serde(borrow)]
    page: Option<JsonStr<'a>>,
}

/// `"present":{"client":"c1","info":{}}`, as sent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PresentParam<'a> {
    #[serde(borrow)]
    client: JsonStr<'a>,
    #[serde(borrow)]
    info: Option<&'a RawValue>,
}

// === impl MembersRequest ===

impl MembersRequest {
    /// From the parameters of `GET /v1/presence`.
    pub(crate) fn from_query(mut query: Query<'_>, limits: &LimitsSection) -> Result<Self> {
        let channel = query.one_channel()?;
        let count = match query.take_nonempty("count")?.as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(Error::params("count is true or false")),
        };
        let (limit, page) = (query.number("limit")?, query.take_nonempty("page")?);
        query.finish()?;
        Self::check(channel, count, limit, page.as_deref(), limits)
    }

    /// From the params of `weir.presence`.
    pub(crate) fn from_params(params: &str, limits: &LimitsSection) -> Result<Self> {
        let parsed: MembersParams<'_> = crate::json::parse_json(params)?;
        let channel = Channel::parse(&parsed.channel)?;
        Self::check(channel, parsed.count, parsed.limit, parsed.page.as_deref(), limits)
    }

    fn check(
        channel: Channel,
        count: bool,
        limit: Option<u64>,
        page: Option<&str>,
        limits: &LimitsSection,
    ) -> Result<Self> {
        let limit = limit.unwrap_or(MAX_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Error::params(format!("limit: 1 to {MAX_LIMIT}")));
        }
        let after = match page {
            Some(page) => {
                let name = unhex(page).ok_or_else(|| Error::params("page is what the last answer called page"))?;
                Some(String::from_utf8_lossy(&name).into_owned())
            }
            None => None,
        };
        Ok(MembersRequest { channel, count, limit: limit as usize, after, bytes: limits.page_bytes })
    }

    /// Checks that `identity` may list the members.
    pub(crate) fn permit(&self, identity: &Identity) -> Result<()> {
        let _ = identity.may_list_members(&self.channel)?;
        Ok(())
    }

    /// `{"channel":"C","count":2,"position":"k3Vq-7","members":[…],"page":"…"}`
    pub(crate) async fn answer(&self, presence: &Presence) -> Result<Vec<u8>> {
        let limit = if self.count { 0 } else { self.limit };
        let MemberList { page, position } =
            presence.list(&self.channel, self.after.as_deref(), limit, self.bytes).await?;
        let mut out = br#"{"channel":"#.to_vec();
        write_json_str(self.channel.as_str(), &mut out);
        out.extend_from_slice(br#","count":"#);
        out.extend_from_slice(itoa::Buffer::new().format(page.count).as_bytes());
        if let Some(position) = position {
            out.extend_from_slice(format!(r#","position":"{position}""#).as_bytes());
        }
        if !self.count {
            out.extend_from_slice(br#","members":["#);
            for (n, (client, about)) in page.members.iter().enumerate() {
                if n > 0 {
                    out.push(b',');
                }
                about.write_json(client, &mut out);
            }
            out.push(b']');
            if let Some((last, _)) = page.members.last().filter(|_| page.more) {
                out.extend_from_slice(format!(r#","page":"{}""#, hex(last.as_bytes())).as_bytes());
            }
        }
        out.push(b'}');
        Ok(out)
    }
}

// === becoming present ===

/// The parameters `present=c1` and `info={}` of a URL that subscribes; `most` is `limits.present_info`.
pub(crate) fn from_query(query: &mut Query<'_>, most: usize) -> Result<Option<PresentClient>> {
    let (client, info) = (query.take("present")?, query.take_nonempty("info")?);
    let Some(client) = client else {
        return match info {
            Some(_) => Err(Error::params("info is about a client that is present: name it with present")),
            None => Ok(None),
        };
    };
    let info: Option<&RawValue> = info
        .as_deref()
        .map(|info| serde_json::from_str(info).map_err(|error| Error::params(format!("info is JSON: {error}"))))
        .transpose()?;
    PresentClient::new(&client, info, most).map(Some)
}

/// Makes `client`, if any, present on those of `channels` that can have presence; the result has an entry for each channel.
/// Reserved channels have none, so that one stream can show a channel and its `$presence/…`.
///
/// # Errors
/// `invalid_params` if no channel can have presence, or the name of one is too long for it; `forbidden`; `limit_reached`.
pub(crate) fn enter<'a>(
    presence: &Arc<Presence>,
    identity: &Identity,
    channels: impl Iterator<Item = &'a Channel> + Clone,
    client: Option<&PresentClient>,
    transport: Transport,
) -> Result<Vec<Option<PresenceLease>>> {
    let Some(client) = client else { return Ok(channels.map(|_| None).collect()) };
    let all_reserved = channels.clone().all(Channel::is_reserved);
    let enter = |channel: &Channel| {
        if channel.is_reserved() && !all_reserved {
            return Ok(None);
        }
        let permit = identity.may_join(channel)?;
        presence.enter(channel, client, permit.subject(), transport.value()).map(Some)
    };
    channels.map(enter).collect()
}

impl PresentParam<'_> {
    pub(crate) fn client(&self, most: usize) -> Result<PresentClient> {
        PresentClient::new(&self.client, self.info, most)
    }
}
