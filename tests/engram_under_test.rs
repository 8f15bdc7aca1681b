//! The program `engram` with its fail points switched on.
//!
//! `FAILPOINTS` sets them as the crate `fail` says. `ENGRAM_DIE_AT=point` kills the process there
//! as kill -9 does, without unwinding or flushing; once only, for which `ENGRAM_DIE_MARK` names a
//! file, so that the process that is started in its place gets through.

use std::env;
use std::fs::File;
use std::process::{ExitCode, abort};

fn main() -> ExitCode {
    let _faults = fail::FailScenario::setup();
    if let (Ok(point), Some(mark)) = (env::var("ENGRAM_DIE_AT"), env::var_os("ENGRAM_DIE_MARK")) {
        let die_once = move || {
            if File::create_new(&mark).is_ok() {
                abort();
            }
        };
        if let Err(error) = fail::cfg_callback(point, die_once) {
            eprintln!("engram-under-test: {error}");
            return ExitCode::FAILURE;
        }
    }
    supervisor::main()
}
