//! What a text means to the model, as a vector.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use crate::active::ActiveAdapters;
use crate::llama::{Base, Input};

/// The mean of the final hidden states over `tokens`, of length 1: `hidden_size` numbers.
///
/// # Errors
/// When there is no token, or more than the context holds, or the states are not finite.
pub fn embed(base: &Base, adapters: &ActiveAdapters, tokens: &[u32]) -> Result<Vec<f32>> {
    let most = base.config().max_positions;
    ensure!(!tokens.is_empty(), "there is no token to embed");
    ensure!(tokens.len() as i64 <= most, "{} tokens are more than the context holds: {most}", tokens.len());
    let _guard = tch::no_grad_guard();
    let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_slice(&ids).f_view([1, -1])?.f_to_device(base.device())?;
    let hidden = base.forward(&Input::rows(ids, 0), adapters, None)?;
    let mean = hidden.f_to_kind(Kind::Float)?.f_mean_dim(Some(&[0i64][..]), false, Kind::Float)?;
    let vector = mean.f_div(&mean.f_norm()?)?;
    let vector = Vec::<f32>::try_from(&vector)?;
    ensure!(vector.iter().all(|x| x.is_finite()), "the model's states for this text are not finite");
    Ok(vector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn a_vector_has_length_one_and_points_where_the_mean_state_does() {
        let (base, none) = (golden::base("llama"), ActiveAdapters::none());
        let one = embed(&base, &none, &[5, 9, 2]).unwrap();
        assert_eq!(one.len() as i64, base.config().hidden_size);
        assert!((dot(&one, &one) - 1.0).abs() < 1e-5);
        let ids = Tensor::from_slice(&[5i64, 9, 2]).view([1, 3]);
        let states = base.forward(&Input::rows(ids, 0), &none, None).unwrap().to_kind(Kind::Float);
        let sum = Vec::<f32>::try_from(states.sum_dim_intlist(&[0i64][..], false, Kind::Float)).unwrap();
        let cosine = dot(&one, &sum) / dot(&sum, &sum).sqrt();
        assert!((cosine - 1.0).abs() < 1e-5, "{cosine}");
        let other = embed(&base, &none, &[7, 7, 1]).unwrap();
        assert!(dot(&one, &other) < 0.999, "other texts have other vectors");
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let (base, none) = (golden::base("llama"), ActiveAdapters::none());
        assert!(embed(&base, &none, &[]).is_err());
        let long = vec![1; base.config().max_positions as usize + 1];
        assert!(embed(&base, &none, &long).unwrap_err().to_string().contains("context"));
    }
}
