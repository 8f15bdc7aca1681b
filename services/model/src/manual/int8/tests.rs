use super::*;
use crate::cpu::vector::LEVELS;
use crate::golden;
use crate::manual::pairs::Block;

fn numbers(rows: i64, columns: i64, pitch: f64) -> Tensor {
    let numbers = Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)).view([rows, columns]);
    (numbers * pitch).sin()
}

fn codes(weight: &Tensor) -> Codes {
    Codes::new::<f32>(weight, Kernel::of(Level::best())).unwrap()
}

/// Each block of a row to the nearest of its own 255 steps.
fn in_blocks(x: &Tensor) -> Tensor {
    let width = x.size()[1];
    let blocks: Vec<Tensor> = (0..width)
        .step_by(BLOCK)
        .map(|start| rounded(&x.narrow(1, start, (width - start).min(BLOCK as i64))))
        .collect();
    Tensor::cat(&blocks, 1)
}

/// Each row to the nearest of its own 255 steps.
fn rounded(x: &Tensor) -> Tensor {
    let step = (x.abs().amax([-1i64], true) / 127.0).clamp_min(1e-30);
    (x / &step).round() * step
}

/// Nothing here is a whole number of tiles, panels or groups, but for one.
const SHAPES: [(i64, i64, i64); 6] =
    [(13, 61, 70), (6, 64, 128), (1, 3, 1), (200, 130, 65), (900, 20, 9), (8, 1100, 2051)];

/// The mean difference: of thousands of numbers some lie half-way between two codes.
fn off(found: &Tensor, expected: &Tensor) -> f64 {
    (found - expected).abs().mean(Kind::Double).double_value(&[])
}

#[test]
fn products_are_those_of_what_was_rounded() {
    for (rows, inputs, outputs) in SHAPES {
        let (x, weight) = (numbers(rows, inputs, 0.37), numbers(outputs, inputs, 0.71));
        let (more, above) = (numbers(rows, outputs, 0.11), numbers(rows, outputs, 0.53));
        let codes = codes(&weight);
        let narrow = rounded(&weight);
        let expected = in_blocks(&x).matmul(&narrow.tr());
        let found = codes.product::<f32>(Way::Forward, &x, Rounding::Nearest, More::default()).unwrap();
        let name = format!("{rows} {inputs} {outputs}: {}", off(&found, &expected));
        assert!(
            off(&found, &expected) < 1e-3 && golden::distance(&found, &x.matmul(&weight.tr())) < 0.3,
            "{name}"
        );
        let with_more = codes.product(Way::Forward, &x, Rounding::Nearest, added(&more)).unwrap();
        assert!(golden::distance(&with_more, &(&found + &more)) < 1e-5);
        let low = numbers(rows, 6, 0.23).to_kind(Kind::BFloat16);
        let up = numbers(6, outputs, 0.19).to_kind(Kind::BFloat16);
        let both = |row: i64, column: i64| bf16::from_f64(up.double_value(&[row, column]));
        let block = Block { rows: 0..6, columns: 0..outputs as usize };
        let panels = Panels::new(&[block], |_, row, column| both(row as i64, column as i64));
        let mut with_low = added(&more);
        with_low.low = vec![(&panels, Rows::of(&low, 6).unwrap())];
        let with_low = codes.product(Way::Forward, &x, Rounding::Nearest, with_low).unwrap();
        let of_low = low.to_kind(Kind::Float).matmul(&up.to_kind(Kind::Float));
        assert!(golden::distance(&with_low, &(&with_more + of_low)) < 1e-4);
        // The steps of the weights are in the gradient before it is rounded.
        let step = (weight.abs().amax([-1i64], false) / 127.0).clamp_min(1e-30);
        let expected = in_blocks(&(&above * &step)).matmul(&(narrow / step.unsqueeze(1)));
        let found = codes.product::<f32>(Way::Backward, &above, Rounding::Nearest, More::default()).unwrap();
        let name = format!("{rows} {inputs} {outputs}: {}", off(&found, &expected));
        assert!(
            off(&found, &expected) < 1e-3 && golden::distance(&found, &above.matmul(&weight)) < 0.3,
            "{name}"
        );
    }
}

#[test]
fn every_processor_would_say_the_same() {
    for level in LEVELS.into_iter().filter(|level| (Level::Avx2..=Level::best()).contains(level)) {
        for shape in SHAPES {
            says_the_same(Kernel::of(level), shape);
        }
    }
}

