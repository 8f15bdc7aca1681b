#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::write_seeds_if_asked("config_json"), |data: &[u8]| fuzz::config_json(data));
