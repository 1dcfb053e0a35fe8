//! Presence as the events of `$presence/CHANNEL` announce it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Weir;

/// The members according to the events of `$presence/CHANNEL`.
#[derive(Default)]
pub struct PresenceReplay {
    pub members: BTreeMap<String, Value>,
    pub joins: usize,
    pub leaves: usize,
    pub events: usize,
}

impl PresenceReplay {
    pub async fn of(weir: &Weir, channel: &str, after: &str) -> Self {
        let mut replay = PresenceReplay::default();
        let mut after = after.to_owned();
        loop {
            let page = weir
                .get(format!("/v1/events?channel=$presence/{channel}&after={after}&limit=1000"))
                .await
                .expect(200)
                .json();
            assert_eq!(page["gaps"], json!([]));
            page["events"].as_array().unwrap().iter().for_each(|event| replay.take(event));
            after = page["next"].as_str().unwrap().to_owned();
            if page["more"] == false {
                return replay;
            }
        }
    }

    pub fn take(&mut self, event: &Value) {
        self.events += 1;
        assert!(event["data"].to_string().len() < 64 << 10);
        if event["data"]["all"] == true {
            self.members.clear();
        }
        for member in event["data"]["members"].as_array().unwrap() {
            let client = member["client"].as_str().unwrap().to_owned();
            match event["type"].as_str().unwrap() {
                "join" => {
                    self.joins += 1;
                    self.members.insert(client, member.clone());
                }
                "leave" => {
                    self.leaves += 1;
                    assert!(self.members.remove(&client).is_some(), "{client} had not joined");
                }
                other => panic!("{other}"),
            }
        }
    }

    pub fn list(&self) -> Vec<&Value> {
        self.members.values().collect()
    }
}
