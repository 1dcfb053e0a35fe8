//! What Redis refuses, moves or has much of: it is asked for again, given back, and never costs more than it must.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::{
    nodes::{Node, channel},
    servers::{Server, until},
};

/// A subscription that Redis refused once is made, though new ones come all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_subscription_while_others_come() {
    let redis = Server::start(&[]).await;
    let node = Node::start(&redis.url()).await;
    redis.cli(&["ACL", "SETUSER", "default", "resetchannels", "&weir:{?probe*", "&weir:{other*"]).await;
    let refused = tokio::spawn({
        let bus = node.bus.clone();
        async move { while bus.watch(&[channel("refused")]).await.is_err() {} }
    });
    until("it is refused", || async { redis.cli(&["ACL", "LOG"]).await.contains("weir:{refused}:e") }).await;
    redis.cli(&["ACL", "SETUSER", "default", "allchannels"]).await;
    let others = AtomicUsize::new(0);
    until("it is asked for again", || async {
        let name = format!("other{}", others.fetch_add(1, SeqCst));
        node.bus.watch(&[channel(&name)]).await.unwrap();
        refused.is_finished()
    })
    .await;
}
