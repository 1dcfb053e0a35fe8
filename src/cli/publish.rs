//! `weir publish`: one event, or a line of standard input each.

use http::Method;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    sync::mpsc,
};

use super::{Failure, Lenient, Output, Target, client::Client, commands::PATIENCE, note};

/// Events of a request, and bytes beyond which none is added to it. Within the limits of a node that nobody changed.
const BATCH: usize = 500;
const BATCH_BYTES: usize = 4 << 20;

/// What every event of the command has.
#[derive(Clone, Copy)]
pub struct Label<'a> {
    pub channel: &'a str,
    pub kind: Option<&'a str>,
    pub from: Option<&'a str>,
}

#[derive(Serialize)]
struct Event<'a> {
    channel: &'a str,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Lenient<'a>>,
}

/// Publishes one event, with `data` if there is any.
pub async fn one(
    client: &mut Client,
    label: Label<'_>,
    key: Option<&str>,
    data: Option<&str>,
    out: &mut Output,
) -> Result<(), Failure> {
    if data.is_some_and(|data| data.starts_with(['{', '[']) && matches!(Lenient::of(data), Lenient::Text(_))) {
        note(format_args!("the data is not JSON: published as text"));
    }
    let body = json(&label.event(key, data))?;
    if let Some(placed) = client.ask(Method::POST, &Target::new("/v1/events"), Some(body), PATIENCE).await? {
        out.json(&placed)?;
    }
    Ok(())
}

/// Publishes each line of standard input as it comes; what has piled up goes together.
pub async fn lines(client: &mut Client, label: Label<'_>, out: &mut Output) -> Result<(), Failure> {
    // Bounded: a fast producer waits for a slow node.
    let (tx, mut rx) = mpsc::channel::<String>(2 * BATCH);
    let reader = async move {
        let mut lines = BufReader::new(stdin()).lines();
        while let Some(line) =
            lines.next_line().await.map_err(|error| Failure::Failed(format!("standard input: {error}")))?
        {
            // Closed when publishing has failed, which is what the command then reports.
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
                let events: Vec<_> = batch.iter().map(|line| label.event(None, Some(line))).collect();
                let body = json(&events)?;
                let answer = client.ask(Method::POST, &Target::new("/v1/events"), Some(body), PATIENCE).await?;
                let placed = answer.as_deref().map(|answer| serde_json::from_str::<Vec<&RawValue>>(answer.get()));
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
        // Not both at once: a node that refuses ends the command though standard input goes on.
        done = &mut writer => done,
        read = &mut reader => {
            let published = writer.await;
            read.and(published)
        }
    }
}

impl<'a> Label<'a> {
    fn event(self, key: Option<&'a str>, data: Option<&'a str>) -> Event<'a> {
        Event { channel: self.channel, kind: self.kind, from: self.from, key, data: data.map(Lenient::of) }
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|error| Failure::Failed(error.to_string()))
}
