//! [`Readers`]: who on this node reads of members and holders. For backends.

use std::sync::Arc;

use super::{Feed, Holding, Member, Members, NodeId, Roster, Writer};

#[derive(Default)]
pub struct Readers {
    members: Vec<Writer<NodeId, Member>>,
    /// With the prefix of the names that concern them.
    rosters: Vec<(String, HoldingWriter)>,
}

type HoldingWriter = Writer<(Arc<str>, NodeId), Holding>;

impl Readers {
    /// A new reader, who is told first that `up` are up.
    pub fn members(&mut self, up: impl IntoIterator<Item = NodeId>) -> Members {
        let (feed, writer) = Feed::new();
        for node in up {
            writer.put(node, Member { node, up: true });
        }
        self.members.push(writer);
        feed
    }

    /// A new reader, who is told first what there is.
    pub fn roster(&mut self, prefix: &str, known: impl IntoIterator<Item = Holding>) -> Roster {
        let (feed, writer) = Feed::new();
        for holding in known.into_iter().filter(|holding| holding.name.starts_with(prefix)) {
            writer.put((holding.name.clone(), holding.node), holding);
        }
        self.rosters.push((prefix.to_owned(), writer));
        feed
    }

    pub fn member(&mut self, node: NodeId, up: bool) {
        self.members.retain(|writer| writer.put(node, Member { node, up }));
    }

    pub fn holding(&mut self, holding: &Holding) {
        let key = (holding.name.clone(), holding.node);
        self.rosters.retain(|(prefix, writer)| {
            // Readers that are gone are found out with the next name that concerned them.
            !holding.name.starts_with(prefix.as_str()) || writer.put(key.clone(), holding.clone())
        });
    }
}
