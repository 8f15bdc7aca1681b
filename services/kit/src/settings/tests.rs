use super::*;

fn load(toml: &str, flags: &[&str]) -> anyhow::Result<Settings> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), toml).expect("written");
    Settings::load(Some(file.path()), &flags.iter().map(ToString::to_string).collect::<Vec<_>>())
}

#[test]
fn the_compiled_in_defaults_are_valid() {
    let settings = Settings::load(None, &[]).expect("defaults");
    assert_eq!(settings.replay.capacity, 10_000);
    assert_eq!(settings.gateway.listen, "127.0.0.1:8420");
}

#[test]
fn flags_win_over_the_file() {
    let settings =
        load("[replay]\ncapacity = 5\nstrategy = 'reservoir'", &["replay.capacity=7"]).expect("settings");
    assert_eq!((settings.replay.capacity, settings.replay.strategy), (7, Strategy::Reservoir));
    let settings =
        load("", &["filter.languages=eng,fra", "train.enabled=false", "train.rate=1e-3"]).expect("settings");
    assert_eq!(settings.filter.languages, ["eng", "fra"]);
    assert!(!settings.train.enabled);
    assert_eq!(settings.train.rate, 1e-3);
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    for (toml, flags) in [("[replay]\ncapasity = 5", &[][..]), ("", &["replay.capasity=5"][..])] {
        let message = format!("{:#}", load(toml, flags).expect_err("unknown"));
        assert!(message.contains("did you mean replay.capacity"), "{message}");
    }
}

#[test]
fn a_value_out_of_range_or_of_another_type_is_refused_by_name() {
    for (flag, name) in [
        ("replay.new_data_ratio=0", "replay.new_data_ratio"),
        ("train.clip=NaN", "train.clip"),
        ("train.rank=many", "train.rank"),
        ("train.ewc_lambda=100", "train.ewc_lambda"),
        ("base.threads=1000000", "base.threads"),
        (
            "replay.strategy=fifo",
            "replay.strategy is \"fifo\"; it takes reservoir, importance, diversity or hybrid",
        ),
        ("base.device=tpu", "base.device is \"tpu\"; it takes auto, cpu, cuda or mps"),
        ("telemetry.level=loud", "telemetry.level is \"loud\"; it takes error,"),
        ("telemetry.level=a=b=c", "telemetry.level"),
        ("gateway.api_keys=short", "gateway.api_keys"),
    ] {
        let message = format!("{:#}", load("", &[flag]).expect_err(flag));
        assert!(message.contains(name), "{flag}: {message}");
    }
}

#[test]
fn every_word_that_is_named_is_taken() {
    for (key, words) in limits::WORDS {
        for word in words {
            load("", &[&format!("{key}={word}")]).expect(word);
        }
    }
    for level in ["error", "off", "INFO", "info,train=debug", "train=trace"] {
        load("", &[&format!("telemetry.level={level}")]).expect(level);
    }
}

#[test]
fn a_file_that_is_not_there_or_not_toml_is_named() {
    let message =
        format!("{:#}", Settings::load(Some(Path::new("/no/such.toml")), &[]).expect_err("missing"));
    assert!(message.contains("/no/such.toml"), "{message}");
    assert!(load("[replay", &[]).is_err());
}

#[test]
fn the_rate_follows_the_width_unless_it_is_set() {
    let settings = Settings::load(None, &[]).expect("defaults");
    assert!((settings.rate(2000) - 1e-3).abs() < 1e-9);
    assert!((settings.rate(256) - 5e-3).abs() < 1e-4);
}
