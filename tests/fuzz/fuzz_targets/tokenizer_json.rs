#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::write_seeds_if_asked("tokenizer_json"), |data: &[u8]| fuzz::tokenizer_json(data));
