//! Results: medians over the repeats, ratios to the floor of the same repeat, a table and JSON.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Value, json};

use crate::stamp::{Faults, Histogram};

/// The figures of one server in one slice of a run.
#[derive(Clone, Debug)]
pub struct Measure {
    pub server_name: &'static str,
    /// Names and values; a name includes the unit.
    pub figures: Vec<(&'static str, f64)>,
    /// Operations.
    pub done: u64,
    pub faults: Faults,
}

/// All slices of one scenario.
pub struct Report {
    pub scenario: String,
    /// A description of the scenario.
    pub what: String,
    /// The figure that is compared with that of the floor.
    pub ratio_of: &'static str,
    /// The slices of each repeat.
    pub repeats: Vec<Vec<Measure>>,
}

impl Measure {
    /// The common figures of `done` operations in `wall` ns with `cpu` ns of CPU time of the server.
    pub fn of(
        server_name: &'static str,
        done: u64,
        wall: u64,
        cpu: u64,
        load: u64,
        latency: &Histogram,
        faults: Faults,
    ) -> Self {
        let per = |total: u64| total as f64 / done.max(1) as f64 / 1e3;
        let figures = vec![
            ("per_s", done as f64 * 1e9 / wall.max(1) as f64),
            ("cpu_us", per(cpu)),
            ("p50_us", latency.quantile(0.5) as f64 / 1e3),
            ("p99_us", latency.quantile(0.99) as f64 / 1e3),
            ("p999_us", latency.quantile(0.999) as f64 / 1e3),
            ("max_us", latency.max() as f64 / 1e3),
            ("server_busy_%", cpu as f64 * 100.0 / wall.max(1) as f64),
            ("load_busy_%", load as f64 * 100.0 / wall.max(1) as f64),
        ];
        Measure { server_name, figures, done, faults }
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|(key, _)| *key == name).map(|(_, value)| *value)
    }
}

/// Minimum, median and maximum.
fn spread(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    Some([*values.first()?, values[values.len() / 2], *values.last()?])
}

impl Report {
    pub fn faults(&self) -> Faults {
        let mut all = Faults::default();
        self.slices().for_each(|measure| all.add(measure.faults));
        all
    }

    fn slices(&self) -> impl Iterator<Item = &Measure> {
        self.repeats.iter().flatten()
    }

    /// The servers in the order of their first slices.
    fn servers(&self) -> Vec<&'static str> {
        let mut servers = Vec::new();
        for measure in self.slices() {
            if !servers.contains(&measure.server_name) {
                servers.push(measure.server_name);
            }
        }
        servers
    }

    fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (name, _) in self.slices().flat_map(|measure| &measure.figures) {
            if !names.contains(name) {
                names.push(name);
            }
        }
        names
    }

    fn spread_of(&self, server_name: &str, name: &str) -> Option<[f64; 3]> {
        spread(
            self.slices()
                .filter(|measure| measure.server_name == server_name)
                .filter_map(|measure| measure.get(name))
                .collect(),
        )
    }

    /// The ratios of `server_name` to the floor: for each repeat the mean of its slices divided by that of the floor's
    /// slices.
    fn ratio(&self, server_name: &str) -> Option<[f64; 3]> {
        let mean = |repeat: &[Measure], server_name: &str| {
            let values: Vec<_> = repeat
                .iter()
                .filter(|measure| measure.server_name == server_name)
                .filter_map(|measure| measure.get(self.ratio_of))
                .collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        spread(
            self.repeats
                .iter()
                .filter_map(|repeat| Some(mean(repeat, server_name)? / mean(repeat, "floor")?))
                .collect(),
        )
    }

    pub fn table(&self) -> String {
        let names = self.names();
        let mut rows = vec![vec!["server".to_owned(), "× floor".to_owned()]];
        rows[0].extend(names.iter().map(|name| (*name).to_owned()));
        for server_name in self.servers() {
            let mut row = vec![server_name.to_owned()];
            row.push(self.ratio(server_name).map_or("–".into(), |[least, median, most]| {
                if self.repeats.len() > 1 {
                    format!("{median:.2} ({least:.2}–{most:.2})")
                } else {
                    format!("{median:.2}")
                }
            }));
            row.extend(names.iter().map(|name| match self.spread_of(server_name, name) {
                Some([least, median, most]) if *name == self.ratio_of && self.repeats.len() > 1 => {
                    format!("{} ({}–{})", number(median), number(least), number(most))
                }
                Some([_, median, _]) => number(median),
                None => "–".into(),
            }));
            rows.push(row);
        }
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = format!("\n{} — {}\n", self.scenario, self.what);
        for row in rows {
            for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = if at == 0 { write!(text, "  {cell:<width$}") } else { write!(text, "  {cell:>width$}") };
            }
            text.push('\n');
        }
        let faults = self.faults();
        if faults.any() {
            let _ = writeln!(text, "  FAULTS: {faults:?}");
        } else {
            text.push_str("  nothing lost, duplicated or out of order\n");
        }
        text
    }

    pub fn json(&self) -> Value {
        let servers: BTreeMap<_, _> = self
            .servers()
            .into_iter()
            .map(|server_name| {
                let figures: BTreeMap<_, _> = self
                    .names()
                    .into_iter()
                    .filter_map(|name| {
                        let [least, median, most] = self.spread_of(server_name, name)?;
                        Some((name, json!({"min": least, "median": median, "max": most})))
                    })
                    .collect();
                let ratio = self
                    .ratio(server_name)
                    .map(|[least, median, most]| json!({"min": least, "median": median, "max": most}));
                (server_name, json!({"figures": figures, "ratio_to_floor": ratio}))
            })
            .collect();
        json!({"scenario": self.scenario, "what": self.what, "ratio_of": self.ratio_of, "repeats": self.repeats.len(),
               "servers": servers, "faults": self.faults()})
    }
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => {
            let digits = format!("{value:.0}");
            let mut text = String::new();
            for (at, digit) in digits.chars().enumerate() {
                if at > 0 && (digits.len() - at).is_multiple_of(3) && digit.is_ascii_digit() {
                    text.push(' ');
                }
                text.push(digit);
            }
            text
        }
    }
}
