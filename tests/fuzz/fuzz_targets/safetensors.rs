#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::write_seeds_if_asked("safetensors"), |data: &[u8]| fuzz::safetensors(data));
