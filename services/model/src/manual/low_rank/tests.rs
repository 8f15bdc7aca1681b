use half::bf16;
use tch::{Device, Kind};

use super::*;
use crate::cpu::vector::LEVELS;
use crate::golden;

fn numbers(rows: i64, columns: i64, pitch: f64) -> Tensor {
    let numbers = Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)).view([rows, columns]);
    (numbers * pitch).sin()
}

/// Two parts of uneven rank, with a slice between them that has none; nothing is a whole number of tiles.
#[test]
fn it_is_what_the_products_are_one_after_the_other() {
    let (rows, inputs, widths) = (61, 57, [9, 5, 51]);
    let (x, above) = (numbers(rows, inputs, 0.3), numbers(rows, 65, 0.9));
    let (a, b) = (numbers(24, inputs, 0.7), [numbers(9, 7, 1.1), numbers(51, 17, 1.3)]);
    let low = x.matmul(&a.tr());
    let added = [low.narrow(1, 0, 7).matmul(&b[0].tr()), low.narrow(1, 7, 17).matmul(&b[1].tr())];
    let of_low =
        Tensor::cat(&[above.narrow(1, 0, 9).matmul(&b[0]), above.narrow(1, 14, 51).matmul(&b[1])], 1);
    let parts = vec![(0, b[0].shallow_clone()), (2, b[1].shallow_clone())];
    let delta = Delta { a: a.shallow_clone(), ranks: vec![7, 17], parts };
    for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
        let factors = Source::<f32>::of(&delta, &widths).unwrap().read(level);
        let product = Tensor::ones([rows, 65], (Kind::Float, Device::Cpu));
        let found = factors.down(Way::Forward, &x).unwrap();
        factors.up(Way::Forward, &found, &product).unwrap();
        assert!(golden::distance(&(product.narrow(1, 0, 9) - 1), &added[0]) < 1e-4);
        assert!(golden::distance(&(product.narrow(1, 14, 51) - 1), &added[1]) < 1e-4);
        assert!(product.narrow(1, 9, 5).eq(1).all().int64_value(&[]) == 1);

        let of_x = Tensor::ones([rows, inputs], (Kind::Float, Device::Cpu));
        let of_a = [7, 17].map(|ranks| Tensor::zeros([ranks, inputs], (Kind::Float, Device::Cpu)));
        let of_b = [(9, 7, 0.5), (51, 17, 2.0)]
            .map(|(rows, ranks, scale)| (Tensor::zeros([rows, ranks], (Kind::Float, Device::Cpu)), scale));
        let down = factors.down(Way::Backward, &above).unwrap();
        factors.up(Way::Backward, &down, &of_x).unwrap();
        let given = Given { x: &x, low: &found, above: &above, of_low: &down };
        factors.gradient(given, &of_a, &of_b).unwrap();
        assert!(golden::distance(&(of_x - 1), &of_low.matmul(&a)) < 1e-3);
        let expected = of_low.tr().matmul(&x);
        assert!(golden::distance(&of_a[0], &expected.narrow(0, 0, 7)) < 1e-3);
        assert!(golden::distance(&of_a[1], &expected.narrow(0, 7, 17)) < 1e-3);
        for (i, (column, columns, rank, ranks)) in [(0, 9, 0, 7), (14, 51, 7, 17)].into_iter().enumerate() {
            let part = above.narrow(1, column, columns).tr().matmul(&low.narrow(1, rank, ranks));
            let (found, scale) = &of_b[i];
            assert!(golden::distance(found, &(part * f64::from(*scale))) < 1e-3);
        }
    }
}

