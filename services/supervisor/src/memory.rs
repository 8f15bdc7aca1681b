//! Whether what runs will fit into memory, decided before it starts.

use crate::{report, topology, up};
use anyhow::{Context, Result, bail};
use kit::settings::{Products, Settings};
use model::device::Placement;
use model::footprint::{Footprint, narrow_copy_bytes};
use model::hf::ModelConfig;
use model::llama::Base;
use std::path::Path;
use tch::Device;

/// Of the machine's memory, what Engram takes at most unless `limits.memory_mb_max` says otherwise.
const SHARE_OF_MACHINE: f64 = 0.8;

/// Refuses a base that does not fit, as [`settle`] would in the worker, which could only die of it again and again.
///
/// # Errors
/// As for [`settle`], when the base cannot be read, or when it cannot be learned on as asked for.
pub fn check(settings: &Settings, base_dir: &Path) -> Result<()> {
    let config = ModelConfig::load(base_dir)?;
    if settings.train.products == Products::Int8 {
        Base::check_codes(&config, &up::placement(settings)?).context(topology::INT8)?;
    }
    // Where it fits in f32 it fits in any precision, and the device need not be asked for it.
    let f32 = Placement { quantisation: settings.base.quantisation.parse()?, ..Placement::CPU_F32 };
    if settle(&mut settings.clone(), &config, &f32).is_ok() {
        return Ok(());
    }
    settle(&mut settings.clone(), &config, &up::placement(settings)?).map(drop)
}

/// Has learning do without the weights in 8 bits, answers without a copy of them, and learning take smaller micro-batches, until all
/// fits, and tells what it will take, in bytes. On CUDA, whose memory is its own, nothing is settled.
///
/// # Errors
/// When it does not fit in any case.
pub fn settle(
    settings: &mut Settings,
    config: &ModelConfig,
    placement: &Placement,
) -> Result<Option<Footprint>> {
    let limit = match settings.limits.memory_mb_max {
        0 => report::memory().map(|bytes| bytes as f64 * SHARE_OF_MACHINE),
        most => Some(most as f64 * f64::from(1 << 20)),
    };
    let Some(limit) = limit.filter(|_| !matches!(placement.device, Device::Cuda(_))) else { return Ok(None) };
    let lora = topology::training(settings, config)?.lora;
    let cache_bytes = settings.infer.cache_mb_max << 20;
    // Fewer than those of a row would save nothing: a row is the least that is computed.
    let least = settings.train.micro_tokens.min(settings.train.row_tokens);
    loop {
        let micro_tokens = settings.train.micro_tokens;
        let faster = || Base::is_faster_with_codes(config, placement);
        let codes = settings.train.enabled && settings.train.products.are_int8(faster);
        let mut footprint = Footprint::new(config, placement, &lora, cache_bytes, micro_tokens, codes);
        if !settings.train.enabled {
            footprint.learning = 0.0;
        }
        if settings.infer.narrow_copy {
            footprint.answering += narrow_copy_bytes(config, placement);
        }
        if footprint.total() <= limit {
            return Ok(Some(footprint));
        }
        if codes && settings.train.products == Products::Auto {
            settings.train.products = Products::Own;
            continue;
        }
        if settings.infer.narrow_copy {
            settings.infer.narrow_copy = false;
            continue;
        }
        if micro_tokens <= least {
            let mb = |bytes: f64| (bytes / f64::from(1 << 20)).ceil();
            bail!(
                "this takes about {} MiB (the base {}, answers {}, learning {}), and {} are allowed: take a smaller \
                 base, base.quantisation=int8, a lower infer.cache_mb_max, or a higher limits.memory_mb_max",
                mb(footprint.total()),
                mb(footprint.base),
                mb(footprint.answering),
                mb(footprint.learning),
                mb(limit)
            );
        }
        settings.train.micro_tokens = (micro_tokens / 2).max(least);
    }
}

/// What is told of it by `engram doctor`.
///
/// # Errors
/// As for [`settle`].
pub fn told(settings: &Settings, config: &ModelConfig, placement: &Placement) -> Result<String> {
    let mut settled = settings.clone();
    let Some(footprint) = settle(&mut settled, config, placement)? else {
        return Ok("not estimated for this device".to_owned());
    };
    let fewer = if settled.train.micro_tokens < settings.train.micro_tokens {
        format!(", learning {} tokens at once to fit", settled.train.micro_tokens)
    } else {
        String::new()
    };
    Ok(format!("serving and learning will take about {:.1} GB at most{fewer}", footprint.total() / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::pretrain::preset::Preset;

    fn settled(flags: &[&str]) -> Result<(usize, f64)> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut settings = Settings::load(None, &flags)?;
        let config = Preset::find("base-200m")?.model()?;
        let footprint = settle(&mut settings, &config, &Placement::CPU_F32)?;
        Ok((settings.train.micro_tokens, footprint.map_or(0.0, |footprint| footprint.total())))
    }

    #[test]
    fn learning_takes_fewer_tokens_at_once_where_memory_is_short() {
        let wide = settled(&["limits.memory_mb_max=16000"]).expect("settled");
        let tight = settled(&["limits.memory_mb_max=3000"]).expect("settled");
        assert_eq!(wide.0, Settings::load(None, &[]).expect("settings").train.micro_tokens);
        assert!(tight.0 < wide.0 && tight.1 < 3000.0 * f64::from(1 << 20) && tight.1 < wide.1, "{tight:?}");
    }

    #[test]
    fn what_fits_in_no_way_is_refused_with_what_to_do() {
        let refused = settled(&["limits.memory_mb_max=1000"]).expect_err("too little").to_string();
        assert!(
            refused.contains("1000 are allowed") && refused.contains("base.quantisation=int8"),
            "{refused}"
        );
        assert!(
            settled(&["limits.memory_mb_max=1900", "infer.cache_mb_max=64"]).is_ok(),
            "below 2 GB in f32"
        );
        assert!(settled(&["limits.memory_mb_max=1450"]).is_err());
        assert!(settled(&["limits.memory_mb_max=1450", "train.enabled=false"]).is_ok(), "nothing is learned");
    }

    #[test]
    fn short_memory_drops_what_learning_would_only_be_faster_with() {
        let config = Preset::find("base-200m").and_then(|preset| preset.model()).expect("a shape");
        let settled = |products: &str| {
            let flags = ["limits.memory_mb_max=1900", "infer.cache_mb_max=64", products].map(str::to_owned);
            let mut settings = Settings::load(None, &flags).expect("settings");
            settle(&mut settings, &config, &Placement::CPU_F32).map(|_| settings.train.products)
        };
        let dropped = settled("train.products=auto").expect("fits without");
        let expected = if Base::is_faster_with_codes(&config, &Placement::CPU_F32) {
            Products::Own
        } else {
            Products::Auto
        };
        assert_eq!(dropped, expected);
        let kept = settled("train.products=int8").expect("fits with fewer tokens at once");
        assert_eq!(kept, Products::Int8, "what was asked for is not dropped");
        let half = Placement { precision: model::device::Precision::F16, ..Placement::CPU_F32 };
        assert!(Base::check_codes(&config, &half).is_err());
    }
}
