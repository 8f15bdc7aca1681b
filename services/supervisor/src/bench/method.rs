//! Ways to learn one task after another, as settings of the running system.

use clap::ValueEnum;
use kit::settings::{AdapterScope, Settings};

/// A rise of the loss that no gate would call one.
const NO_LIMIT: f32 = 10.0;

/// How forgetting is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum Method {
    /// The system as the settings say: rehearsal, and the gate.
    #[value(name = "default")]
    Default,
    /// Plain fine-tuning: what comes is learned, and nothing else. No gate.
    #[value(name = "naive")]
    Naive,
    /// Rehearsal from the replay buffer (replay.strategy, replay.capacity). No gate.
    #[value(name = "replay")]
    Replay,
    /// Elastic weight consolidation (train.ewc_lambda), without rehearsal. No gate.
    #[value(name = "ewc")]
    Ewc,
    /// Both. No gate.
    #[value(name = "replay+ewc")]
    ReplayEwc,
    /// Learning without forgetting: distillation from the previous generation (train.former_share), without
    /// rehearsal. No gate.
    #[value(name = "lwf")]
    Lwf,
    /// O-LoRA (Wang et al., arXiv 2310.14152): each batch trains a part of the ranks, apart from what earlier parts read
    /// (train.olora_lambda, train.olora_parts), without rehearsal. No gate.
    #[value(name = "olora")]
    Olora,
    /// Dark experience replay (Buzzega et al., arXiv 2004.07211): rehearsal of texts whose loss is in part what the
    /// previous generation says (train.former_share_rehearsed). No gate.
    #[value(name = "der")]
    Der,
    /// Asymmetric cross-entropy (ER-ACE, Caccia et al., arXiv 2104.05025): rehearsal, and what is new does not make the
    /// tokens of old answers less likely (train.answers_apart). No gate.
    #[value(name = "ace")]
    Ace,
    /// Asymmetric cross-entropy, rehearsal and elastic weight consolidation. No gate.
    #[value(name = "ace+ewc")]
    AceEwc,
    /// Rehearsal, and reviews at the end of a batch (train.review_passes), which only what is named so has, and the
    /// default. No gate.
    #[value(name = "replay+review")]
    ReplayReview,
    /// Asymmetric cross-entropy, rehearsal, elastic weight consolidation and reviews. No gate.
    #[value(name = "ace+ewc+review")]
    AceEwcReview,
    /// Plain fine-tuning, and counts of answers that repeat (consolidate.answer_head), which only what is named so has, and
    /// the default. No gate.
    #[value(name = "head")]
    Head,
    /// Rehearsal, and counts of answers that repeat. No gate.
    #[value(name = "replay+head")]
    ReplayHead,
    /// Asymmetric cross-entropy, rehearsal, elastic weight consolidation, reviews, and counts of answers that repeat. No gate.
    #[value(name = "ace+ewc+review+head")]
    AceEwcReviewHead,
    /// Rehearsal and distillation from the previous generation, on what is new and on what is rehearsed. No gate.
    #[value(name = "replay+lwf")]
    ReplayLwf,
    /// All tasks at once, shuffled: what a learner reaches that cannot forget.
    #[value(name = "joint")]
    Joint,
    /// The same, and counts of answers that repeat.
    #[value(name = "joint+head")]
    JointHead,
    /// Each task on the base alone: what a learner reaches that has nothing to forget.
    #[value(name = "single")]
    Single,
}

/// Strength of the penalty, and the former self's shares, where the settings leave them off.
const EWC_LAMBDA: f64 = 0.002;
/// As in the paper on O-LoRA.
const OLORA_LAMBDA: f64 = 0.5;
const FORMER_SHARE: f64 = 0.3;
const FORMER_SHARE_REHEARSED: f64 = 0.5;

/// What a method meets forgetting with.
#[derive(Clone, Copy, Default)]
struct Means {
    rehearsal: bool,
    /// Elastic weight consolidation.
    ewc: bool,
    olora: bool,
    /// The previous generation as a teacher, of what is new and of what is rehearsed.
    former: bool,
    former_rehearsed: bool,
    /// New answers that leave the old ones alone.
    apart: bool,
    reviews: bool,
    /// Counts of answers that repeat.
    head: bool,
}

impl Method {
    /// None where the settings alone say it.
    fn means(self) -> Option<Means> {
        let none = Means::default();
        let replay = Means { rehearsal: true, ..none };
        Some(match self {
            Self::Default => return None,
            Self::Naive | Self::Joint | Self::Single => none,
            Self::Ewc => Means { ewc: true, ..none },
            Self::Lwf => Means { former: true, ..none },
            Self::Olora => Means { olora: true, ..none },
            Self::Replay => replay,
            Self::ReplayEwc => Means { ewc: true, ..replay },
            Self::ReplayReview => Means { reviews: true, ..replay },
            Self::ReplayLwf => Means { former: true, former_rehearsed: true, ..replay },
            Self::Der => Means { former_rehearsed: true, ..replay },
            Self::Ace => Means { apart: true, ..replay },
            Self::AceEwc => Means { apart: true, ewc: true, ..replay },
            Self::Head | Self::JointHead => Means { head: true, ..none },
            Self::ReplayHead => Means { head: true, ..replay },
            Self::AceEwcReviewHead => Means { apart: true, ewc: true, reviews: true, head: true, ..replay },
            Self::AceEwcReview => Means { apart: true, ewc: true, reviews: true, ..replay },
        })
    }

