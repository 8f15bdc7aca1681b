use super::*;
use crate::device::Placement;
use crate::generate::generate;
use crate::golden;
use crate::lora::LoraConfig;
use tch::{Device, Kind, Tensor};

/// Room for some thousand tokens of the small bases here.
const ROOM: usize = 64 << 20;

fn stories() -> Option<(Base, Tokenizer)> {
    let dir = golden::shared("models/stories260K")?;
    tch::set_num_threads(1);
    Some((Base::load(&dir, &Placement::CPU_F32).unwrap(), Tokenizer::load(&dir).unwrap()))
}

fn adapter(base: &Base, seed: u64) -> Adapter {
    let adapter = Adapter::new(LoraConfig::default(), base.config(), seed).unwrap();
    let numbers = Tensor::arange(adapter.parameter_count(), (Kind::Float, Device::Cpu));
    adapter.with_flat(adapter.flat() + (numbers * (0.37 + seed as f64)).sin() * 0.02).unwrap()
}

fn greedy(max_tokens: usize) -> Sampling {
    Sampling { max_tokens, ..Sampling::default() }
}

impl Batch {
    /// Steps until all have ended; gives the ids of each, and how many steps it took to its first token.
    fn finish(&mut self, mut speakers: Vec<Speaker>) -> Vec<(Vec<u32>, usize)> {
        let mut made: Vec<(Vec<u32>, usize)> = speakers.iter().map(|_| (Vec::new(), 0)).collect();
        let mut open = speakers.len();
        while open > 0 {
            let mut all: Vec<&mut Speaker> = speakers.iter_mut().collect();
            for (made, step) in made.iter_mut().zip(self.step(&mut all)) {
                made.1 += usize::from(made.0.is_empty());
                if let Some(step) = step.unwrap() {
                    made.0.push(step.id);
                    open -= usize::from(step.finish.is_some());
                }
            }
        }
        speakers.into_iter().for_each(|speaker| self.end(speaker));
        made
    }
}

/// Of a device that is no CPU, on one.
fn joint(base: Base, room: usize) -> Batch {
    Batch::on(base, None, room)
}

#[test]
fn together_answers_are_those_of_the_plain_way() {
    let Some((base, tokenizer)) = stories() else { return };
    for mut batch in [Batch::new(base.share(), ROOM).unwrap(), joint(base.share(), ROOM)] {
        answers_are_those_of_the_plain_way(&mut batch, &base, &tokenizer);
    }
}

fn answers_are_those_of_the_plain_way(batch: &mut Batch, base: &Base, tokenizer: &Tokenizer) {
    let (one, two) = (adapter(base, 1), adapter(base, 2));
    let sets: [&[(&Adapter, f64)]; 4] = [&[], &[(&one, 1.0)], &[(&two, 0.5)], &[(&one, 0.7), (&two, 0.3)]];
    let texts = ["One day", "Tom", "Once upon a time, there was a little girl named Lily. She", "The cat"];
    let (mut speakers, mut plain) = (Vec::new(), Vec::new());
    for (i, text) in texts.iter().enumerate().flat_map(|(i, text)| [(i, text), (i + 1, text)]) {
        let (adapters, prompt) = (sets[i % 4], tokenizer.encode(text).unwrap());
        let adapted = batch.adapt(adapters).unwrap();
        let length = 20 + 3 * i;
        speakers.push(batch.begin(&adapted, tokenizer, &prompt, greedy(length)).ok().unwrap());
        plain.push(generate(base, adapters, tokenizer, &prompt, greedy(length)).unwrap().ids);
    }
    let together: Vec<Vec<u32>> = batch.finish(speakers).into_iter().map(|(ids, _)| ids).collect();
    assert_eq!(together, plain);
}

