//! # A bench's figures as a picture
//!
//! **Job.** Bars: a group for each load, one bar for each party, a line where two are equal; an SVG that a README can show.
//! **Who is not trusted.** Nobody: what is drawn comes from the bench that has just measured it. **Why this way.** Values are ratios
//! to one party's of the same minute, so that loads which differ by orders of magnitude stand in one picture.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// What is drawn.
#[derive(Debug, Default)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Below it: what the values are.
    pub unit: String,
    /// Whose bars there are, or beside whom, by their order in each group.
    pub parties: Vec<String>,
    /// Each load's name and values; `None` where a party has none.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
    /// Where a line is drawn.
    pub line: Option<f64>,
}

type DrawError = Box<dyn std::error::Error>;

const WIDTH: u32 = 900;
const BAR: u32 = 13;
const MARGIN: u32 = 14;
const NAMES: u32 = 240;
const TEXT: (&str, u32) = ("sans-serif", 13);
const SMALL: (&str, u32) = ("sans-serif", 10);
/// Readable on white and on black paper, and by who cannot tell red from green.
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x8c, 0x8c, 0x8c),
    RGBColor(0x2c, 0x9c, 0x6c),
];

impl Plot {
    /// Writes it.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) {
        if let Err(error) = self.draw(file) {
            panic!("{}: {error}", file.display());
        }
    }

    fn draw(&self, file: &Path) -> Result<(), DrawError> {
        let group = BAR * (self.parties.len() as u32 + 1);
        let height = group * self.groups.len() as u32 + 110;
        let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(&self.title, ("sans-serif", 18))?;
        let (legend, root) = root.split_vertically(20);
        self.legend(&legend)?;
        let values = self.groups.iter().flat_map(|(_, values)| values).flatten();
        let most = values.chain(&self.line).copied().fold(0.0, f64::max) * 1.08;
        let mut chart = ChartBuilder::on(&root)
            .margin(MARGIN)
            .x_label_area_size(40)
            .y_label_area_size(NAMES)
            // The first load is on top.
            .build_cartesian_2d(0.0..most, self.groups.len() as f64..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(0)
            .x_desc(self.unit.as_str())
            .label_style(TEXT)
            .light_line_style(TRANSPARENT)
            .draw()?;
        let right = TEXT
            .into_text_style(&root)
            .pos(Pos::new(HPos::Right, VPos::Center));
        let place = 1.0 / (self.parties.len() as f64 + 1.0);
        for (number, (name, values)) in self.groups.iter().enumerate() {
            let top = number as f64 + place / 2.0;
            for (party, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let from = (party as f64).mul_add(place, top);
                let bar = [(0.0, from), (*value, from + place)];
                chart
                    .draw_series([Rectangle::new(bar, COLOURS[party % COLOURS.len()].filled())])?;
                chart.draw_series([EmptyElement::at((*value, from))
                    + Text::new(format!("{value:.2}"), (3, 1), SMALL)])?;
            }
            let beside = EmptyElement::at((0.0, number as f64 + 0.5));
            chart.draw_series([beside + Text::new(name.clone(), (-6, 0), right.clone())])?;
        }
        if let Some(at) = self.line {
            let line = [(at, 0.0), (at, self.groups.len() as f64)];
            chart.draw_series([PathElement::new(line, RED.stroke_width(1))])?;
        }
        root.present()?;
        Ok(())
    }

    fn legend(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), DrawError> {
        let mut x = NAMES as i32 + MARGIN as i32;
        for (party, name) in self.parties.iter().enumerate() {
            let colour = COLOURS[party % COLOURS.len()];
            area.draw(&Rectangle::new([(x, 4), (x + 12, 16)], colour.filled()))?;
            area.draw_text(name, &TEXT.into_text_style(area), (x + 17, 3))?;
            x += 40 + 7 * name.len() as i32;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // in a test, a panic is the report
    use super::*;

    #[test]
    fn a_picture_has_all_names_and_values() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plot.svg");
        let plot = Plot {
            title: "a title".into(),
            unit: "times as many".into(),
            parties: vec!["ours".into(), "theirs".into()],
            groups: vec![
                ("first load".into(), vec![Some(1.25), Some(1.0)]),
                ("second load".into(), vec![Some(2.5), None]),
            ],
            line: Some(1.0),
        };
        plot.write(&file);
        let svg = std::fs::read_to_string(&file).unwrap();
        for text in [
            "a title",
            "times as many",
            "ours",
            "theirs",
            "first load",
            "second load",
            "1.25",
            "2.50",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        // One for each value and each name in the legend, beside paper.
        assert_eq!(svg.matches("<rect").count(), 3 + 2 + 1);
    }
}