/// Where the processor multiplies pairs of bf16, what is in f32 elsewhere. Between two parts lies a slice that has none.
#[test]
fn in_bf16_it_is_nearly_the_same() {
    let (rows, inputs, widths) = (61, 58, [10, 6, 52]);
    let half = |of: Tensor| of.to_kind(Kind::BFloat16);
    let wide = |of: &Tensor| of.to_kind(Kind::Float);
    let (x, above) = (half(numbers(rows, inputs, 0.3)), half(numbers(rows, 68, 0.9)));
    let (a, b) = (half(numbers(24, inputs, 0.7)), [(10, 7, 1.1), (52, 17, 1.3)]);
    let b = b.map(|(columns, ranks, pitch)| half(numbers(columns, ranks, pitch)));
    let run = |level| {
        let parts = vec![(0, b[0].shallow_clone()), (2, b[1].shallow_clone())];
        let delta = Delta { a: a.shallow_clone(), ranks: vec![7, 17], parts };
        let factors = Source::<bf16>::of(&delta, &widths).unwrap().read(level);
        assert_eq!(factors.panels(Way::Forward).is_some(), pairs::there(level));
        let product = half(Tensor::zeros([rows, 68], (Kind::Float, Device::Cpu)));
        let low = factors.down(Way::Forward, &x).unwrap();
        factors.up(Way::Forward, &low, &product).unwrap();
        let of_x = half(Tensor::zeros([rows, inputs], (Kind::Float, Device::Cpu)));
        let of_low = factors.down(Way::Backward, &above).unwrap();
        factors.up(Way::Backward, &of_low, &of_x).unwrap();
        let of_a = [7, 17].map(|ranks| Tensor::zeros([ranks, inputs], (Kind::Float, Device::Cpu)));
        let of_b = [(10, 7, 0.5), (52, 17, 2.0)]
            .map(|(rows, ranks, scale)| (Tensor::zeros([rows, ranks], (Kind::Float, Device::Cpu)), scale));
        let given = Given { x: &x, low: &low, above: &above, of_low: &of_low };
        factors.gradient(given, &of_a, &of_b).unwrap();
        let [(first, _), (second, _)] = of_b;
        [wide(&product), wide(&of_x), Tensor::cat(&of_a, 0), first, second]
    };
    let low = wide(&x).matmul(&wide(&a).tr()).split_with_sizes([7, 17], 1);
    let of_parts = wide(&above).split_with_sizes(widths, 1);
    let of_low = Tensor::cat(&[of_parts[0].matmul(&wide(&b[0])), of_parts[2].matmul(&wide(&b[1]))], 1);
    let none = Tensor::zeros([rows, 6], (Kind::Float, Device::Cpu));
    let added = [low[0].matmul(&wide(&b[0]).tr()), none, low[1].matmul(&wide(&b[1]).tr())];
    let expected = [
        Tensor::cat(&added, 1),
        of_low.matmul(&wide(&a)),
        of_low.tr().matmul(&wide(&x)),
        of_parts[0].tr().matmul(&low[0]) * 0.5,
        of_parts[2].tr().matmul(&low[1]) * 2.0,
    ];
    for level in LEVELS.into_iter().filter(|&level| level <= Level::best()) {
        for (i, (found, expected)) in run(level).iter().zip(&expected).enumerate() {
            let size = expected.abs().max().double_value(&[]);
            let off = golden::distance(found, expected) / size;
            assert!(off < 0.02, "{level:?} {i}: {off}");
        }
    }
}

/// A matrix with an odd number of rows or columns has no pairs.
#[test]
fn what_has_no_pairs_is_in_tiles() {
    for (inputs, outputs) in [(57, 52), (58, 51)] {
        let a = numbers(7, inputs, 0.7).to_kind(Kind::BFloat16);
        let parts = vec![(0, numbers(outputs, 7, 1.1).to_kind(Kind::BFloat16))];
        let factors =
            Source::<bf16>::of(&Delta { a, ranks: vec![7], parts }, &[outputs]).unwrap().read(Level::best());
        assert!(factors.panels(Way::Forward).is_none());
        let short = numbers(3, 20, 0.3).to_kind(Kind::BFloat16);
        assert!(factors.down(Way::Forward, &short).is_err() && factors.down(Way::Backward, &short).is_err());
    }
}
