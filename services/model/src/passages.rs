//! What texts say, kept as they say it.
//!
//! An adapter that has read a text a few times has learned its manner, and little of what it says: of sentences of invented articles,
//! broken off before their last words, none is ended as it was. So sentences and lines are kept beside the adapter, and where a prompt
//! is like the beginning of one, or asks for what one says, the model is told how that one goes on, as pointer networks are (Vinyals et
//! al., arXiv 1506.03134) and, token by token, nearest-neighbour language models (Khandelwal et al., arXiv 1911.00172). What is alike is
//! told by words in common, the rarer the more, which needs no training, costs no forgetting, and grows with every text.

mod find;
mod spelling;

pub use find::{Asked, Found, Index};

use anyhow::{Result, bail, ensure};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tch::{Kind, Tensor};

use crate::tokenizer::Tokenizer;
use find::words;
use spelling::{Spelled, Spelling, keys};

/// Tokens before which no sentence ends: a shorter one says too little, and goes with the next.
const TOKENS_MIN: usize = 8;
/// What is longer is no sentence, and is cut.
const TOKENS_MAX: usize = 128;

/// Tokens of a short prompt: of these a passage may have a larger share by chance.
const TOKENS_SHORT: usize = 10;

/// Of prompts about anything else, the share of those that are taken for what they are.
const FOREIGN_OF: (usize, usize) = (19, 20);

/// Names of the tensors that hold passages.
const NAMES: [&str; 4] = ["passage_tokens", "passage_ends", "passage_goes_on", "passage_foreign"];
/// And of those that earlier versions did not write: which documents they are from, and what prompts have that are about anything else.
const DOCUMENTS: &str = "passage_documents";
const OTHERS: &str = "passage_others";
const COMMON: &str = "passage_common";
/// Of prompts about anything else a word has to be in so many to be kept: what is in one is as rare as what is in none.
const COMMON_MIN: u32 = 2;

/// Sentences and lines of texts, in the order in which they came.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Passages {
    /// The tokens of all, without control tokens.
    tokens: Vec<u32>,
    /// Where each ends among them.
    ends: Vec<u32>,
    /// Whether the text goes on with the next one.
    goes_on: Vec<bool>,
    /// The document that each is from; 0 where that is not known.
    documents: Vec<u64>,
    /// What one of them has of a prompt that is about anything else, at most, where that is short and where it is long: see
    /// [`Index::share`].
    foreign: [f32; 2],
    /// Those prompts: of a few sentences nobody can tell which words are rare.
    others: Others,
}

/// In how many of some prompts each word is.
#[derive(Debug, Clone, Default, PartialEq)]
struct Others {
    prompts: u32,
    /// Words and pairs of neighbours, hashed, each with how many have it; sorted.
    common: Vec<(u32, u32)>,
}

impl Passages {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Keeps what a text of a document says, as long as all that is kept has no more than `tokens_max` tokens. False where there is no
    /// room.
    ///
    /// # Errors
    /// When the tokenizer fails on it.
    pub fn take_in(
        &mut self,
        document: u64,
        text: &[u32],
        tokenizer: &Tokenizer,
        tokens_max: usize,
    ) -> Result<bool> {
        let (tokens, spelled) = Spelling::new(tokenizer).of_text(text)?;
        let cuts = cut(&spelled);
        let Some(last) = cuts.last() else { return Ok(true) };
        if self.tokens.len() + last.end > tokens_max {
            return Ok(false);
        }
        let before = self.tokens.len();
        self.ends.extend(cuts.iter().map(|cut| (before + cut.end) as u32));
        self.goes_on.extend((1..=cuts.len()).map(|n| n < cuts.len()));
        self.documents.extend(cuts.iter().map(|_| document));
        self.tokens.extend(tokens);
        Ok(true)
    }

