//! The nodes of a Redis Cluster, as `CLUSTER NODES` lists them.

#[derive(Debug)]
pub(super) struct ClusterNode {
    pub(super) id: String,
    pub(super) address: String,
    pub(super) master: bool,
    pub(super) failing: bool,
    pub(super) replica_of: String,
    pub(super) slots: u32,
}

/// Parses the reply to `CLUSTER NODES`.
pub(super) fn parse_nodes(text: &str) -> Vec<ClusterNode> {
    text.lines().filter_map(parse_node).collect()
}

fn parse_node(line: &str) -> Option<ClusterNode> {
    let mut words = line.split_ascii_whitespace();
    let (id, address, flags, replica_of) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let flag = |name: &str| flags.split(',').any(|flag| flag == name);
    // Skips ping, pong, epoch and link state.
    let slots = words.skip(4).filter(|range| !range.starts_with('[')).filter_map(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        Some(to.parse::<u32>().ok()?.checked_sub(from.parse().ok()?)? + 1)
    });
    Some(ClusterNode {
        id: id.to_owned(),
        address: address.split('@').next().unwrap_or_default().to_owned(),
        master: flag("master"),
        failing: ["fail", "fail?", "noaddr", "handshake"].into_iter().any(flag),
        replica_of: replica_of.to_owned(),
        slots: slots.sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_a_cluster_are_parsed() {
        let nodes = parse_nodes(
            "07c3 127.0.0.1:30004@31004,host4 slave e7d1 0 1426238317239 4 connected\n\
             67ed 127.0.0.1:30002@31002 master,fail? - 0 1426238316232 2 connected 5461-10922 [93-<-292f]\n\
             e7d1 127.0.0.1:30001@31001 myself,master - 0 0 1 connected 0-5459 5460\n",
        );
        assert_eq!(nodes.iter().map(|node| node.slots).collect::<Vec<_>>(), [0, 5462, 5461]);
        assert_eq!((nodes[0].replica_of.as_str(), nodes[0].master), ("e7d1", false));
        assert!(nodes[1].failing && !nodes[2].failing);
        assert_eq!(nodes[2].address, "127.0.0.1:30001");
    }
}
