//! The section `compat.grip`.

use std::{net::SocketAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use crate::config::{
    AdapterConfig, AdapterContext, Secret,
    section::{Table, seconds, section},
};

section! {
    /// The `grip` adapter: a GRIP proxy compatible with Pushpin. weir forwards requests to HTTP servers (origins) and
    /// holds a response open if the origin instructs it to.
    Config {
        /// Address of the proxy. It is a separate listener, because all its paths belong to the origins. Empty disables
        /// it.
        listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 7999))),
        /// Address at which origins publish. Empty disables it. The main listeners serve the same at /grip/publish/.
        publish_listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 5561))),
        /// The `iss` claim of Grip-Sig.
        iss: String as Text = "pushpin".into(),
        /// Timeout for connecting to an origin.
        connect_timeout: Duration as Time = seconds(5),
        /// Timeout for the response headers of an origin.
        timeout: Duration as Time = seconds(60),
        /// Maximum number of idle connections kept per origin.
        idle_connections: usize as Count = 64,
        /// Routes to origins, written as [[compat.grip.routes]]. The longest matching `path` applies. `origin` is the
        /// URL of the server. `key` signs Grip-Sig and is required for publishing (plain text, or base64:…). `prefix`
        /// is prepended to channel names. `iss` is the `iss` claim that publish tokens must have.
        routes: Vec<GripRoute> as Tables = Vec::new(),
    }
}

section! {
    /// An origin and the path prefix that is forwarded to it.
    GripRoute {
        path: String as Path = "/".into(),
        origin: String as Url = String::new(),
        key: Secret as Secret = Secret::default(),
        prefix: String as Text = String::new(),
        iss: String as Text = String::new(),
    }
}

impl Table for GripRoute {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("origin", "where is the server?")];
    const EXAMPLE: &'static str = "{ path = \"/\", origin = \"http://127.0.0.1:3000\" }";
}

impl GripRoute {
    /// Decodes the key. `None` if it begins with `base64:` and is not valid base64; empty if no key is set.
    pub fn key_bytes(&self) -> Option<Vec<u8>> {
        match self.key.reveal().strip_prefix("base64:") {
            Some(text) => BASE64.decode(text).ok(),
            None => Some(self.key.reveal().into()),
        }
    }
}

impl AdapterConfig for Config {
    fn name(&self) -> &'static str {
        "grip"
    }

    fn paths(&self) -> &'static [&'static str] {
        &["/grip/*"]
    }

    fn listeners(&self) -> Vec<(&'static str, SocketAddr)> {
        let proxy = self.listen.map(|address| ("compat.grip.listen", address));
        let publish = self.publish_listen.map(|address| ("compat.grip.publish_listen", address));
        proxy.into_iter().chain(publish).collect()
    }

    fn contradictions(&self, context: &AdapterContext) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut wrong = |reason: String| found.push(("compat.grip.routes", reason));
        if !context.enabled {
            if !self.routes.is_empty() {
                wrong("are set, but compat.enable does not contain grip".into());
            }
            return found;
        }
        for (n, route) in self.routes.iter().enumerate() {
            if self.routes[..n].iter().any(|other| other.path == route.path) {
                wrong(format!("{} has two origins", route.path));
            }
            if route.key_bytes().is_none() {
                wrong(format!("the key of {} is not valid base64", route.path));
            }
        }
        let keyed = !self.routes.is_empty() && self.routes.iter().all(|route| !route.key.is_empty());
        if let Some(address) = self.publish_listen
            && !address.ip().is_loopback()
            && !keyed
            && !context.allow_anonymous
        {
            let reason = format!(
                "{address} can be reached from other machines, and a route without a key accepts every publisher: give \
                 every route a key, listen on 127.0.0.1:{}, or allow this with auth.allow_anonymous = true",
                address.port()
            );
            found.push(("compat.grip.publish_listen", reason));
        }
        found
    }
}