    /// Notes what they have of prompts that are about anything else.
    ///
    /// # Errors
    /// When the tokenizer fails on one.
    pub fn compare(&mut self, foreign: &[Vec<u32>], tokenizer: &Arc<Tokenizer>) -> Result<()> {
        let read = |prompt: &Vec<u32>| Ok(words(&keys(&Spelling::new(tokenizer).of_text(prompt)?.1)));
        self.others = Others::of(foreign.iter().map(read).collect::<Result<Vec<_>>>()?);
        let index = Index::new(self.clone(), Arc::clone(tokenizer))?;
        let at_most = |tokens: usize| {
            let some = |prompt: &Vec<u32>| index.share(&prompt[..tokens.min(prompt.len())]);
            let mut shares = foreign.iter().map(some).collect::<Result<Vec<f64>>>()?;
            shares.sort_by(f64::total_cmp);
            let most = shares.len().saturating_sub(1) * FOREIGN_OF.0 / FOREIGN_OF.1;
            anyhow::Ok(shares.get(most).map_or(0.0, |&share| share as f32))
        };
        self.foreign = [at_most(TOKENS_SHORT)?, at_most(usize::MAX)?];
        Ok(())
    }

    /// Keeps what others keep as well.
    pub fn join(&mut self, other: &Self) {
        let before = self.tokens.len() as u32;
        self.tokens.extend(&other.tokens);
        self.ends.extend(other.ends.iter().map(|end| before + end));
        self.goes_on.extend(&other.goes_on);
        self.documents.extend(&other.documents);
        self.foreign = std::array::from_fn(|n| self.foreign[n].max(other.foreign[n]));
        if self.others.prompts < other.others.prompts {
            self.others = other.others.clone();
        }
    }

    /// Where the tokens of one lie.
    fn range(&self, n: usize) -> Range<usize> {
        let start = n.checked_sub(1).map_or(0, |before| self.ends[before]);
        start as usize..self.ends[n] as usize
    }

    /// The document that the passage is from which holds a token.
    fn document(&self, token: usize) -> Option<u64> {
        let n = self.ends.partition_point(|&end| end as usize <= token);
        self.documents.get(n).copied().filter(|&document| document > 0)
    }

    /// As tensors with names.
    ///
    /// # Errors
    /// Only those of libtorch.
    pub(crate) fn tensors(&self) -> Result<[(String, Tensor); 7]> {
        let ints = |numbers: &[u32]| {
            Tensor::from_slice(&numbers.iter().map(|&n| i64::from(n)).collect::<Vec<_>>())
                .f_to_kind(Kind::Int)
        };
        let goes_on: Vec<u8> = self.goes_on.iter().map(|&on| u8::from(on)).collect();
        let foreign = Tensor::from_slice(&self.foreign);
        let documents = self.documents.iter().map(|&document| Ok(i64::try_from(document)?));
        let documents = Tensor::from_slice(&documents.collect::<Result<Vec<i64>>>()?);
        let others = Tensor::from_slice(&[i64::from(self.others.prompts)]);
        let common: Vec<i64> =
            self.others.common.iter().flat_map(|&(word, prompts)| [word, prompts]).map(i64::from).collect();
        let common = Tensor::from_slice(&common).f_view([-1, 2])?;
        let (tokens, ends, goes_on) = (ints(&self.tokens)?, ints(&self.ends)?, Tensor::from_slice(&goes_on));
        let tensors = [tokens, ends, goes_on, foreign, documents, others, common];
        let mut names = NAMES.iter().chain([&DOCUMENTS, &OTHERS, &COMMON]);
        Ok(tensors.map(|tensor| (names.next().map_or("", |name| name).to_owned(), tensor)))
    }

