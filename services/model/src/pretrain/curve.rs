//! Curves as SVG, that of a run's loss among them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use super::state::Point;

const SIZE: (u32, u32) = (900, 480);

const LETTERS: (&str, u32) = ("sans-serif", 15);

/// Told apart by people who see few colours (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// Draws the NLL of training and of each held-out text over the tokens learned.
///
/// # Errors
/// When the file cannot be written.
pub fn write(curve: &[Point], path: &Path) -> Result<()> {
    write_svg(path, &draw(curve)?)
}

fn write_svg(path: &Path, svg: &str) -> Result<()> {
    fs::write(path, svg).with_context(|| format!("{}: cannot write", path.display()))
}

/// A line's name and its points, from left to right.
pub type Line = (String, Vec<(f64, f64)>);

/// Draws lines over a common axis that begins at 0.
///
/// # Errors
/// When the file cannot be written.
pub fn lines(x: &str, y: &str, lines: &[Line], path: &Path) -> Result<()> {
    write_svg(path, &drawn(x, y, lines)?)
}

fn draw(curve: &[Point]) -> Result<String> {
    let mut lines = vec![("training".to_string(), series(curve, |point| Some(point.training)))];
    let names = curve.last().map(|point| point.held_out.keys().cloned().collect()).unwrap_or_default();
    let names: Vec<String> = names;
    for name in names {
        let line = series(curve, |point| point.held_out.get(&name).copied());
        lines.push((name, line));
    }
    drawn("million tokens learned", "nats a token", &lines)
}

fn drawn(x: &str, y: &str, lines: &[Line]) -> Result<String> {
    draw_lines(x, y, lines).map_err(|error| anyhow!("cannot draw the curve: {error}"))
}

fn draw_lines<'a>(x: &str, y: &str, lines: &'a [Line]) -> Result<String, Box<dyn std::error::Error + 'a>> {
    let all = || lines.iter().flat_map(|(_, line)| line);
    let right = all().map(|(x, _)| *x).fold(1e-3, f64::max);
    let top = all().map(|(_, y)| *y).fold(0.1, f64::max);
    let bottom = all().map(|(_, y)| *y).fold(top, f64::min);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..right, (bottom * 0.95)..(top * 1.02))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(x)
            .y_desc(y)
            .label_style(LETTERS)
            .axis_desc_style(LETTERS)
            .draw()?;
        for (i, (name, line)) in lines.iter().enumerate() {
            let style = COLOURS[i % COLOURS.len()].stroke_width(2);
            chart
                .draw_series(LineSeries::new(line.iter().copied(), style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

fn series(curve: &[Point], value: impl Fn(&Point) -> Option<f64>) -> Vec<(f64, f64)> {
    let pairs = curve.iter().filter_map(|point| Some((point.tokens as f64 / 1e6, value(point)?)));
    pairs.filter(|(_, y)| y.is_finite()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_curve_names_its_lines_and_axes_even_before_the_first_point() {
        let point = |tokens, training, held_out: f64| Point {
            tokens,
            training,
            held_out: BTreeMap::from([("fiction_en".to_string(), held_out)]),
        };
        let svg = draw(&[point(1_000_000, 5.0, 5.2), point(2_000_000, 4.0, f64::NAN)]).unwrap();
        for text in ["<svg", "training", "fiction_en", "million tokens learned", "nats a token"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(draw(&[]).unwrap().contains("<svg"));
    }
}
