use super::*;
use tch::{Kind, Tensor};

fn number(i: usize) -> bf16 {
    bf16::from_f32((i as f32 * 0.37).sin())
}

fn rows(count: usize, width: usize) -> Rows<bf16> {
    let numbers: Vec<f32> = (0..count * width).map(|i| number(7 * i + i / width).to_f32()).collect();
    let tensor = Tensor::from_slice(&numbers).view([count as i64, width as i64]).to_kind(Kind::BFloat16);
    Rows::of(&tensor, width as i64).unwrap()
}

fn alike(found: &[f32], expected: &[f32]) -> bool {
    found.len() == expected.len() && found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-4)
}

#[test]
fn rows_go_down_to_few_columns() {
    let (inner, columns) = (70, 23);
    let pairs = Pairs::new(inner, columns, |row, column| number(row * columns + column));
    let rows = rows(TILE, inner);
    let all: Vec<&[bf16]> = (0..TILE).map(|i| rows.get(i)).collect();
    for column in [0, LANES] {
        let expected =
            kernel::plain::tile(std::array::from_fn(|i| all[i]), &pairs.numbers[2 * column..], pairs.width);
        for count in 1..=TILE {
            for (found, expected) in pairs.tile(&all[..count], column).iter().zip(&expected).take(count) {
                assert!(alike(found, expected));
            }
        }
        let beyond = expected[0][columns.saturating_sub(column).min(LANES)..].iter();
        assert!(beyond.clone().all(|x| *x == 0.0), "{column}");
    }
}

/// Two blocks that share a panel, and columns that have none.
#[test]
fn rows_go_up_to_the_columns_of_their_blocks() {
    let blocks = [Block { rows: 0..7, columns: 3..40 }, Block { rows: 8..20, columns: 45..150 }];
    let of = |block: usize, row: usize, column: usize| number(1000 * block + 31 * row + column);
    let panels = Panels::new(&blocks, of);
    let rows = rows(9, 20);
    for (first, count) in [(0, TILE), (6, 3), (8, 1)] {
        for panel in 0..4 {
            let mut found = [[0.5; WIDE]; TILE];
            panels.add(panel, &rows, (first, count), &mut found);
            for (i, found) in found.iter().enumerate().take(count) {
                let mut expected = [0.5; WIDE];
                for (j, block) in blocks.iter().enumerate() {
                    for (column, sum) in expected.iter_mut().enumerate() {
                        let column = panel * WIDE + column;
                        if block.columns.contains(&column) {
                            for row in block.rows.clone() {
                                let number = of(j, row - block.rows.start, column - block.columns.start);
                                *sum += rows.get(first + i)[row].to_f32() * number.to_f32();
                            }
                        }
                    }
                }
                assert!(alike(found, &expected), "{panel} {i}");
            }
        }
    }
}

/// Odd numbers of rows, of more than are taken at a time, and columns that are no whole vectors.
#[test]
fn products_add_up_over_rows() {
    for (count, width, own) in [(131, 90, 3..16), (64, 40, 0..23), (1, 40, 0..1)] {
        let (low, wide) = (rows(count, 24), rows(count, width));
        let upright = Upright::new(&low, own.clone());
        for columns in [0..width, 17..width - 1] {
            let mut sums = vec![0.25; upright.columns() * columns.len()];
            upright.product(&wide, columns.clone(), &mut sums);
            let expected: Vec<f32> = (0..upright.columns())
                .flat_map(|i| columns.clone().map(move |column| (i, column)))
                .map(|(i, column)| {
                    let of =
                        |row: usize| low.get(row)[own.start + i].to_f32() * wide.get(row)[column].to_f32();
                    0.25 + if i < own.len() { (0..count).map(of).sum() } else { 0.0 }
                })
                .collect();
            assert!(alike(&sums, &expected), "{count} {columns:?}");
        }
    }
}

#[test]
fn every_processor_would_say_the_same() {
    let rows = rows(TILE, 20);
    let of_tile = std::array::from_fn(|i| rows.get(i));
    let panel: Vec<bf16> = (0..20 * WIDE).map(number).collect();
    let [mut found, mut expected] = [[[1.0; WIDE]; TILE]; 2];
    kernel::add(of_tile, &panel, &mut found);
    kernel::plain::add(of_tile, &panel, &mut expected);
    assert!(alike(found.as_flattened(), expected.as_flattened()));

    let pairs: Vec<bf16> = (0..6 * 28).map(number).collect();
    let strip = kernel::Strip { numbers: rows.some(0, 5), width: 20 };
    let [mut found, mut expected] = [(); 2].map(|()| vec![1.0; 28 * 17]);
    kernel::gather(&pairs, 28, strip, 2..19, &mut found);
    kernel::plain::gather(&pairs, 28, strip, 2..19, &mut expected);
    assert!(alike(&found, &expected));
}