    /// Takes them out of named tensors; none are there where an earlier version wrote those.
    ///
    /// # Errors
    /// When they do not belong together.
    pub(crate) fn from_tensors(mut take: impl FnMut(&str) -> Option<Tensor>) -> Result<Self> {
        let [Some(tokens), Some(ends), Some(goes_on), Some(foreign)] = NAMES.map(&mut take) else {
            return Ok(Self::default());
        };
        let ints = |tensor: &Tensor| -> Result<Vec<u32>> {
            ensure!(tensor.f_kind()? == Kind::Int && tensor.dim() == 1, "passages are not i32");
            Vec::<i32>::try_from(tensor)?.into_iter().map(|n| Ok(u32::try_from(n)?)).collect()
        };
        let (tokens, ends) = (ints(&tokens)?, ints(&ends)?);
        ensure!(goes_on.f_kind()? == Kind::Uint8 && goes_on.dim() == 1, "passages are not what they were");
        let goes_on: Vec<bool> = Vec::<u8>::try_from(goes_on)?.into_iter().map(|on| on != 0).collect();
        let foreign = match Vec::<f32>::try_from(foreign)?[..] {
            [short, long] => [short, long],
            // An earlier version knew of long ones alone.
            [long] => [long; 2],
            _ => bail!("what passages have of other prompts is not what it was"),
        };
        let documents = match take(DOCUMENTS) {
            Some(documents) => {
                ensure!(
                    documents.f_kind()? == Kind::Int64 && documents.dim() == 1,
                    "documents of passages are not i64"
                );
                Vec::<i64>::try_from(documents)?
                    .into_iter()
                    .map(|n| Ok(u64::try_from(n)?))
                    .collect::<Result<Vec<u64>>>()?
            }
            None => vec![0; ends.len()],
        };
        let fits = foreign.iter().all(|share| share.is_finite())
            && goes_on.len() == ends.len()
            && documents.len() == ends.len()
            && ends.first().is_none_or(|&first| first > 0)
            && ends.is_sorted_by(|a, b| a < b)
            && ends.last().copied().unwrap_or(0) as usize == tokens.len()
            && goes_on.last() != Some(&true);
        ensure!(fits, "passages and their ends do not belong together");
        let others = Others::from_tensors(take(OTHERS).zip(take(COMMON)))?;
        Ok(Self { tokens, ends, goes_on, documents, foreign, others })
    }
}

impl Others {
    /// Of what words each prompt has.
    fn of(prompts: Vec<Vec<u32>>) -> Self {
        let mut having: BTreeMap<u32, u32> = BTreeMap::new();
        prompts.iter().flatten().for_each(|&word| *having.entry(word).or_default() += 1);
        having.retain(|_, prompts| *prompts >= COMMON_MIN);
        Self { prompts: prompts.len() as u32, common: having.into_iter().collect() }
    }

    /// None where an earlier version wrote none.
    fn from_tensors(tensors: Option<(Tensor, Tensor)>) -> Result<Self> {
        let Some((prompts, common)) = tensors else { return Ok(Self::default()) };
        ensure!(
            prompts.f_kind()? == Kind::Int64 && common.f_kind()? == Kind::Int64 && common.dim() == 2,
            "words of other prompts are not i64"
        );
        let whole = |n: i64| -> Result<u32> { Ok(u32::try_from(n)?) };
        let common = Vec::<Vec<i64>>::try_from(common)?.into_iter().map(|pair| match pair[..] {
            [word, prompts] => Ok((whole(word)?, whole(prompts)?)),
            _ => bail!("words of other prompts are not counted"),
        });
        let common = common.collect::<Result<Vec<(u32, u32)>>>()?;
        let prompts = whole(i64::try_from(prompts)?)?;
        let fits = common.is_sorted_by(|a, b| a.0 < b.0) && common.iter().all(|&(_, of)| of <= prompts);
        ensure!(fits, "words of other prompts do not belong together");
        Ok(Self { prompts, common })
    }

    /// How many have a word.
    fn having(&self, word: u32) -> u32 {
        self.common.binary_search_by_key(&word, |&(word, _)| word).map_or(0, |place| self.common[place].1)
    }
}

/// Where a text is cut: after the end of a sentence or line, once there is enough of it.
fn cut(spelled: &[Spelled]) -> Vec<Range<usize>> {
    let (mut cuts, mut start) = (Vec::new(), 0);
    for (n, token) in spelled.iter().enumerate() {
        let length = n + 1 - start;
        let end = match length {
            TOKENS_MIN.. if token.ends_before(spelled.get(n + 1)) => n + 1,
            // Before a word, where there is one.
            TOKENS_MAX.. => (start + TOKENS_MIN..=n).rev().find(|&n| spelled[n].opens).unwrap_or(n + 1),
            _ => continue,
        };
        cuts.push(start..end);
        start = end;
    }
    if start < spelled.len() {
        cuts.push(start..spelled.len());
    }
    cuts
}

#[cfg(test)]
mod tests;
