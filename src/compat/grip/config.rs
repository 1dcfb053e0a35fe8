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
    pub(super) fn key_bytes(&self) -> Option<Vec<u8>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compat::read_config as read, config};

    const ROUTES: &str = r#"
[compat]
enable = ["grip"]
[[compat.grip.routes]]
origin = "http://127.0.0.1:3000/"
key = "base64:c2VjcmV0"
[[compat.grip.routes]]
path = "/api"
origin = "https://example.com"
prefix = "api-"
"#;

    fn routes(config: &config::Config) -> Vec<GripRoute> {
        config.compat.get::<Config>().routes
    }

    #[test]
    fn routes_have_their_own_keys() {
        let loaded = read(ROUTES, &[]).unwrap();
        let [one, two] = &routes(&loaded.config)[..] else { panic!("{loaded:?}") };
        assert_eq!((one.path.as_str(), one.origin.as_str()), ("/", "http://127.0.0.1:3000"));
        assert_eq!(one.key_bytes().as_deref(), Some(&b"secret"[..]));
        assert_eq!((two.path.as_str(), two.prefix.as_str(), two.key.is_empty()), ("/api", "api-", true));
        let text = [("WEIR__COMPAT__GRIP__ROUTES", r#"[{origin="http://a:1", path="/x"}]"#)];
        assert_eq!(routes(&read(ROUTES, &text).unwrap().config)[0].path, "/x");

        let wrong = "[[compat.grip.routes]]\npath = \"x\"\n[[compat.grip.routes]]\norigin = \"http://a/b\"\nkee = 1";
        let problems = read(wrong, &[]).unwrap_err();
        for problem in [
            "compat.grip.routes[0].path: \"x\" is not a path",
            "compat.grip.routes[0]: has no `origin`",
            "compat.grip.routes[1].origin: \"http://a/b\" is not where a server is",
            "compat.grip.routes[1].kee: unknown key",
        ] {
            assert!(problems.contains(problem), "{problems}");
        }
    }

    #[test]
    fn keys_are_not_printed_and_their_placeholder_is_rejected() {
        let loaded = read(ROUTES, &[]).unwrap();
        let shown = loaded.config.to_toml(true, &loaded.sources);
        assert!(!shown.contains("c2VjcmV0") && !format!("{loaded:?}").contains("c2VjcmV0"), "{shown}");
        assert!(shown.contains("\n[[compat.grip.routes]]\npath = \"/\"\n"), "{shown}");
        let problems = read(&shown, &[]).unwrap_err();
        assert!(problems.contains("compat.grip.routes[0].key: is what weir shows instead of the secret"), "{problems}");
    }

    #[test]
    fn a_public_publish_address_requires_keys() {
        let open = format!("{ROUTES}\n[compat.grip]\npublish_listen = \"0.0.0.0:5561\"\nlisten = \"0.0.0.0:7999\"");
        let problems = read(&open, &[]).unwrap_err();
        assert!(problems.contains("compat.grip.publish_listen: 0.0.0.0:5561 can be reached"), "{problems}");
        assert_eq!(problems.lines().count(), 1);
        let keyed = open.replace("prefix = \"api-\"", "key = \"k\"");
        assert!(read(&keyed, &[]).is_ok());
        let twice = ROUTES.replace("/api", "/");
        assert!(read(&twice, &[]).unwrap_err().contains("compat.grip.routes: / has two origins"));
        let bad = ROUTES.replace("c2VjcmV0", "c2Vjcm*");
        assert!(read(&bad, &[]).unwrap_err().contains("the key of / is not valid base64"));
        let clash = format!("{ROUTES}\n[compat.grip]\nlisten = \"127.0.0.1:8000\"");
        assert!(read(&clash, &[]).unwrap_err().contains("compat.grip.listen: 127.0.0.1:8000 is listed twice"));
    }

    #[test]
    fn routes_of_a_disabled_adapter_are_rejected() {
        let problems = read("[[compat.grip.routes]]\norigin = \"http://127.0.0.1:3000\"\n", &[]).unwrap_err();
        assert!(
            problems.contains("compat.grip.routes: are set, but compat.enable does not contain grip"),
            "{problems}"
        );
    }
}
