//! [`ImportSource`]: the Redis of ganomede-events, which is only read.
//!
//! ```text
//! indices:<channel>                    the newest id, as text
//! <channel>:keys                       sorted set of the keys of events, by id
//! <channel>:<id>                       an event, as JSON
//! last-fetched:<clientId>:<channel>    the position of a client, as text
//! indices:<indexId>                    the definition of an index, as JSON: the same names as the counters
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, ProtocolVersion, aio::MultiplexedConnection, cmd, pipe};
use serde::Deserialize;

use crate::{
    backend::redis::client::{RedisUrl, TopologyKind, crate_client},
    json::parse_owned,
    terminal::Failure,
};

const PATIENCE: Duration = Duration::from_secs(30);
/// Keys of one SCAN, and of one MGET.
const MANY: usize = 1000;

pub(super) struct ImportSource {
    connection: MultiplexedConnection,
}

/// The content of the source except the events.
#[derive(Debug, Default)]
pub(super) struct SourceSurvey {
    /// With the newest id that was assigned, which may have no event.
    pub(super) channels: BTreeMap<String, u64>,
    /// The key without `last-fetched:`, and the id.
    pub(super) cursors: Vec<(String, u64)>,
    pub(super) indices: Vec<SourceIndex>,
}

#[derive(Debug, Deserialize)]
pub(super) struct SourceIndex {
    pub(super) id: String,
    pub(super) channel: String,
    pub(super) field: String,
}

/// The range of the ids that have events.
#[derive(Clone, Copy, Debug)]
pub(super) struct EventIds {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) count: u64,
}

impl ImportSource {
    pub(super) async fn open(url: &str) -> Result<Self, Failure> {
        let url = RedisUrl::parse(url).map_err(Failure::Usage)?;
        let TopologyKind::Standalone(address) = &url.kind else {
            return Err(Failure::Usage("ganomede-events uses one Redis: write redis://host:6379".into()));
        };
        // Its server may be too old for RESP3.
        let client = crate_client(&url, address, true, ProtocolVersion::RESP2).map_err(|error| unavailable(&error))?;
        let config = AsyncConnectionConfig::new();
        let config = config.set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        let connection =
            client.get_multiplexed_async_connection_with_config(&config).await.map_err(|error| unavailable(&error))?;
        Ok(ImportSource { connection })
    }

    async fn query<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, Failure> {
        command.query_async(&mut self.connection).await.map_err(|error| unavailable(&error))
    }

    /// Reads all keys except those of events.
    pub(super) async fn survey(&mut self) -> Result<SourceSurvey, Failure> {
        let mut survey = SourceSurvey::default();
        for key in self.scan("*:keys", "zset").await? {
            let channel = key.strip_suffix(":keys").unwrap_or_default().to_owned();
            // A set of another program may have such a name, too.
            let members: Vec<String> = self.query(cmd("ZRANGE").arg(&key).arg(0).arg(0)).await?;
            if !channel.is_empty() && members.iter().all(|member| id_of(member, &channel).is_some()) {
                survey.channels.insert(channel, 0);
            }
        }
        for (key, value) in self.texts("indices:").await? {
            let name = &key["indices:".len()..];
            if let Ok(counter) = value.parse() {
                survey.channels.insert(name.to_owned(), counter);
            } else if let Ok(index) = parse_owned::<SourceIndex>(value.as_bytes()) {
                survey.indices.push(index);
            }
        }
        for (key, value) in self.texts("last-fetched:").await? {
            if let Ok(id) = value.parse() {
                survey.cursors.push((key["last-fetched:".len()..].to_owned(), id));
            }
        }
        survey.indices.sort_by(|a, b| a.id.cmp(&b.id));
        survey.cursors.sort();
        Ok(survey)
    }

    async fn scan(&mut self, pattern: &str, kind: &str) -> Result<BTreeSet<String>, Failure> {
        let mut found = BTreeSet::new();
        let mut cursor: u64 = 0;
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(MANY);
            let (next, keys): (u64, Vec<Vec<u8>>) = self.query(&scan).await?;
            // A key that is not UTF-8 is of another program.
            let keys: Vec<String> = keys.into_iter().filter_map(|key| String::from_utf8(key).ok()).collect();
            // SCAN has the argument TYPE only since Redis 6.
            let mut types = pipe();
            for key in &keys {
                types.cmd("TYPE").arg(key);
            }
            let types: Vec<String> = match keys.is_empty() {
                true => Vec::new(),
                false => types.query_async(&mut self.connection).await.map_err(|error| unavailable(&error))?,
            };
            found.extend(keys.into_iter().zip(types).filter(|(_, is)| is == kind).map(|(key, _)| key));
            cursor = next;
            if cursor == 0 {
                return Ok(found);
            }
        }
    }

    async fn texts(&mut self, prefix: &str) -> Result<Vec<(String, String)>, Failure> {
        let keys: Vec<String> = self.scan(&format!("{prefix}*"), "string").await?.into_iter().collect();
        let mut texts = Vec::with_capacity(keys.len());
        for keys in keys.chunks(MANY) {
            let values: Vec<Option<Vec<u8>>> = self.query(cmd("MGET").arg(keys)).await?;
            let values = values.into_iter().map(|value| value.and_then(|value| String::from_utf8(value).ok()));
            texts.extend(keys.iter().cloned().zip(values).filter_map(|(key, value)| Some((key, value?))));
        }
        Ok(texts)
    }

    /// None if there are no events.
    pub(super) async fn event_ids(&mut self, channel: &str) -> Result<Option<EventIds>, Failure> {
        let key = format!("{channel}:keys");
        let first: Vec<String> = self.query(cmd("ZRANGE").arg(&key).arg(0).arg(0)).await?;
        let last: Vec<String> = self.query(cmd("ZRANGE").arg(&key).arg(-1).arg(-1)).await?;
        let count: u64 = self.query(cmd("ZCARD").arg(&key)).await?;
        let id = |members: &[String]| members.first().and_then(|member| id_of(member, channel));
        Ok(id(&first).zip(id(&last)).map(|(first, last)| EventIds { first, last, count }))
    }

    /// Up to `limit` events after an id, in their order; None for an id that is listed and has no event.
    pub(super) async fn page(
        &mut self,
        channel: &str,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Option<String>)>, Failure> {
        let mut range = cmd("ZRANGEBYSCORE");
        range.arg(format!("{channel}:keys")).arg(format!("({after}")).arg("+inf").arg("LIMIT").arg(0).arg(limit);
        let members: Vec<String> = self.query(&range).await?;
        if members.is_empty() {
            return Ok(Vec::new());
        }
        let events: Vec<Option<String>> = self.query(cmd("MGET").arg(&members)).await?;
        let ids = members.iter().map(|member| id_of(member, channel));
        let page = ids.zip(events).filter_map(|(id, event)| Some((id?, event)));
        Ok(page.collect())
    }

    pub(super) async fn event(&mut self, channel: &str, id: u64) -> Result<Option<String>, Failure> {
        self.query(cmd("GET").arg(format!("{channel}:{id}"))).await
    }
}

fn id_of(member: &str, channel: &str) -> Option<u64> {
    let id = member.strip_prefix(channel)?.strip_prefix(':')?;
    id.parse().ok().filter(|id: &u64| *id > 0)
}

fn unavailable(error: &redis::RedisError) -> Failure {
    let reason = format!("the source: {error}");
    match error.code() {
        Some("NOAUTH" | "WRONGPASS" | "NOPERM") => Failure::Rejected(reason),
        _ => Failure::Unavailable(reason),
    }
}
