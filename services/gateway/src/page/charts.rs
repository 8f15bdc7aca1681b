//! The charts of the page, as SVG. Ink and lines are given their colours by `page.css`, which knows
//! whether it is day or night; only the cells of the heat map bring their own.

use super::look::Adapter;
use super::pulse::Beat;
use maud::PreEscaped;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use proto::Measure;
use std::collections::BTreeMap;
use std::error::Error;

const LETTERS: (&str, u32) = ("sans-serif", 15);
const LOSS_SIZE: (u32, u32) = (640, 220);
/// Seconds without learning that break a line in two.
const GAP_S: f64 = 5.0;
/// Pixels of a cell of the heat map, and around all cells.
const CELL: (i32, i32) = (60, 34);
const MARGIN: (i32, i32) = (112, 24);

/// A picture, or nothing where it cannot be drawn: its figures are told in words as well.
type Svg = PreEscaped<String>;

/// The loss of each lineage over the last minutes of learning.
pub(super) fn loss(beats: &[Beat], now_ms: u64) -> Svg {
    drawn(draw_loss(beats, now_ms))
}

/// What each generation of a lineage scored on each probe, the oldest on the left.
pub(super) fn retention(adapter: &Adapter) -> Svg {
    drawn(draw_retention(adapter))
}

/// The names of the probes that a lineage was measured on.
pub(super) fn probes(adapter: &Adapter) -> Vec<&str> {
    let mut names = Vec::new();
    for retained in adapter.generations.iter().flat_map(|generation| &generation.receipt.probes) {
        if retained.measure.examples > 0 && !names.contains(&retained.probe.as_str()) {
            names.push(retained.probe.as_str());
        }
    }
    names
}

/// What a generation scored on a probe, where it was measured.
pub(super) fn measured<'g>(generation: &'g proto::Generation, probe: &str) -> Option<&'g Measure> {
    let rows = generation.receipt.probes.iter();
    rows.map(|row| (row.probe.as_str(), &row.measure))
        .find(|(name, measure)| *name == probe && measure.examples > 0)
        .map(|(_, measure)| measure)
}

fn drawn(svg: Result<String, Box<dyn Error>>) -> Svg {
    PreEscaped(svg.unwrap_or_else(|error| {
        tracing::warn!(%error, "a chart cannot be drawn");
        String::new()
    }))
}

fn draw_loss(beats: &[Beat], now_ms: u64) -> Result<String, Box<dyn Error>> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for beat in beats {
        let seconds = now_ms.saturating_sub(beat.at_ms) as f64 / -1000.0;
        lines.entry(&beat.lineage).or_default().push((seconds, beat.loss));
    }
    let points = || lines.values().flatten();
    let left = points().map(|(x, _)| *x).fold(-60.0, f64::min);
    let top = points().map(|(_, y)| *y).fold(0.5, f64::max);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, LOSS_SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(24)
            .x_label_area_size(26)
            .y_label_area_size(40)
            .build_cartesian_2d(left..0.0, 0.0..(top * 1.1))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|x| ago(*x))
            .y_label_formatter(&|y| format!("{y:.1}"))
            .label_style(LETTERS)
            .draw()?;
        for (n, points) in lines.values().enumerate() {
            for part in points.chunk_by(|a, b| b.0 - a.0 <= GAP_S) {
                let style = line(n).stroke_width(2);
                chart.draw_series(LineSeries::new(part.iter().copied(), style))?;
                chart.draw_series(part.iter().map(|point| Circle::new(*point, 2, line(n).filled())))?;
            }
        }
        area.present()?;
    }
    Ok(svg)
}

/// The colours of lines, told apart by people who see few colours (Okabe and Ito, 2008; the last but for its shade).
/// `page.css` has them too.
pub(super) const LINES: [RGBColor; 7] = [
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(133, 133, 133),
];

/// The colour of the `n`th line.
pub(super) fn line(n: usize) -> RGBColor {
    LINES[n % LINES.len()]
}

fn ago(seconds: f64) -> String {
    match seconds {
        x if x > -1.0 => "now".to_owned(),
        x if x > -100.0 => format!("{:.0} s", -x),
        x => format!("{:.0} min", x / -60.0),
    }
}

fn text(h: HPos, colour: &RGBColor) -> TextStyle<'_> {
    TextStyle::from(LETTERS.into_font()).pos(Pos::new(h, VPos::Center)).color(colour)
}