#[test]
fn a_long_prompt_does_not_hold_up_those_who_decode() {
    let Some((base, tokenizer)) = stories() else { return };
    let mut batch = Batch::new(base, ROOM).unwrap();
    let adapted = batch.adapt(&[]).unwrap();
    let mut short = batch.begin(&adapted, &tokenizer, &[1, 5], greedy(30)).ok().unwrap();
    batch.step(&mut [&mut short]).remove(0).unwrap().unwrap();
    let long: Vec<u32> = (0..300).map(|i| i % 500).collect();
    let mut long = batch.begin(&adapted, &tokenizer, &long, greedy(5)).ok().unwrap();
    let steps = (1..).find(|_| {
        let mut steps = batch.step(&mut [&mut short, &mut long]);
        let long = steps.remove(1).unwrap().is_some();
        assert!(steps.remove(0).unwrap().is_some());
        long
    });
    assert_eq!(steps, Some(300_usize.div_ceil(PREFILL.beside)));
}

#[test]
fn a_chats_history_is_read_once() {
    let Some((base, tokenizer)) = stories() else { return };
    let mut batch = Batch::new(base, ROOM).unwrap();
    let adapted = batch.adapt(&[]).unwrap();
    let ask = |batch: &mut Batch, adapted, prompt: &[u32]| {
        let speaker = batch.begin(adapted, &tokenizer, prompt, greedy(40)).ok().unwrap();
        batch.finish(vec![speaker]).remove(0)
    };
    let mut chat: Vec<u32> = (0..300).map(|i| i * 7 % 500).collect();
    let (answer, steps) = ask(&mut batch, &adapted, &chat);
    assert_eq!(steps, 2);
    assert_eq!(ask(&mut batch, &adapted, &chat), (answer.clone(), 1));
    chat.extend(answer);
    chat.extend([9, 8, 7]);
    let (known, steps) = ask(&mut batch, &adapted, &chat);
    assert_eq!(steps, 1);
    // Other adapters, though with the same effect, share nothing; and what was reused is what is computed.
    let other = batch.adapt(&[]).unwrap();
    assert_eq!(ask(&mut batch, &other, &chat), (known, 2));
}

#[test]
fn nothing_that_was_read_with_dropped_adapters_stays() {
    let Some((base, tokenizer)) = stories() else { return };
    let adapter = adapter(&base, 1);
    let mut batch = Batch::new(base, ROOM).unwrap();
    let (base_alone, adapted) = (batch.adapt(&[]).unwrap(), batch.adapt(&[(&adapter, 1.0)]).unwrap());
    let prompt: Vec<u32> = (0..100).collect();
    let begin =
        |batch: &mut Batch, adapted| batch.begin(adapted, &tokenizer, &prompt, greedy(40)).ok().unwrap();
    let speaker = begin(&mut batch, &base_alone);
    batch.finish(vec![speaker]);
    let of_base = batch.kept_tokens();
    assert!(of_base >= 96);
    let speakers = vec![begin(&mut batch, &adapted), begin(&mut batch, &adapted)];
    batch.finish(speakers);
    assert_eq!(batch.kept_tokens(), 2 * of_base);
    let mut under_way = begin(&mut batch, &adapted);
    batch.step(&mut [&mut under_way]).remove(0).unwrap();
    batch.forget(&adapted);
    assert_eq!(batch.kept_tokens(), of_base);
    // An answer that was under way goes on, and leaves nothing behind.
    let (answer, _) = batch.finish(vec![under_way]).remove(0);
    assert_eq!((answer.len(), batch.kept_tokens()), (39, of_base));
}

#[test]
fn what_does_not_fit_waits_and_what_never_fits_is_refused() {
    let Some((base, tokenizer)) = stories() else { return };
    let page = page_bytes(&base);
    let mut batch = Batch::new(base, 8 * page).unwrap();
    let adapted = batch.adapt(&[]).unwrap();
    let begin = |batch: &mut Batch, tokens| batch.begin(&adapted, &tokenizer, &[1; 32], greedy(tokens));
    let first = begin(&mut batch, 128).ok().unwrap();
    assert!(matches!(begin(&mut batch, 128), Err(NotBegun::Later)));
    let second = begin(&mut batch, 64).ok().unwrap();
    let Err(NotBegun::TooLong(message)) = begin(&mut batch, 225) else { panic!("it fits") };
    assert!(
        message.contains("257") && message.contains("256") && message.contains("cache_mb_max"),
        "{message}"
    );
    let answers = batch.finish(vec![first, second]);
    // What was kept makes room for what is begun.
    assert!(batch.kept_tokens() > 0);
    assert_eq!(begin(&mut batch, 224).map(|speaker| batch.end(speaker)).ok(), Some(()));
    assert_eq!((batch.kept_tokens(), answers[0].0.len()), (0, 128));
}