    /// Whether all tasks are learned at once.
    pub fn is_joint(self) -> bool {
        matches!(self, Self::Joint | Self::JointHead)
    }

    /// Whether it learns from the replay buffer.
    pub fn rehearses(self) -> bool {
        self.means().is_none_or(|means| means.rehearsal)
    }

    /// The settings under which the system learns by this method.
    pub fn apply(self, settings: &Settings) -> Settings {
        let mut s = settings.clone();
        let Some(means) = self.means() else { return s };
        (s.consolidate.tolerance, s.consolidate.anchor_tolerance) = (NO_LIMIT, NO_LIMIT);
        if !means.rehearsal {
            s.replay.new_data_ratio = 1.0;
            s.train.anchor_share = 0.0;
        }
        let strength = |used: bool, given: f64, otherwise: f64| match (used, given > 0.0) {
            (false, _) => 0.0,
            (true, true) => given,
            (true, false) => otherwise,
        };
        s.train.ewc_lambda = strength(means.ewc, s.train.ewc_lambda, EWC_LAMBDA);
        s.train.olora_lambda = strength(means.olora, s.train.olora_lambda, OLORA_LAMBDA);
        s.train.former_share = strength(means.former, s.train.former_share, FORMER_SHARE);
        s.train.former_share_rehearsed =
            strength(means.former_rehearsed, s.train.former_share_rehearsed, FORMER_SHARE_REHEARSED);
        s.train.answers_apart = means.apart;
        s.consolidate.answer_head = means.head;
        if !means.reviews {
            s.train.review_passes = 0;
        }
        if self.is_joint() {
            // One batch: its passes shuffle all tasks.
            (s.replay.batch_examples, s.replay.batch_counted) = (100_000, 100_000);
            s.train.adapters = AdapterScope::Shared;
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_settings_and_the_default_changes_none() {
        let settings = Settings::load(None, &[]).expect("settings");
        assert_eq!(Method::Default.apply(&settings), settings);
        let naive = Method::Naive.apply(&settings);
        assert_eq!((naive.replay.new_data_ratio, naive.train.ewc_lambda), (1.0, 0.0));
        let replay = Method::Replay.apply(&settings);
        assert_eq!(replay.replay, settings.replay);
        assert_eq!(replay.train.ewc_lambda, 0.0);
        assert!(Method::ReplayEwc.apply(&settings).train.ewc_lambda > 0.0);
        let own = Settings::load(None, &["train.ewc_lambda=0.7".into()]).expect("settings");
        assert_eq!(Method::Ewc.apply(&own).train.ewc_lambda, 0.7);
        assert_eq!(Method::Replay.apply(&own).train.ewc_lambda, 0.0);
        let lwf = Method::Lwf.apply(&own);
        assert_eq!((lwf.replay.new_data_ratio, lwf.train.ewc_lambda), (1.0, 0.0));
        assert!(lwf.train.former_share > 0.0);
        let both = Method::ReplayLwf.apply(&settings);
        assert_eq!((&both.replay, both.train.former_share), (&settings.replay, lwf.train.former_share));
        let olora = Method::Olora.apply(&settings);
        assert_eq!((olora.replay.new_data_ratio, lwf.train.olora_lambda), (1.0, 0.0));
        assert!(olora.train.olora_lambda > 0.0);
        let der = Method::Der.apply(&settings);
        assert_eq!((&der.replay, der.train.former_share), (&settings.replay, 0.0));
        let ace = Method::Ace.apply(&settings);
        assert!(ace.train.answers_apart && ace.replay == settings.replay && !der.train.answers_apart);
        assert_eq!(ace.train.ewc_lambda, 0.0);
        let both = Method::AceEwc.apply(&own);
        assert!(both.train.answers_apart && both.train.ewc_lambda == 0.7);
        assert_eq!(replay.train.review_passes, 0);
        let review = Method::AceEwcReview.apply(&own);
        assert_eq!(review.train.review_passes, settings.train.review_passes);
        assert!(review.train.answers_apart && review.train.ewc_lambda == 0.7);
        assert!(
            Method::ReplayReview.apply(&settings).train.review_passes > 0 && Method::ReplayReview.rehearses()
        );
        assert!(settings.consolidate.answer_head && !review.consolidate.answer_head);
        let head = Method::Head.apply(&settings);
        assert!(head.consolidate.answer_head && !Method::Head.rehearses() && Method::ReplayHead.rehearses());
        let [joint, with_head] = [Method::Joint, Method::JointHead].map(|method| method.apply(&settings));
        assert!(with_head.consolidate.answer_head && !joint.consolidate.answer_head);
        assert_eq!((&with_head.replay, &with_head.train), (&joint.replay, &joint.train));
        assert_eq!(joint.train.adapters, AdapterScope::Shared);
        let all = Method::AceEwcReviewHead.apply(&own);
        assert!(all.consolidate.answer_head && all.train == review.train);
        assert_eq!(Method::Replay.apply(&settings).train.former_share_rehearsed, 0.0);
        assert!(der.train.former_share_rehearsed > 0.0 && lwf.train.former_share_rehearsed == 0.0);
    }
}
