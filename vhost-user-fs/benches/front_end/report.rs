//! # The table
//!
//! **Job.** Medians over rounds, and the ratios that the goals are about.
//! **Who is not trusted.** Single rounds: anything may run beside one. **Why this way.** A ratio is taken within a round, whose
//! turns follow each other within a fraction of a second; the median of ratios then is not that of whoever had the quiet minute.

use crate::daemons::Cache;
use tests::plot::Plot;

/// One daemon's figures of one turn.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sample {
    /// Operations per second.
    pub(crate) rate: f64,
    /// Microseconds of CPU time per operation.
    pub(crate) cpu: f64,
}

/// One turn of each daemon, of the plain loop, and of one that is asked for each read; ours is the first.
pub(crate) struct Round {
    pub(crate) samples: Vec<Sample>,
    pub(crate) floors: [Option<f64>; 2],
}

/// One load.
pub(crate) struct Row {
    name: String,
    ours: Sample,
    peers: Vec<Peer>,
    /// Ours over the loops'.
    floors: [Option<f64>; 2],
}

struct Peer {
    rate: f64,
    cpu: f64,
    rate_ratio: f64,
    cpu_ratio: f64,
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Geometric mean.
pub(crate) fn mean(values: &[f64]) -> f64 {
    (values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp()
}

impl Row {
    pub(crate) fn new(name: String, rounds: &[Round]) -> Self {
        let over = |f: &dyn Fn(&Round) -> f64| median(rounds.iter().map(f).collect());
        let count = rounds.first().map_or(0, |r| r.samples.len());
        let floors = [0, 1].map(|n| {
            let ratios = |r: &Round| Some(r.samples[0].rate / r.floors[n]?);
            let ratios: Vec<f64> = rounds.iter().filter_map(ratios).collect();
            (!ratios.is_empty()).then(|| median(ratios))
        });
        Self {
            name,
            ours: Sample {
                rate: over(&|r| r.samples[0].rate),
                cpu: over(&|r| r.samples[0].cpu),
            },
            peers: (1..count)
                .map(|n| Peer {
                    rate: over(&|r| r.samples[n].rate),
                    cpu: over(&|r| r.samples[n].cpu),
                    rate_ratio: over(&|r| r.samples[0].rate / r.samples[n].rate),
                    cpu_ratio: over(&|r| r.samples[0].cpu / r.samples[n].cpu),
                })
                .collect(),
            floors,
        }
    }

    pub(crate) fn print(&self) {
        print!("{:<22}", self.name);
        print!("{:>9.0} {:>8.2}", self.ours.rate, self.ours.cpu);
        for peer in &self.peers {
            print!("  |{:>9.0} {:>8.2}", peer.rate, peer.cpu);
            print!(" {:>6.2} {:>6.2}", peer.rate_ratio, peer.cpu_ratio);
        }
        let floors = self.floors.iter().flatten();
        println!(
            "  |{}",
            floors.map(|f| format!("{f:>6.2} ")).collect::<String>()
        );
    }
}

pub(crate) fn head(cache: Cache, names: &[&str]) {
    println!("\ncache {cache:?}");
    print!("{:<22}{:>18}", "", names[0]);
    for name in &names[1..] {
        print!("  |{name:>32}");
    }
    println!("  | preadv, asked");
    print!("{:<22}{:>9} {:>8}", "load", "ops/s", "CPU µs");
    for _ in &names[1..] {
        print!(
            "  |{:>9} {:>8} {:>6} {:>6}",
            "ops/s", "CPU µs", "ratio", "CPU"
        );
    }
    println!("  | ratio  ratio");
}

/// The goals: at least 1.2 each, 1.5 in the middle, none below 1, less CPU time.
pub(crate) fn summary(rows: &[Row], names: &[&str]) {
    for (n, name) in names[1..].iter().enumerate() {
        let of = |f: &dyn Fn(&Peer) -> f64| -> Vec<f64> {
            rows.iter().filter_map(|r| r.peers.get(n)).map(f).collect()
        };
        let (rates, cpus) = (of(&|p| p.rate_ratio), of(&|p| p.cpu_ratio));
        if rates.is_empty() {
            continue;
        }
        let lowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = cpus.iter().copied().fold(0.0, f64::max);
        let reach = |limit: f64| rates.iter().filter(|r| **r >= limit).count();
        println!(
            "beside {name}: ops/s {:.2} times in geometric mean, lowest {lowest:.2}, {} of {} loads at least 1.2 times, {} below 1; CPU time {:.2} times, highest {highest:.2}, {} loads below 1",
            mean(&rates),
            reach(1.2),
            rates.len(),
            rates.len() - reach(1.0),
            mean(&cpus),
            cpus.iter().filter(|c| **c < 1.0).count(),
        );
    }
}

/// A picture of the ratios, still without any; `names` are those of all daemons.
pub(crate) fn plot(names: &[&str]) -> Plot {
    let peers = names[1..].iter().map(|name| format!("beside {name}"));
    Plot {
        title: "vhost_user_fs".into(),
        unit: "operations per second, times those of the other".into(),
        parties: peers.chain(["beside plain preadv".into()]).collect(),
        groups: Vec::new(),
        line: Some(1.0),
    }
}

/// Adds the loads of one cache mode.
pub(crate) fn add(plot: &mut Plot, rows: &[Row], cache: Cache, daemons: usize) {
    plot.groups.extend(rows.iter().map(|row| {
        let peers = (0..daemons - 1).map(|n| Some(row.peers.get(n)?.rate_ratio));
        let name = format!("cache {cache:?}: {}", row.name);
        (name, peers.chain([row.floors[0]]).collect())
    }));
}
