//! # The table
//!
//! **Job.** Medians over rounds, percentiles over all requests, and the ratios that the goals are about.
//! **Who is not trusted.** Single rounds: anything may run beside one. **Why this way.** A ratio is taken within a round, whose
//! turns follow each other within a second; the median of ratios then is not that of whoever had the quiet minute.

use crate::fio::Floor;
use crate::parties::Party;
use tests::plot::Plot;

/// One back end's figures of one turn.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    /// Requests per second.
    pub(crate) rate: f64,
    /// Microseconds of the back end's processor time per request.
    pub(crate) cpu: f64,
    /// Nanoseconds of each request.
    pub(crate) latencies: Vec<u32>,
}

/// One turn of each; ours is the first.
pub(crate) struct Round {
    pub(crate) samples: Vec<Sample>,
    pub(crate) floor: Option<Floor>,
}

/// One load.
pub(crate) struct Row {
    name: String,
    columns: Vec<Column>,
    /// Ours over fio's, and fio's median time.
    floor: Option<(f64, f64)>,
}

struct Column {
    rate: f64,
    cpu: f64,
    calls: Option<f64>,
    /// Microseconds: the median, 99 and 99.9 of a hundred.
    times: [f64; 3],
    /// Ours over this one's.
    ratio: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn percentiles(mut nanoseconds: Vec<u32>) -> [f64; 3] {
    nanoseconds.sort_unstable();
    [0.5, 0.99, 0.999].map(|part| {
        let at = (nanoseconds.len() as f64 * part) as usize;
        nanoseconds
            .get(at)
            .map_or(f64::NAN, |ns| f64::from(*ns) / 1000.0)
    })
}

impl Row {
    pub(crate) fn new(name: String, mut rounds: Vec<Round>, calls: &[Option<f64>]) -> Self {
        let columns = (0..calls.len())
            .map(|n| {
                let over = |f: &dyn Fn(&Round) -> f64| median(rounds.iter().map(f).collect());
                let (rate, cpu) = (over(&|r| r.samples[n].rate), over(&|r| r.samples[n].cpu));
                let ratio = over(&|r| r.samples[0].rate / r.samples[n].rate);
                let all = rounds
                    .iter_mut()
                    .flat_map(|r| std::mem::take(&mut r.samples[n].latencies))
                    .collect();
                Column {
                    rate,
                    cpu,
                    ratio,
                    calls: calls[n],
                    times: percentiles(all),
                }
            })
            .collect();
        let floors: Vec<(f64, f64)> = rounds
            .iter()
            .filter_map(|r| Some((r.samples[0].rate / r.floor?.rate, r.floor?.median)))
            .collect();
        let floor = (!floors.is_empty()).then(|| {
            (
                median(floors.iter().map(|f| f.0).collect()),
                median(floors.iter().map(|f| f.1).collect()),
            )
        });
        Self {
            name,
            columns,
            floor,
        }
    }

    pub(crate) fn print(&self) {
        print!("{:<20}", self.name);
        for (n, column) in self.columns.iter().enumerate() {
            let [p50, p99, p999] = column.times;
            print!(
                " |{:>8.0} {p50:>7.1} {p99:>8.1} {p999:>9.1} {:>6.2}",
                column.rate, column.cpu
            );
            match column.calls {
                Some(calls) => print!(" {calls:>6.2}"),
                None => print!(" {:>6}", "-"),
            }
            if n > 0 {
                print!(" {:>6.2}", column.ratio);
            }
        }
        match self.floor {
            Some((ratio, time)) => println!(" |{ratio:>6.2} {time:>7.1}"),
            None => println!(),
        }
    }
}

pub(crate) fn head(names: &[&str], fio: bool) {
    print!("{:<20}", "");
    for (n, name) in names.iter().enumerate() {
        print!(" |{name:>width$}", width = if n > 0 { 56 } else { 49 });
    }
    println!("{}", if fio { " |fio io_uring" } else { "" });
    print!("{:<20}", "load");
    for n in 0..names.len() {
        print!(
            " |{:>8} {:>7} {:>8} {:>9} {:>6} {:>6}",
            "IOPS", "p50 µs", "p99", "p99.9", "CPU µs", "calls"
        );
        if n > 0 {
            print!(" {:>6}", "ratio");
        }
    }
    println!("{}", if fio { " | ratio  p50 µs" } else { "" });
}

/// The goals: 1.3 times the peer on the page cache and as fast where the disk is the limit, within a tenth of fio.
pub(crate) fn summary(rows: &[Row], parties: &[Party], direct: bool) {
    let told = |what: String, ratios: Vec<f64>, goal: f64| {
        if ratios.is_empty() {
            return;
        }
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let reached = ratios.iter().filter(|r| **r >= goal).count();
        println!(
            "beside {what}: {mean:.2} times in geometric mean, lowest {lowest:.2}, {reached} of {} loads at least {goal} times",
            ratios.len()
        );
    };
    for (n, party) in parties.iter().enumerate().skip(1) {
        let ratios = rows.iter().map(|row| row.columns[n].ratio).collect();
        told(party.name.clone(), ratios, if direct { 1.0 } else { 1.3 });
    }
    let floors = rows.iter().filter_map(|row| Some(row.floor?.0)).collect();
    told("fio on the plain file".into(), floors, 0.9);
}

/// The ratios, as a picture.
pub(crate) fn plot(rows: &[Row], parties: &[Party], title: String) -> Plot {
    let peers = parties
        .iter()
        .skip(1)
        .map(|party| format!("beside {}", party.name));
    Plot {
        title,
        unit: "requests per second, times those of the other".into(),
        parties: peers
            .chain(["beside fio on the plain file".into()])
            .collect(),
        groups: rows
            .iter()
            .map(|row| {
                let ratios = row.columns.iter().skip(1).map(|column| Some(column.ratio));
                let floor = row.floor.map(|(ratio, _)| ratio);
                (row.name.clone(), ratios.chain([floor]).collect())
            })
            .collect(),
        line: Some(1.0),
    }
}