#[test]
fn rows_are_taken_again_and_grow_with_what_is_asked() {
    let Some((base, tokenizer)) = stories() else { return };
    let one = adapter(&base, 1);
    let mut batch = joint(base.share(), ROOM);
    let (alone, adapted) = (batch.adapt(&[]).unwrap(), batch.adapt(&[(&one, 1.0)]).unwrap());
    let plain = |adapters: &[(&Adapter, f64)], prompt: &[u32], tokens| {
        generate(&base, adapters, &tokenizer, prompt, greedy(tokens)).unwrap().ids
    };
    let long: Vec<u32> = (0..100).map(|i| i * 7 % 500).collect();
    let ask = |batch: &mut Batch, asked: &[(&Rc<Adapted>, &[u32], usize)]| {
        let begin = |(adapted, prompt, tokens): &(&Rc<Adapted>, &[u32], usize)| {
            batch.begin(adapted, &tokenizer, prompt, greedy(*tokens)).ok().unwrap()
        };
        let speakers = asked.iter().map(begin).collect();
        batch.finish(speakers).into_iter().map(|(ids, _)| ids).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        // One that has read more goes on while others come, take rows, read their prompts and leave.
        let mut first = batch.begin(&adapted, &tokenizer, &[1, 5], greedy(90)).ok().unwrap();
        let mut ids = Vec::new();
        for _ in 0..20 {
            ids.push(batch.step(&mut [&mut first]).remove(0).unwrap().unwrap().id);
        }
        let answers = ask(&mut batch, &[(&alone, &[1], 9), (&adapted, &long, 150), (&alone, &long, 3)]);
        assert_eq!(answers[0], plain(&[], &[1], 9));
        assert_eq!(answers[1], plain(&[(&one, 1.0)], &long, 150));
        assert_eq!(answers[2], plain(&[], &long, 3));
        while ids.len() < 90 {
            ids.push(batch.step(&mut [&mut first]).remove(0).unwrap().unwrap().id);
        }
        batch.end(first);
        assert_eq!(ids, plain(&[(&one, 1.0)], &[1, 5], 90));
    }
    assert_eq!(batch.reserved, 0);
}

#[test]
fn rows_of_answers_side_by_side_keep_to_the_caches_room() {
    let Some((base, tokenizer)) = stories() else { return };
    let page = page_bytes(&base);
    let mut batch = joint(base, 12 * page);
    let adapted = batch.adapt(&[]).unwrap();
    let begin = |batch: &mut Batch, tokens| batch.begin(&adapted, &tokenizer, &[1; 32], greedy(tokens));
    let first = begin(&mut batch, 128).ok().unwrap();
    // A row is as long as the longest: two of 5 pages fit, a third does not, and neither does a longer one.
    assert!(matches!(begin(&mut batch, 180), Err(NotBegun::Later)));
    let second = begin(&mut batch, 8).ok().unwrap();
    assert!(matches!(begin(&mut batch, 8), Err(NotBegun::Later)));
    assert!(matches!(begin(&mut batch, 1000), Err(NotBegun::TooLong(_))));
    assert_eq!(
        batch.finish(vec![first, second]).iter().map(|answer| answer.0.len()).collect::<Vec<_>>(),
        [128, 8]
    );
    assert!(begin(&mut batch, 180).is_ok());
}

#[test]
fn an_adapter_that_is_beyond_the_precision_is_refused_before_it_meets_others() {
    let Some((base, _)) = stories() else { return };
    let fine = adapter(&base, 1);
    let vast = fine.with_flat(fine.flat() * 1e20).unwrap();
    let mut batch = joint(base, ROOM);
    assert!(batch.adapt(&[(&vast, 1.0)]).is_ok());
    let refused = batch.adapt(&[(&fine, 1.0), (&vast, 1e25)]).err().unwrap();
    assert!(refused.to_string().contains("precision"), "{refused}");
}
