//! Engram as its users meet it: the real program, started as a process, spoken to over HTTP and on
//! its command line, and killed.
//!
//! [`harness`] starts and kills; [`tiny`] makes a base that starts at once and knows nothing. What
//! takes minutes longer is behind `ENGRAM_TEST_LONG=1`.

mod adapters;
mod bad_input;
mod bench;
mod cli;
mod configs;
mod distill;
mod documents;
mod doors;
mod files;
mod forget;
mod formats;
mod guides;
mod harness;
mod hub;
mod learning;
mod overload;
mod restart;
mod retention;
mod speed;
mod tidy;
mod tiny;
mod watch;
