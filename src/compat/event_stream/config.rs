//! The section `compat.sse`.

use super::path_template::PathTemplate;
use crate::config::{
    AdapterConfig, AdapterContext,
    section::{Table, section},
};

section! {
    /// SSE streams at configured paths, in the format of @fanoutio/eventstream.
    Config {
        /// Routes, written as [[compat.sse.routes]] with `path` and `channels`. A {name} in `path` matches one path
        /// segment; in `channels` it is replaced by that segment, or by the query parameter of this name.
        routes: Vec<SseRoute> as Tables = Vec::new(),
    }
}

section! {
    /// A path and the channels that are streamed at it.
    SseRoute {
        path: String as Path = String::new(),
        channels: Vec<String> as Texts = Vec::new(),
    }
}

impl Table for SseRoute {
    const REQUIRED: &'static [(&'static str, &'static str)] =
        &[("path", "where is it?"), ("channels", "what is streamed there?")];
    const EXAMPLE: &'static str = "{ path = \"/api/events/{id}\", channels = [\"{id}\"] }";
}

impl AdapterConfig for Config {
    fn name(&self) -> &'static str {
        "sse"
    }

    fn enables_itself(&self) -> Option<bool> {
        Some(!self.routes.is_empty())
    }

    /// Invalid paths, paths in use, routes without channels.
    fn contradictions(&self, context: &AdapterContext) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        for (n, route) in self.routes.iter().enumerate() {
            let template = match PathTemplate::parse(&route.path) {
                Ok(template) => template,
                Err(reason) => {
                    found.push(reason);
                    continue;
                }
            };
            let overlaps = |other: &str| PathTemplate::parse(other).is_ok_and(|other| template.overlaps(&other));
            for (path, owner) in context.paths.iter().filter(|(path, _)| overlaps(path)) {
                found.push(format!("{} would take {path}, which is {owner} already", route.path));
            }
            for other in self.routes[..n].iter().filter(|other| overlaps(&other.path)) {
                found.push(format!("{} and {} are both the path of some requests", other.path, route.path));
            }
            if route.channels.is_empty() {
                found.push(format!("{} streams no channels", route.path));
            }
        }
        if found.is_empty() { Vec::new() } else { vec![("compat.sse.routes", found.join("; "))] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compat::read_config as read;

    #[test]
    fn routes_must_not_overlap_other_paths() {
        let routes = |paths: &[&str]| {
            let tables: Vec<_> = paths
                .iter()
                .map(|path| format!("[[compat.sse.routes]]\npath = \"{path}\"\nchannels = [\"{{id}}\", \"all\"]\n"))
                .collect();
            read(&tables.join(""), &[])
        };
        let loaded = routes(&["/api/events/{id}", "/api/rooms/{id}/events"]).unwrap();
        assert_eq!(loaded.config.compat.get::<Config>().routes[1].channels, ["{id}", "all"]);
        let shown = loaded.config.to_toml(false, &std::collections::BTreeMap::new());
        assert_eq!(read(&shown, &[]).unwrap().config, loaded.config);
        for (paths, reason) in [
            (&["/v1/{id}"][..], "compat.sse.routes: /v1/{id} would take /v1/*, which is weir's already"),
            (&["/{id}"], "/{id} would take /metrics, which is weir's already"),
            (&["/"], "/ would take /, which is weir's already"),
            (&["/a/{id}", "/a/b"], "/a/{id} and /a/b are both the path of some requests"),
            (&["/a{id}"], "a token is a whole segment"),
        ] {
            let problems = routes(paths).unwrap_err();
            assert!(problems.contains(reason), "{problems}");
        }
        let routes = vec![SseRoute { path: "/subscribe".into(), channels: Vec::new() }];
        let context = AdapterContext { enabled: true, allow_anonymous: false, paths: vec![("/subscribe", "another")] };
        let [(key, problems)] = &Config { routes }.contradictions(&context)[..] else { panic!() };
        assert_eq!(*key, "compat.sse.routes");
        assert!(problems.contains("/subscribe would take /subscribe, which is another already"), "{problems}");
        assert!(problems.contains("/subscribe streams no channels"), "{problems}");
    }
}