fn says_the_same(kernel: Kernel, (rows, inputs, outputs): (i64, i64, i64)) {
    let plain = kernel.to_check_by();
    let (x, weight) = (numbers(rows, inputs, 0.37), numbers(outputs, inputs, 0.71));
    let x = Narrow::new(&Rows::<f32>::of(&x, inputs).unwrap(), None, Rounding::Nearest, BLOCK);
    let codes = Codes::new::<f32>(&weight, kernel).unwrap();
    let given: Vec<f32> = (0..x.width.next_multiple_of(LANES))
        .map(|i| if i < inputs as usize { (i as f32 * 0.7).sin() } else { 0.0 })
        .collect();
    let [mut found, mut expected] = [vec![0i8; x.width], vec![0i8; x.width]];
    for rounding in [Rounding::Nearest, Rounding::OnAverage] {
        let blocks =
            [kernel.round(&given, rounding, &mut found), plain.round(&given, rounding, &mut expected)];
        assert_eq!((blocks[0], &found), (blocks[1], &expected));
    }

    let panel = &codes.panels[..x.width / GROUP];
    let factors = std::array::from_fn(|i| 1.0 + i as f32 / 7.0);
    for count in 1..=TILE.min(rows as usize) {
        let mut tiles = [[[0f32; WIDE]; TILE]; 2];
        let [found, expected] = &mut tiles;
        kernel.tile(&x, 0..count, panel, &factors, found);
        plain.tile(&x, 0..count, panel, &factors, expected);
        assert_eq!(found, expected);
    }

    let groups = x.width / GROUP;
    for first in (0..groups).step_by(WIDE / GROUP) {
        let mut panels =
            [(); 2].map(|()| vec![Line::NOTHING; (outputs as usize).div_ceil(WIDE) * (WIDE / GROUP)]);
        let [found, expected] = &mut panels;
        kernel.turn(&codes.panels, groups, first, found);
        plain.turn(&codes.panels, groups, first, expected);
        assert_eq!(found, expected);
    }
}

#[test]
fn what_is_no_number_is_not_lost() {
    let codes = codes(&numbers(70, 40, 0.71));
    for bad in [f64::NAN, f64::INFINITY] {
        let x = numbers(7, 40, 0.37);
        let _ = x.get(3).get(11).fill_(bad);
        let product = codes.product::<f32>(Way::Forward, &x, Rounding::Nearest, More::default()).unwrap();
        let finite = |row: i64| product.get(row).isfinite().all().int64_value(&[]) == 1;
        assert!(finite(2) && finite(4));
        assert_eq!(product.get(3).isfinite().any().int64_value(&[]), 0);
    }
    let zero = codes
        .product::<f32>(
            Way::Forward,
            &Tensor::zeros([2, 40], (Kind::Float, Device::Cpu)),
            Rounding::Nearest,
            More::default(),
        )
        .unwrap();
    assert_eq!(f64::try_from(zero.abs().max()).unwrap(), 0.0);
}

#[test]
fn no_thread_waits_for_work_and_no_task_is_small() {
    tch::set_num_threads(2);
    // Rows, and panels of columns.
    for (rows, panels, expected) in
        [(270, 44, 270), (270, 8, 270), (270, 2, 72), (2000, 44, 336), (30, 1, 30), (0, 8, 6)]
    {
        assert_eq!(rows_of_task(rows, panels), expected, "{rows}, {panels}");
    }
}

#[test]
fn what_is_far_below_a_step_is_right_on_average() {
    // Every row has one large number, beside which the 511 others are a tenth of a step or less.
    let x = (numbers(256, 512, 0.37).abs() * 0.0008).slice_scatter(
        &Tensor::ones([256, 1], (Kind::Float, Device::Cpu)),
        1,
        0,
        1,
        1,
    );
    let weight = Tensor::ones([3, 512], (Kind::Float, Device::Cpu));
    let codes = codes(&weight);
    let small = |rounding| {
        let product = codes.product::<f32>(Way::Forward, &x, rounding, More::default()).unwrap();
        (product - 1.0).mean(Kind::Double).double_value(&[])
    };
    let expected = x.narrow(1, 1, 511).sum(Kind::Double).double_value(&[]) / 256.0;
    assert!(small(Rounding::Nearest).abs() < 1e-3 * expected);
    assert!(
        (small(Rounding::OnAverage) / expected - 1.0).abs() < 0.03,
        "{}",
        small(Rounding::OnAverage) / expected
    );
}

/// Rows added to a product.
fn added(more: &Tensor) -> More<'static, f32> {
    More { rows: Some(Rows::of(more, more.size()[1]).unwrap()), low: Vec::new() }
}
