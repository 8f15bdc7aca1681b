//! What is known of short answers: counts of those that repeat, from which a ridge regression says, in closed form, which of them a
//! prompt has, and those that come once, each with its prompt, from which the same regression tells how like it another one is.
//!
//! Where many prompts share few answers, as labels, an adapter has to be rehearsed for ever, and what one batch teaches
//! another unlearns. Here nothing is unlearned: of each prompt a vector is taken from the frozen base ([`Features`]), and
//! [`Counts`] add up its products with itself and with its answer. Sums know no order, so documents that come one after
//! another leave the same counts as all of them at once. Of the sums [`Head`] is solved, as in analytic
//! continual learning (Zhuang et al., arXiv 2205.14922) and, with random features, `RanPAC` (McDonnell et al., arXiv
//! 2307.02251), and [`Prior`] brings what it says into the model's next token.
//!
//! No prompt is kept: 2,500 numbers a prompt go into sums whose number does not grow; beside facts ([`FACTS_MAX`]) those numbers are.
//! What texts say ([`crate::passages`]) is kept in the same files, and told of in the same way.

mod anchors;
mod counting;
mod counts;
mod facts;
mod features;
mod foreign;
mod head;
mod prior;
mod products;
mod solved;
mod trial;
mod whose;

pub use anchors::Anchors;
pub use counting::{ANSWER_TOKENS_MAX, Counted, Counting, Heard, Material, exchange};
pub use counts::{Counts, Lesson};
pub use facts::FACTS_MAX;
pub(crate) use features::mixed;
pub use features::{Features, Rows};
pub use foreign::foreign;
pub use head::{Head, TRUST};
pub use prior::{Prior, Source};
pub use whose::Whose;

use serde::{Deserialize, Serialize};

/// Numbers a prompt is described with.
pub const FEATURES: i64 = features::PARTS * features::PART + features::WORDS;

/// Answers that counts know at most.
pub const ANSWERS_MAX: usize = 4096;

/// An answer that was given more than once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What it says, without what a prompt's form puts around it.
    pub text: String,
    /// As what tokens it follows a prompt.
    pub forms: Vec<Form>,
}

/// An answer as it follows prompts of one form, such as those of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Form {
    /// Its tokens, to the end.
    pub tokens: Vec<u32>,
    /// What all of its prompts ended with; none where they ended with various tokens.
    pub after: Option<u32>,
}

impl Answer {
    /// The tokens with which it may follow a prompt that ends with `last`: in the forms that belong there, or else in those that
    /// follow any prompt, or else in all. What a form begins with and a prompt already ends with, such as a line break, is not
    /// said twice.
    fn tokens_after(&self, last: Option<u32>) -> Vec<&[u32]> {
        let of = |after: Option<u32>| self.forms.iter().filter(move |form| form.after == after);
        let mut forms: Vec<&Form> = if last.is_some() { of(last).collect() } else { Vec::new() };
        if !forms.is_empty() {
            return forms.into_iter().map(|form| form.tokens.as_slice()).collect();
        }
        forms.extend(of(None));
        if forms.is_empty() {
            forms.extend(&self.forms);
        }
        let rest = |form: &'_ Form| {
            usize::from(last.is_some() && form.tokens.len() > 1 && form.tokens.first().copied() == last)
        };
        forms.into_iter().map(|form| &form.tokens[rest(form)..]).collect()
    }
}
