//! `weir publish`: publishes one event, or one per line of standard input.

use http::Method;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    sync::mpsc,
};

use super::{
    client::{NodeClient, RESPONSE_TIMEOUT},
    json_or_text::JsonOrText,
    request_target::RequestTarget,
};
use crate::terminal::{Failure, Output, note};

/// Maximum number and size of the events of one request. Both are within the default limits of a node.
const BATCH: usize = 500;
const BATCH_BYTES: usize = 4 << 20;

/// The members that all events of the command have.
#[derive(Clone, Copy)]
pub(super) struct EventFields<'a> {
    pub(super) channel: &'a str,
    pub(super) kind: Option<&'a str>,
    pub(super) from: Option<&'a str>,
}

#[derive(Serialize)]
struct OutgoingEvent<'a> {
    channel: &'a str,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<JsonOrText<'a>>,
}

/// Publishes one event.
pub(super) async fn one(
    client: &mut NodeClient,
    fields: EventFields<'_>,
    key: Option<&str>,
    data: Option<&str>,
    out: &mut Output,
) -> Result<(), Failure> {
    if data.is_some_and(|data| data.starts_with(['{', '[']) && matches!(JsonOrText::of(data), JsonOrText::Text(_))) {
        note(format_args!("the data is not JSON and is published as text"));
    }
    let body = json(&fields.event(key, data))?;
    if let Some(placed) =
        client.fetch(Method::POST, &RequestTarget::new("/v1/events"), Some(body), RESPONSE_TIMEOUT).await?
    {
        out.json(&placed)?;
    }
    Ok(())
}

/// Publishes each line of standard input at once. Lines that arrive during a request are batched in the next one.
pub(super) async fn lines(client: &mut NodeClient, fields: EventFields<'_>, out: &mut Output) -> Result<(), Failure> {
    // Bounded, so that a slow node causes backpressure.
    let (tx, mut rx) = mpsc::channel::<String>(2 * BATCH);
    let reader = async move {
        let mut lines = BufReader::new(stdin()).lines();
        while let Some(line) =
            lines.next_line().await.map_err(|error| Failure::Failed(format!("standard input: {error}")))?
        {
            // Closed if publishing failed, and then that error is reported.
            if tx.send(line).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let writer = async move {
        let mut waiting = Vec::with_capacity(BATCH);
        while rx.recv_many(&mut waiting, BATCH).await > 0 {
            let mut rest = waiting.as_slice();
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = rest.iter().take_while(|line| {
                    bytes += line.len();
                    bytes <= BATCH_BYTES
                });
                let (batch, later) = rest.split_at(fits.count().max(1));
                rest = later;
                let events: Vec<_> = batch.iter().map(|line| fields.event(None, Some(line))).collect();
                let body = json(&events)?;
                let response =
                    client.fetch(Method::POST, &RequestTarget::new("/v1/events"), Some(body), RESPONSE_TIMEOUT).await?;
                let placed = response.as_deref().map(|response| serde_json::from_str::<Vec<&RawValue>>(response.get()));
                for event in placed.transpose().ok().flatten().unwrap_or_default() {
                    out.json(event)?;
                }
                out.flush()?;
            }
            waiting.clear();
        }
        Ok(())
    };
    tokio::pin!(reader, writer);
    tokio::select! {
        // An error of the node ends the command before the end of standard input.
        done = &mut writer => done,
        read = &mut reader => {
            let published = writer.await;
            read.and(published)
        }
    }
}

impl<'a> EventFields<'a> {
    fn event(self, key: Option<&'a str>, data: Option<&'a str>) -> OutgoingEvent<'a> {
        OutgoingEvent { channel: self.channel, kind: self.kind, from: self.from, key, data: data.map(JsonOrText::of) }
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|error| Failure::Failed(error.to_string()))
}
