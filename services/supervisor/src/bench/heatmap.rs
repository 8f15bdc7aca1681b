//! A matrix of scores as an SVG heat map.

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::fs;
use std::path::Path;

/// Pixels of a cell, and around all cells.
const CELL: (i32, i32) = (72, 34);
const MARGIN: (i32, i32) = (170, 130);
const LETTERS: (&str, u32) = ("sans-serif", 13);

/// Draws mean scores, by row the task learned last and by column the task measured. What is better is darker, between
/// the lowest and the highest of each column, since tasks differ in difficulty.
///
/// # Errors
/// When the file cannot be written.
pub fn write(
    names: &[String],
    rows: &[(String, Vec<Option<f64>>)],
    higher_is_better: bool,
    path: &Path,
) -> Result<()> {
    let svg =
        draw(names, rows, higher_is_better).map_err(|error| anyhow!("cannot draw the heat map: {error}"))?;
    fs::write(path, svg).with_context(|| format!("{}: cannot write", path.display()))
}

fn draw(
    names: &[String],
    rows: &[(String, Vec<Option<f64>>)],
    higher_is_better: bool,
) -> Result<String, Box<dyn std::error::Error>> {
    let width = MARGIN.0 + CELL.0 * names.len() as i32 + 16;
    let height = MARGIN.1 + CELL.1 * rows.len() as i32 + 16;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let text =
            |pos: Pos, colour: &'static RGBColor| TextStyle::from(LETTERS.into_font()).pos(pos).color(colour);
        let middle = Pos::new(HPos::Center, VPos::Center);
        let upright = TextStyle::from(LETTERS.into_font().transform(FontTransform::Rotate270))
            .pos(Pos::new(HPos::Left, VPos::Center));
        for (j, name) in names.iter().enumerate() {
            let x = MARGIN.0 + CELL.0 * j as i32 + CELL.0 / 2;
            area.draw(&Text::new(name.clone(), (x, MARGIN.1 - 8), upright.clone()))?;
        }
        for (i, (name, scores)) in rows.iter().enumerate() {
            let top = MARGIN.1 + CELL.1 * i as i32;
            let right = text(Pos::new(HPos::Right, VPos::Center), &BLACK);
            area.draw(&Text::new(name.clone(), (MARGIN.0 - 8, top + CELL.1 / 2), right))?;
            for (j, score) in scores.iter().enumerate() {
                let Some(score) = score else { continue };
                let share = share(rows, j, *score, higher_is_better);
                let left = MARGIN.0 + CELL.0 * j as i32;
                let corners = [(left + 1, top + 1), (left + CELL.0 - 1, top + CELL.1 - 1)];
                area.draw(&Rectangle::new(corners, colour(share).filled()))?;
                let ink = if share > 0.55 { &WHITE } else { &BLACK };
                let place = (left + CELL.0 / 2, top + CELL.1 / 2);
                area.draw(&Text::new(format!("{score:.3}"), place, text(middle, ink)))?;
            }
        }
        area.present()?;
    }
    Ok(svg)
}

/// Where a score stands between the worst and the best of its column, 0 to 1.
fn share(rows: &[(String, Vec<Option<f64>>)], column: usize, score: f64, higher_is_better: bool) -> f64 {
    let all = || rows.iter().filter_map(|(_, scores)| scores.get(column).copied().flatten());
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    if high - low < 1e-9 {
        return 1.0;
    }
    let share = (score - low) / (high - low);
    if higher_is_better { share } else { 1.0 - share }
}

/// From near white to dark blue, evenly in lightness, so that it reads in grey too.
fn colour(share: f64) -> RGBColor {
    let between = |from: f64, to: f64| (from + (to - from) * share.clamp(0.0, 1.0)) as u8;
    RGBColor(between(240.0, 8.0), between(245.0, 69.0), between(250.0, 148.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_score_is_in_the_picture_and_the_best_is_darkest() {
        let names = vec!["one".to_owned(), "two".to_owned()];
        let rows = vec![
            ("base".to_owned(), vec![Some(0.1), Some(0.2)]),
            ("after one".to_owned(), vec![Some(0.9), None]),
            ("after two".to_owned(), vec![Some(0.8), Some(0.7)]),
        ];
        let svg = draw(&names, &rows, true).expect("drawn");
        for score in ["0.100", "0.200", "0.900", "0.800", "0.700", "after two"] {
            assert!(svg.contains(score), "{score}");
        }
        assert_eq!((share(&rows, 0, 0.9, true), share(&rows, 0, 0.1, true)), (1.0, 0.0));
        assert_eq!(share(&rows, 0, 0.1, false), 1.0);
    }
}
