//! What something takes as something else grows, and how fast that is.

use anyhow::Result;
use model::pretrain::curve;
use serde_json::{Value, json};
use std::path::Path;

/// What was measured.
#[derive(Debug)]
pub struct Curve {
    /// Its name, which its drawing has too.
    pub name: &'static str,
    /// What grows, with its unit.
    pub grows: &'static str,
    /// What it takes, with its unit.
    pub takes: &'static str,
    /// The exponent beyond which it would grow faster than it should.
    pub expected: f64,
    /// What it took at each size, from the smallest.
    pub points: Vec<(f64, f64)>,
}

impl Curve {
    /// The exponent e of the power law c · x^e that is nearest to the points, by least squares of the logarithms; none
    /// where fewer than two sizes took some time.
    pub fn exponent(&self) -> Option<f64> {
        exponent(&self.points)
    }

    /// All of it in figures.
    pub fn json(&self) -> Value {
        let (first, last) = (self.points.first(), self.points.last());
        // Most sizes are counts.
        let size = |&(x, _): &(f64, f64)| if x.fract() == 0.0 { json!(x as u64) } else { json!(x) };
        json!({
            "curve": self.name,
            "grows": self.grows,
            "takes": self.takes,
            "from": first.map(size),
            "to": last.map(size),
            "took_first": first.map(|(_, y)| y),
            "took_last": last.map(|(_, y)| y),
            "exponent": self.exponent(),
            "expected": self.expected,
            "points": self.points,
        })
    }

    /// Draws it into a folder, beside what would be expected from its first point on.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn draw(&self, folder: &Path) -> Result<()> {
        let mut lines = vec![("measured".to_owned(), self.points.clone())];
        if let Some(&first) = self.points.first() {
            let expected = self.points.iter().map(|&(x, _)| (x, first.1 * (x / first.0).powf(self.expected)));
            lines.push((format!("expected at most: exponent {}", self.expected), expected.collect()));
        }
        curve::lines(self.grows, self.takes, &lines, &folder.join(format!("{}.svg", self.name)))
    }
}

fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logarithms: Vec<(f64, f64)> =
        points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logarithms.len() as f64;
    let (mean_x, mean_y) = (
        logarithms.iter().map(|(x, _)| x).sum::<f64>() / count,
        logarithms.iter().map(|(_, y)| y).sum::<f64>() / count,
    );
    let spread: f64 = logarithms.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    let common: f64 = logarithms.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    (spread > 0.0).then(|| common / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: Vec<(f64, f64)>) -> Curve {
        Curve { name: "some", grows: "documents", takes: "ms for one", expected: 1.0, points }
    }

    #[test]
    fn the_exponent_of_a_power_law_is_found() {
        for wanted in [0.0, 0.5, 1.0, 2.0] {
            let points = [1.0_f64, 3.0, 10.0, 100.0].map(|x| (x, 7.0 * x.powf(wanted)));
            let found = exponent(&points).expect("found");
            assert!((found - wanted).abs() < 1e-9, "{found} for {wanted}");
        }
        // Twice as much at one size is neither here nor there.
        let noisy = exponent(&[(1.0, 1.0), (10.0, 20.0), (100.0, 100.0)]).expect("found");
        assert!((noisy - 1.0).abs() < 1e-9, "{noisy}");
    }

    #[test]
    fn there_is_no_exponent_of_one_size_or_of_no_time() {
        assert_eq!(exponent(&[]), None);
        assert_eq!(exponent(&[(5.0, 2.0), (5.0, 3.0)]), None);
        assert_eq!(exponent(&[(1.0, 0.0), (2.0, 3.0)]), None);
        assert_eq!(exponent(&[(0.0, 1.0), (2.0, 3.0)]), None);
    }

    #[test]
    fn a_curve_is_drawn_beside_what_is_expected_and_told_in_figures() {
        let folder = tempfile::tempdir().expect("a folder");
        let curve = curve(vec![(10.0, 2.0), (20.0, 8.0)]);
        curve.draw(folder.path()).expect("drawn");
        let svg = std::fs::read_to_string(folder.path().join("some.svg")).expect("there");
        for text in ["documents", "ms for one", "measured", "expected at most: exponent 1"] {
            assert!(svg.contains(text), "{text}");
        }
        let json = curve.json();
        assert_eq!((json["from"].as_f64(), json["took_last"].as_f64()), (Some(10.0), Some(8.0)));
        assert!((json["exponent"].as_f64().expect("found") - 2.0).abs() < 1e-9);
    }
}
