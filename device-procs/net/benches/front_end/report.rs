//! # The table
//!
//! **Job.** Medians and quartiles over rounds, and the ratios that the goal is about.
//! **Who is not trusted.** Single rounds: anything may run beside one. **Why this way.** A ratio is taken within a round, whose
//! turns follow each other within a second; the median of ratios then is not that of whoever had the quiet minute.

use crate::loads::Load;
use tests::plot::Plot;

/// One party's figures of one turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) packets: f64,
    /// Packets per second.
    pub(crate) rate: f64,
    /// Nanoseconds of the party's processor time per packet.
    pub(crate) cpu: f64,
}

/// The first quartile, the median, the third.
#[derive(Debug, Clone, Copy)]
struct Spread([f64; 3]);

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        Some(Self(
            [1, 2, 3].map(|quarter| values[(last * quarter + 2) / 4]),
        ))
    }

    fn median(&self) -> f64 {
        self.0[1]
    }
}

struct Column {
    rate: Spread,
    cpu: Spread,
    calls: Option<f64>,
    /// Ours over this one's.
    ratio: Spread,
}

/// One load.
pub(crate) struct Row {
    name: String,
    bytes: f64,
    columns: Vec<Option<Column>>,
}

impl Row {
    pub(crate) fn new(
        load: &Load,
        rounds: &[Vec<Option<Sample>>],
        calls: Vec<Option<f64>>,
    ) -> Self {
        let columns = calls.into_iter().enumerate().map(|(n, calls)| {
            let over = |f: &dyn Fn(&Sample, &Sample) -> f64| {
                let rounds = rounds.iter();
                Spread::of(
                    rounds
                        .filter_map(|r| Some(f(r[0].as_ref()?, r[n].as_ref()?)))
                        .collect(),
                )
            };
            Some(Column {
                rate: over(&|_, one| one.rate)?,
                cpu: over(&|_, one| one.cpu)?,
                ratio: over(&|ours, one| ours.rate / one.rate)?,
                calls,
            })
        });
        Self {
            name: load.name(),
            bytes: load.size as f64,
            columns: columns.collect(),
        }
    }

    pub(crate) fn print(&self) {
        print!("{:<18}", self.name);
        for (n, column) in self.columns.iter().enumerate() {
            let Some(column) = column else {
                print!(" |{:>9}", "-");
                continue;
            };
            let [low, rate, high] = column.rate.0.map(|rate| rate / 1e3);
            let gigabits = column.rate.median() * self.bytes * 8.0 / 1e9;
            print!(
                " |{rate:>9.1} {low:>8.1}-{high:<8.1} {gigabits:>6.2} {:>7.0}",
                column.cpu.median()
            );
            match column.calls {
                Some(calls) => print!(" {calls:>5.2}"),
                None => print!(" {:>5}", "-"),
            }
            if n > 0 {
                let [low, ratio, high] = column.ratio.0;
                print!(" {ratio:>6.2} {low:>5.2}-{high:<5.2}");
            }
        }
        println!();
    }
}

pub(crate) fn head(names: &[String]) {
    print!("{:<18}", "");
    for (n, name) in names.iter().enumerate() {
        print!(" |{name:>width$}", width = if n > 0 { 67 } else { 48 });
    }
    println!();
    print!("{:<18}", "load");
    for n in 0..names.len() {
        print!(
            " |{:>9} {:>17} {:>6} {:>7} {:>5}",
            "kpackets/s", "quartiles", "Gbit/s", "CPU ns", "calls"
        );
        if n > 0 {
            print!(" {:>6} {:>11}", "ratio", "quartiles");
        }
    }
    println!();
}

/// The goal: within a tenth of the floor. `names` are those of all parties.
pub(crate) fn summary(rows: &[Row], names: &[String]) {
    for (party, name) in names.iter().enumerate().skip(1) {
        let ratios: Vec<f64> = rows
            .iter()
            .filter_map(|row| Some(row.columns.get(party)?.as_ref()?.ratio.median()))
            .collect();
        if ratios.is_empty() {
            continue;
        }
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let reached = ratios.iter().filter(|r| **r >= 0.9).count();
        println!(
            "beside {name}: {mean:.2} times in geometric mean, lowest {lowest:.2}, {reached} of {} loads at least 0.9 times",
            ratios.len()
        );
    }
}

/// The ratios, as a picture; `names` are those of all parties.
pub(crate) fn plot(rows: &[Row], names: &[String]) -> Plot {
    Plot {
        title: "net".into(),
        unit: "packets per second, times those of the other".into(),
        parties: names
            .iter()
            .skip(1)
            .map(|name| format!("beside {name}"))
            .collect(),
        groups: rows
            .iter()
            .map(|row| {
                let others = row.columns.iter().skip(1);
                let ratios = others.map(|column| Some(column.as_ref()?.ratio.median()));
                (row.name.clone(), ratios.collect())
            })
            .collect(),
        line: Some(1.0),
    }
}
