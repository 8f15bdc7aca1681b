//! What a teacher costs: tokens, money, and the limit on it.

use serde::{Deserialize, Serialize};
use std::ops::AddAssign;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// English text has about so many bytes a token.
const BYTES_A_TOKEN: u64 = 4;
/// What a chat template adds to a message at most, tokens.
const FRAME_TOKENS: u64 = 64;

/// Tokens that a teacher read and wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Read.
    pub tokens_in: u64,
    /// Written.
    pub tokens_out: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, more: Self) {
        self.tokens_in += more.tokens_in;
        self.tokens_out += more.tokens_out;
    }
}

impl Usage {
    /// What a request is likely to take, when an answer has about so many tokens.
    pub fn likely(request: &str, tokens_out: u64) -> Self {
        Self { tokens_in: (request.len() as u64).div_ceil(BYTES_A_TOKEN), tokens_out }
    }

    /// More than it can take: no tokenizer makes more than one token of a byte.
    pub fn most(request: &str, tokens_out_max: u32) -> Self {
        Self { tokens_in: request.len() as u64 + FRAME_TOKENS, tokens_out: tokens_out_max.into() }
    }
}

/// Prices of a million tokens, in whatever currency.
#[derive(Debug, Clone, Copy)]
pub struct Prices {
    /// Of those read.
    pub tokens_in: f64,
    /// Of those written.
    pub tokens_out: f64,
}

impl Prices {
    /// What this much costs.
    pub fn of(self, usage: Usage) -> f64 {
        (usage.tokens_in as f64 * self.tokens_in + usage.tokens_out as f64 * self.tokens_out) / 1e6
    }
}

/// A limit on what a run may cost. Each request sets aside the most that it can cost before it is
/// sent, so that the limit is kept however many are under way.
#[derive(Debug)]
pub struct Budget {
    limit: Option<(f64, Prices)>,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    spent: f64,
    set_aside: f64,
}

impl Budget {
    /// Without a limit everything is allowed.
    pub fn new(limit: Option<(f64, Prices)>) -> Self {
        Self { limit, state: Mutex::default(), freed: Notify::new() }
    }

    /// Sets aside what a request can take at most. While others are under way it waits for what they
    /// leave over; false when there is nothing to wait for.
    pub async fn reserve(&self, most: Usage) -> bool {
        let Some((limit, prices)) = self.limit else { return true };
        let most = prices.of(most);
        loop {
            // Made before the look, so that nothing is freed unnoticed in between.
            let freed = self.freed.notified();
            {
                let mut state = self.state();
                if state.spent + state.set_aside + most <= limit {
                    state.set_aside += most;
                    return true;
                }
                if state.spent + most > limit {
                    return false;
                }
            }
            freed.await;
        }
    }

    /// Gives back what was set aside, but for what was used.
    pub fn settle(&self, most: Usage, used: Usage) {
        let Some((_, prices)) = self.limit else { return };
        let mut state = self.state();
        state.set_aside = (state.set_aside - prices.of(most)).max(0.0);
        state.spent += prices.of(used);
        self.freed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICES: Prices = Prices { tokens_in: 1.0, tokens_out: 4.0 };

    fn usage(tokens_in: u64, tokens_out: u64) -> Usage {
        Usage { tokens_in, tokens_out }
    }

    #[test]
    fn a_million_tokens_cost_their_price() {
        assert_eq!(PRICES.of(usage(1_000_000, 0)), 1.0);
        assert_eq!(PRICES.of(usage(500_000, 250_000)), 1.5);
        let (likely, most) = (Usage::likely("abcde", 7), Usage::most("abcde", 100));
        assert_eq!(likely, usage(2, 7));
        assert!(most.tokens_in >= 5 && most.tokens_out == 100);
    }

    #[tokio::test]
    async fn the_limit_holds_for_all_that_is_under_way_together() {
        let budget = Budget::new(Some((10.0, PRICES)));
        let most = usage(0, 1_000_000);
        assert!(budget.reserve(most).await && budget.reserve(most).await);
        // There is no room for a third until one of the two has taken less than it could.
        let third = budget.reserve(most);
        tokio::pin!(third);
        tokio::select! {
            biased;
            _ = &mut third => panic!("12 of 10 were set aside"),
            () = tokio::task::yield_now() => {}
        }
        budget.settle(most, usage(1_000_000, 0));
        assert!(third.await);
        budget.settle(most, most);
        budget.settle(most, most);
        assert!(!budget.reserve(most).await, "9 of 10 are spent");
        assert!(budget.reserve(usage(1_000_000, 0)).await);
    }

    #[tokio::test]
    async fn without_a_limit_everything_is_allowed() {
        assert!(Budget::new(None).reserve(usage(u64::MAX, u64::MAX)).await);
    }
}