fn draw_retention(adapter: &Adapter) -> Result<String, Box<dyn Error>> {
    let probes = probes(adapter);
    let generations: Vec<_> = adapter.generations.iter().rev().collect();
    let width = MARGIN.0 + CELL.0 * generations.len() as i32 + 4;
    let height = MARGIN.1 + CELL.1 * probes.len() as i32 + 4;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        for (i, probe) in probes.iter().enumerate() {
            let middle = MARGIN.1 + CELL.1 * i as i32 + CELL.1 / 2;
            let right = text(HPos::Right, &BLACK);
            area.draw(&Text::new(name(probe), (MARGIN.0 - 10, middle), right))?;
        }
        for (j, generation) in generations.iter().enumerate() {
            let left = MARGIN.0 + CELL.0 * j as i32;
            let centre = text(HPos::Center, &BLACK);
            let number = format!("{}", generation.number);
            area.draw(&Text::new(number, (left + CELL.0 / 2, MARGIN.1 / 2), centre))?;
            for (i, probe) in probes.iter().enumerate() {
                let Some(measure) = measured(generation, probe) else { continue };
                let top = MARGIN.1 + CELL.1 * i as i32;
                let corners = [(left + 1, top + 1), (left + CELL.0 - 1, top + CELL.1 - 1)];
                let cell = cell(measure);
                area.draw(&Rectangle::new(corners, cell.filled()))?;
                let place = (left + CELL.0 / 2, top + CELL.1 / 2);
                let figure = format!("{:.2}", measure.after);
                area.draw(&Text::new(figure, place, text(HPos::Center, &ink_on(cell))))?;
            }
        }
        area.present()?;
    }
    Ok(svg)
}

/// A probe as its owner would call it.
pub(super) fn name(probe: &str) -> &str {
    match probe {
        "memory_text" => "learned text",
        "memory_answers" => "learned answers",
        "rested_text" => "resting text",
        "held_out_text" => "held-out text",
        "held_out_answers" => "held-out answers",
        other => other,
    }
}

/// Teal where a probe is as well known as it ever was, pale where the rise is what the gate lets
/// through, red beyond that.
fn cell(measure: &Measure) -> RGBColor {
    const STOPS: [(f32, [f32; 3]); 3] =
        [(0.0, [15.0, 118.0, 110.0]), (1.0, [240.0, 228.0, 190.0]), (2.0, [185.0, 28.0, 28.0])];
    let rise = (measure.after - measure.best) / measure.rise_allowed.max(1e-6);
    let rise = if rise.is_finite() { rise.clamp(0.0, 2.0) } else { 2.0 };
    let (from, to) = if rise < 1.0 { (STOPS[0], STOPS[1]) } else { (STOPS[1], STOPS[2]) };
    let mixed = |i: usize| (from.1[i] + (to.1[i] - from.1[i]) * (rise - from.0)) as u8;
    RGBColor(mixed(0), mixed(1), mixed(2))
}

/// Near black or near white, never what `page.css` recolours.
fn ink_on(cell: RGBColor) -> RGBColor {
    let light = 0.299 * f32::from(cell.0) + 0.587 * f32::from(cell.1) + 0.114 * f32::from(cell.2);
    if light > 140.0 { RGBColor(17, 24, 28) } else { RGBColor(253, 253, 253) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(at_ms: u64, lineage: &str, loss: f64) -> Beat {
        Beat { at_ms, lineage: lineage.into(), loss, tokens_per_s: 1.0 }
    }

    fn measure(after: f32) -> Measure {
        Measure {
            examples: 8,
            best: 1.0,
            before: 1.0,
            after,
            rise_upper: 0.0,
            rise_allowed: 0.1,
            recited: None,
        }
    }

    #[test]
    fn a_loss_has_a_line_for_each_lineage_broken_where_nothing_was_learned() {
        let beats =
            [beat(1_000, "a", 2.0), beat(2_000, "a", 1.5), beat(60_000, "a", 1.0), beat(2_000, "b", 1.0)];
        let svg = draw_loss(&beats, 61_000).expect("drawn");
        let lines = |n: usize| {
            let RGBColor(r, g, b) = line(n);
            svg.matches(&format!("<polyline fill=\"none\" opacity=\"1\" stroke=\"#{r:02X}{g:02X}{b:02X}\""))
                .count()
        };
        assert_eq!((lines(0), lines(1)), (2, 1), "{svg}");
        assert!(svg.contains("now") && !svg.contains("style="), "{svg}");
        draw_loss(&[], 0).expect("drawn without any");
    }

    #[test]
    fn a_cell_is_teal_pale_or_red_and_its_figure_can_be_read() {
        assert_eq!(cell(&measure(0.5)), cell(&measure(1.0)));
        let [kept, limit, lost] = [0.9, 1.1, 1.3].map(|after| cell(&measure(after)));
        assert_eq!((kept, lost), (RGBColor(15, 118, 110), RGBColor(185, 28, 28)));
        assert!(limit.0 > 230 && ink_on(limit) != ink_on(kept), "{limit:?}");
        assert_eq!(cell(&measure(f32::NAN)), lost);
    }
}
