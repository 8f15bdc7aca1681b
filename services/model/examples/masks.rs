//! What it costs to have an answer follow a schema: `cargo run --release --workspace --example masks MODEL_FOLDER...`
//!
//! Prints for each vocabulary how long it takes to make the tables that all schemas share, to compile a schema, and to
//! rule tokens out before one is chosen, over answers of a model that finds all tokens equally likely.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use model::grammar::Grammars;
use model::tokenizer::Tokenizer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SCHEMA: &str = r#"{"type": "object", "properties": {
    "name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
    "kind": {"enum": ["person", "place", "thing"]}, "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "required": ["name", "age", "tags", "kind", "note"], "additionalProperties": false}"#;
const ANSWERS: u64 = 50;
const TOKENS_MAX: usize = 200;

fn main() -> Result<()> {
    for dir in std::env::args_os().skip(1).map(PathBuf::from) {
        let tokenizer = Tokenizer::load(&dir)?;
        let vocabulary = tokenizer.largest_id() as usize + 1;
        let grammars = Grammars::new(&tokenizer, vocabulary, tokenizer.eos_ids().to_vec());
        let start = Instant::now();
        grammars.compile("{}")?;
        let tables = start.elapsed();
        let (mut compiled, mut narrowed) = (Vec::new(), Vec::new());
        for seed in 0..ANSWERS {
            let start = Instant::now();
            let mut grammar = grammars.compile(SCHEMA)?;
            compiled.push(start.elapsed());
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            for _ in 0..TOKENS_MAX {
                let mut logits = vec![0f32; vocabulary];
                let start = Instant::now();
                grammar.narrow(&mut logits)?;
                let narrow = start.elapsed();
                let allowed: Vec<u32> = (0..).zip(&logits).filter(|x| *x.1 == 0.0).map(|x| x.0).collect();
                let id = *allowed.get(random.random_range(0..allowed.len())).context("a token")?;
                let start = Instant::now();
                let last = grammar.accept(id)?;
                narrowed.push(narrow + start.elapsed());
                if last || tokenizer.eos_ids().contains(&id) {
                    break;
                }
            }
        }
        compiled.sort_unstable();
        narrowed.sort_unstable();
        let at =
            |times: &[Duration], share: f64| times[(times.len() as f64 * share) as usize].as_secs_f64() * 1e6;
        println!(
            "{}: {vocabulary} tokens, tables {:.1} ms, schema {:.2} ms, {} tokens of {:.1} µs (99 %: {:.1} µs, most {:.1} µs)",
            dir.display(),
            tables.as_secs_f64() * 1e3,
            at(&compiled, 0.5) / 1e3,
            narrowed.len(),
            at(&narrowed, 0.5),
            at(&narrowed, 0.99),
            at(&narrowed, 0.9999),
        );
    }
    Ok(())
}
