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
