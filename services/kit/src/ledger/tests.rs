use super::*;
use proto::{Content, Domain, Example, ExampleId, Kept, Piece, Verdict, VerdictKind};
use std::collections::BTreeMap;
use tempfile::TempDir;

fn domain(name: &str) -> Domain {
    Domain::new(name).expect("a domain")
}

fn document(id: &str, domain_name: &str, text: &str) -> Document {
    Document {
        id: DocumentId::new(id).expect("an id"),
        domain: domain(domain_name),
        content: Content::Text(text.into()),
        importance: None,
        source: None,
        submitted_ms: 5,
        derived_from: None,
    }
}

fn id(text: &str) -> DocumentId {
    DocumentId::new(text).expect("an id")
}

fn open() -> (Ledger, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    (Ledger::open(folder.path()).expect("a ledger"), folder)
}

/// Appends documents `1..=count`, in turn to each domain.
async fn filled(domains: &[&str], count: u64) -> (Ledger, TempDir) {
    let (ledger, folder) = open();
    let place = |n: u64| domains[(n as usize - 1) % domains.len()];
    let documents = (1..=count).map(|n| document(&format!("d{n}"), place(n), &format!("text {n}"))).collect();
    ledger.append(documents).await.expect("appended");
    (ledger, folder)
}

/// The verdict on a document that was cut into some examples; none is a refusal.
fn settlement(ordinal: u64, domain_name: &str, examples: u32, held_out: u32) -> Settlement {
    let kind = if examples > 0 { VerdictKind::Kept } else { VerdictKind::Refused };
    let piece = Piece { tokens: vec![1, 2, 3], learned: vec![(0, 3)] };
    let example = |chunk| Example {
        id: ExampleId { ordinal, chunk },
        domain: domain(domain_name),
        piece: piece.clone(),
        importance: 0.5,
        marked: false,
        held_out: chunk < held_out,
        signature: vec![7],
    };
    let kept = Kept {
        ordinal,
        id: id(&format!("d{ordinal}")),
        domain: domain(domain_name),
        importance: None,
        verdict: Verdict { kind, reason: "so".into(), score: 1.0 },
        pieces: Vec::new(),
        signature: vec![ordinal as u32],
    };
    Settlement { kept, examples: (0..examples).map(example).collect() }
}

/// Room for so many examples of any kind.
fn room(examples: usize, documents: usize) -> Room {
    Room { documents, examples, counted: 0, answer_tokens: 0, counted_tokens: 0 }
}

async fn settle(ledger: &Ledger, settlements: Vec<Settlement>) {
    ledger.settle_intake_many(settlements).await.expect("settled");
}

/// What a loss of power would leave: the files as they are on disk while the ledger is open.
fn snapshot(folder: &TempDir) -> TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    fs::copy(folder.path().join("ledger.redb"), copy.path().join("ledger.redb")).expect("copied");
    copy
}

#[tokio::test]
async fn of_short_answers_a_window_holds_more_than_of_others() {
    let (ledger, _folder) = filled(&["a"], 12).await;
    let answers = |ordinal, learned: &[(u32, u32)]| {
        let mut judged = settlement(ordinal, "a", 2, 0);
        let piece = Piece { tokens: vec![1, 2, 3, 4], learned: learned.to_vec() };
        judged.examples.iter_mut().for_each(|example| example.piece = piece.clone());
        judged
    };
    // Of two examples each: four that answer with a token or two, a text, five that answer, one that answers twice, and one that
    // answers.
    let judged = (1..=12).map(|n| match n {
        5 => settlement(n, "a", 2, 0),
        11 => answers(n, &[(1, 2), (3, 4)]),
        _ => answers(n, if n == 2 { &[(2, 4)] } else { &[(3, 4)] }),
    });
    settle(&ledger, judged.collect()).await;
    let through = |after, counted, answer_tokens, counted_tokens| {
        let room = Room { documents: 100, examples: 4, counted, answer_tokens, counted_tokens };
        let window = ledger.fresh(None, after, room).expect("a window");
        (window.through, window.full)
    };
    assert_eq!(through(0, 100, 2, 100), (4, true), "with the text they are more than four");
    assert_eq!(through(0, 100, 1, 100), (2, true), "one is longer");
    assert_eq!(through(5, 100, 2, 100), (10, true), "one is asked twice");
    assert_eq!(through(5, 7, 2, 100), (8, true), "seven of them");
    assert_eq!(through(5, 100, 2, 24), (8, true), "24 tokens of them");
    assert_eq!(through(5, 100, 2, 1), (7, true), "long ones, as many as others");
    assert_eq!(through(11, 100, 2, 100), (12, false));
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_kill() {
    let (ledger, folder) = filled(&["a"], 3).await;
    settle(&ledger, vec![settlement(1, "a", 2, 1)]).await;
    let after = snapshot(&folder);
    let found = Ledger::open(after.path()).expect("opened");
    assert_eq!((found.head(), found.intake_cursor(), found.documents().expect("a count")), (3, 1, 3));
    assert_eq!(found.document(&id("d2")).expect("read").expect("there").1, document("d2", "a", "text 2"));
    assert_eq!(found.examples_in(&domain("a")).expect("a count"), 2);
}

#[tokio::test]
async fn what_was_not_committed_is_not_there() {
    let (ledger, folder) = filled(&["a"], 1).await;
    let outcome = ledger.shared.transact(|tables| {
        tables.documents.insert(2, tables::frame(&document("d2", "a", "lost"))?.as_slice())?;
        Err::<(), _>(LedgerError::Row("on purpose".into()))
    });
    assert!(outcome.is_err());
    {
        let database = ledger.shared.database.read().expect("not poisoned");
        let write = database.begin_write().expect("begun");
        let mut tables = Tables::open(&write).expect("opened");
        let row = tables::frame(&document("d3", "a", "lost")).expect("framed");
        tables.documents.insert(3, row.as_slice()).expect("inserted");
    }
    assert_eq!(
        ledger.append(vec![document("d2", "a", "kept")]).await,
        Ok(vec![Appended::New { ordinal: 2 }])
    );
    drop(ledger);
    let ledger = Ledger::open(folder.path()).expect("opened");
    assert_eq!((ledger.head(), ledger.next_accepted(0, 10).expect("read").len()), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_same_document_a_hundred_times_at_once_has_one_ordinal() {
    let (ledger, _folder) = open();
    let ledger = Arc::new(ledger);
    let mut calls = Vec::new();
    for _ in 0..100 {
        let ledger = Arc::clone(&ledger);
        calls.push(std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(ledger.append(vec![document("d", "a", "same")])).expect("appended")[0]
        }));
    }
    let outcomes: Vec<Appended> = calls.into_iter().map(|call| call.join().expect("joined")).collect();
    assert_eq!(outcomes.iter().filter(|one| **one == Appended::New { ordinal: 1 }).count(), 1);
    assert_eq!(outcomes.iter().filter(|one| **one == Appended::Same { ordinal: 1 }).count(), 99);
    assert_eq!((ledger.head(), ledger.documents().expect("a count")), (1, 1));
}

#[tokio::test]
async fn a_call_with_a_conflict_writes_nothing() {
    let (ledger, _folder) = filled(&["a"], 1).await;
    let call = vec![document("new", "a", "x"), document("d1", "a", "other"), document("d1", "a", "text 1")];
    let outcome = ledger.append(call).await.expect("answered");
    assert_eq!(outcome, [Appended::NotWritten, Appended::Conflict, Appended::Conflict]);
    let within = vec![document("e", "a", "x"), document("e", "a", "y")];
    let outcome = ledger.append(within).await.expect("answered");
    assert_eq!(outcome, [Appended::NotWritten, Appended::Conflict]);
    assert_eq!((ledger.head(), ledger.documents().expect("a count")), (1, 1));
    let twins = vec![document("e", "a", "x"), document("e", "a", "x"), document("d1", "a", "text 1")];
    let same = [Appended::New { ordinal: 2 }, Appended::Same { ordinal: 2 }, Appended::Same { ordinal: 1 }];
    assert_eq!(ledger.append(twins).await.expect("answered"), same);
}

#[tokio::test]
async fn settling_twice_or_out_of_order_counts_once() {
    let (ledger, _folder) = filled(&["a"], 3).await;
    settle(&ledger, vec![settlement(2, "a", 1, 0)]).await;
    assert_eq!(ledger.intake_cursor(), 0);
    settle(&ledger, vec![settlement(1, "a", 2, 1), settlement(2, "a", 5, 0)]).await;
    assert_eq!(ledger.intake_cursor(), 2);
    settle(&ledger, vec![settlement(3, "a", 0, 0), settlement(9, "a", 1, 0)]).await;
    assert_eq!(ledger.intake_cursor(), 3);
    let counts = ledger.counts().expect("counts")[&domain("a")];
    let expected = DomainCounts { documents: 3, kept: 2, refused: 1, examples: 3, held_out: 1 };
    assert_eq!(counts, expected);
    let events = |ordinal| ledger.trail(ordinal).expect("a trail").entries.into_iter().map(|e| e.event);
    assert_eq!(events(1).collect::<Vec<_>>(), ["accepted", "kept"]);
    assert_eq!(events(3).collect::<Vec<_>>(), ["accepted", "refused"]);
}

#[tokio::test]
async fn a_window_holds_whole_documents_in_order() {
    let (ledger, _folder) = filled(&["a", "b"], 6).await;
    let judged =
        (1..=5).map(|n| settlement(n, if n % 2 == 1 { "a" } else { "b" }, if n == 3 { 0 } else { 2 }, 1));
    settle(&ledger, judged.collect()).await;
    let a = domain("a");
    let window = ledger.fresh(Some(&a), 0, room(100, 100)).expect("a window");
    assert_eq!((window.documents, window.through), (2, 5));
    assert_eq!(window.examples.iter().map(|e| e.id.ordinal).collect::<Vec<_>>(), [1, 5]);
    assert_eq!(window.held_out.len(), 2);
    let all = ledger.fresh(None, 1, room(100, 100)).expect("a window");
    assert_eq!(all.examples.iter().map(|e| e.id.ordinal).collect::<Vec<_>>(), [2, 4, 5]);
    // A document that is larger than the window still comes, alone and whole.
    let small = ledger.fresh(None, 0, room(0, 100)).expect("a window");
    assert_eq!((small.documents, small.through, small.examples.len()), (1, 1, 1));
    assert_eq!(ledger.fresh(None, 0, room(100, 2)).expect("a window").through, 2);
    let waiting = [0, 1, 2, 5].map(|after| ledger.waiting(&a, after).expect("a count"));
    assert_eq!(waiting, [2, 1, 1, 0], "1 and 5: 3 was refused");
    assert!(small.full && !all.full, "a further one did not fit");
    let none = ledger.fresh(Some(&a), 5, room(100, 100)).expect("a window");
    assert_eq!(none, FreshWindow { through: 5, ..FreshWindow::default() });
}

#[tokio::test]
async fn the_domain_with_the_oldest_document_is_next() {
    let (ledger, _folder) = filled(&["a", "b"], 4).await;
    let cursors = |a, b| BTreeMap::from([(domain("a"), a), (domain("b"), b)]);
    assert_eq!(ledger.oldest_waiting(&BTreeMap::new()), Ok(None));
    settle(&ledger, vec![settlement(1, "a", 0, 0), settlement(2, "b", 1, 0), settlement(3, "a", 1, 0)]).await;
    assert_eq!(ledger.oldest_waiting(&BTreeMap::new()), Ok(Some((domain("b"), 2))));
    assert_eq!(ledger.oldest_waiting(&cursors(0, 2)), Ok(Some((domain("a"), 3))));
    assert_eq!(ledger.oldest_waiting(&cursors(3, 2)), Ok(None));
}

#[tokio::test]
async fn documents_are_listed_newest_first_and_found_between() {
    let (ledger, _folder) = filled(&["a", "b"], 6).await;
    let listed = |name: Option<&Domain>, limit, before| -> Vec<u64> {
        ledger
            .list(name, limit, before, |_| true)
            .expect("listed")
            .into_iter()
            .map(|one| one.ordinal)
            .collect()
    };
    assert_eq!(listed(None, 3, None), [6, 5, 4]);
    assert_eq!(listed(None, 3, Some(4)), [3, 2, 1]);
    assert_eq!(listed(Some(&domain("a")), 2, Some(5)), [3, 1]);
    let between = ledger.documents_between(Some(&domain("b")), 2, 6).expect("found");
    assert_eq!(between.iter().map(|(ordinal, _)| *ordinal).collect::<Vec<_>>(), [4, 6]);
    assert_eq!(ledger.documents_between(None, 2, 4).expect("found").len(), 2);
    assert!(ledger.documents_between(None, 4, 4).expect("found").is_empty());
}

#[tokio::test]
async fn a_trail_says_nothing_twice_and_has_an_end() {
    let (ledger, _folder) = filled(&["a"], 1).await;
    let entry =
        |event: &str, n: u64| TrailEntry { event: event.into(), at_ms: n, detail: Some(n.to_string()) };
    ledger
        .record(vec![(1, entry("live", 1)), (1, entry("live", 1)), (77, entry("live", 1))])
        .await
        .expect("recorded");
    assert_eq!(ledger.trail(1).expect("a trail").entries.len(), 2);
    ledger.record((0..500).map(|n| (1, entry("learned", n))).collect()).await.expect("recorded");
    let entries = ledger.trail(1).expect("a trail").entries;
    assert_eq!((entries.len(), entries.last().map(|e| e.at_ms)), (64, Some(499)));
    assert!(ledger.trail(77).expect("a trail").entries.is_empty());
}

fn holds(folder: &TempDir, text: &str) -> bool {
    let bytes = fs::read(folder.path().join("ledger.redb")).expect("read");
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn what_is_forgotten_is_in_no_page() {
    let (ledger, folder) = filled(&["a"], 50).await;
    let planted = "PLANTED-7f3a-in-a-text";
    ledger.append(vec![document("secret-id-81", "a", planted)]).await.expect("appended");
    settle(&ledger, (1..=51).map(|n| settlement(n, "a", 1, 0)).collect()).await;
    assert!(holds(&folder, planted));
    ledger.forget(&id("secret-id-81")).expect("forgotten");
    ledger.rewrite().expect("rewritten");
    assert!(!holds(&folder, planted) && !holds(&folder, "secret-id-81"));
    assert_eq!((ledger.forgotten(), ledger.intake_cursor(), ledger.head()), (1, 51, 51));
    assert_eq!(ledger.document(&id("secret-id-81")), Ok(None));
    // All else is as it was, also for the next process; and the ordinal is not given out again.
    let back = ledger.append(vec![document("secret-id-81", "a", "new")]).await;
    assert_eq!(back, Ok(vec![Appended::New { ordinal: 52 }]));
    drop(ledger);
    let ledger = Ledger::open(folder.path()).expect("opened");
    assert_eq!((ledger.documents().expect("a count"), ledger.forgotten()), (51, 1));
    assert_eq!(ledger.fresh(None, 0, room(1000, 1000)).expect("a window").documents, 50);
}

#[tokio::test]
async fn forgetting_what_is_on_its_way_leaves_no_trace_and_no_gap() {
    let (ledger, _folder) = filled(&["a"], 2).await;
    settle(&ledger, vec![settlement(1, "a", 1, 0)]).await;
    ledger.forget(&id("d2")).expect("forgotten");
    assert_eq!(ledger.intake_cursor(), 2);
    settle(&ledger, vec![settlement(2, "a", 3, 0)]).await;
    assert_eq!((ledger.examples_in(&domain("a")), ledger.verdict(2)), (Ok(1), Ok(None)));
}

#[tokio::test]
async fn what_derives_from_a_document_is_forgotten_with_it() {
    let (ledger, folder) = filled(&["a"], 2).await;
    let child = |name: &str, parent: &str| Document {
        derived_from: Some(parent.to_owned()),
        ..document(name, "b", &format!("PLANTED from {parent}"))
    };
    // A grandchild, one of another parent, one of a file, and two that say they are of each other.
    let derived = [("c1", "d1"), ("c2", "c1"), ("c3", "d2"), ("c4", "notes.md"), ("c5", "c6"), ("c6", "c5")];
    let derived = derived.map(|(name, parent)| child(name, parent));
    ledger.append(derived.into()).await.expect("appended");
    settle(&ledger, (1..=8).map(|n| settlement(n, if n > 2 { "b" } else { "a" }, 1, 0)).collect()).await;

    let names = |removed: Vec<(u64, Document)>| -> Vec<String> {
        removed.into_iter().map(|(_, document)| document.id.into()).collect()
    };
    assert_eq!(names(ledger.forget(&id("d1")).expect("forgotten")), ["d1", "c1", "c2"]);
    assert_eq!(names(ledger.forget(&id("c6")).expect("forgotten")), ["c6", "c5"]);
    assert_eq!(names(ledger.forget(&id("d1")).expect("nothing")), Vec::<String>::new());
    ledger.rewrite().expect("rewritten");
    assert!(!holds(&folder, "PLANTED from d1") && !holds(&folder, "PLANTED from c"));
    // Another process still knows whose children the rest are.
    drop(ledger);
    let ledger = Ledger::open(folder.path()).expect("opened");
    assert_eq!((ledger.documents(), ledger.forgotten()), (Ok(3), 5));
    assert_eq!(names(ledger.forget(&id("d2")).expect("forgotten")), ["d2", "c3"]);
    let left = ledger.document(&id("c4")).expect("read").expect("there").1;
    assert_eq!(left.derived_from.as_deref(), Some("notes.md"));
}

#[tokio::test]
async fn documents_from_before_they_said_what_they_derive_from_are_read() {
    let (ledger, _folder) = filled(&["a"], 1).await;
    let old = document("d1", "a", "text 1");
    // Fields in order are all that a row holds, so a tuple of them is the row of that time.
    let row = (&old.id, &old.domain, &old.content, old.importance, &old.source, old.submitted_ms);
    let row = tables::frame(&row).expect("a row");
    let written =
        ledger.shared.transact(|tables| Ok(tables.documents.insert(1, row.as_slice()).map(drop)?));
    written.expect("written");
    assert_eq!(ledger.document(&id("d1")), Ok(Some((1, old.clone()))));
    assert_eq!(ledger.list(None, 10, None, |_| true).expect("a list")[0].document, old);
    assert_eq!(ledger.forget(&id("d1")), Ok(vec![(1, old)]));
}

#[tokio::test]
async fn what_was_withdrawn_can_come_again() {
    let (ledger, _folder) = filled(&["a"], 3).await;
    settle(&ledger, (1..=3).map(|n| settlement(n, "a", if n == 3 { 0 } else { 2 }, 0)).collect()).await;
    assert_eq!(ledger.withdraw(Some(&domain("a")), 1, 3), Ok(vec![2]));
    assert_eq!(ledger.withdraw(None, 0, 3), Ok(vec![1]));
    assert_eq!((ledger.forgotten(), ledger.signatures()), (2, Ok(vec![])));
    assert_eq!(ledger.fresh(None, 0, room(100, 100)).expect("a window").documents, 0);
    let again = vec![document("d2", "a", "text 2"), document("d3", "a", "text 3")];
    let outcome = [Appended::New { ordinal: 4 }, Appended::Same { ordinal: 3 }];
    assert_eq!(ledger.append(again).await.expect("appended"), outcome);
    assert_eq!((ledger.intake_cursor(), ledger.documents()), (3, Ok(3)));
    let events: Vec<String> =
        ledger.trail(4).expect("a trail").entries.into_iter().map(|e| e.event).collect();
    assert_eq!(events, ["accepted", "kept", "accepted"]);
}

#[tokio::test]
async fn what_was_put_aside_moves_when_it_is_asked_to() {
    let (ledger, _folder) = filled(&["a"], 2).await;
    settle(&ledger, (1..=2).map(|n| settlement(n, "a", 1, 0)).collect()).await;
    let again = BTreeSet::from([id("d1")]);
    let both = vec![document("d1", "a", "text 1"), document("d2", "a", "text 2")];
    let outcome = ledger.append_again(both, again.clone()).await.expect("appended");
    assert_eq!(outcome, [Appended::New { ordinal: 3 }, Appended::Same { ordinal: 2 }]);
    assert_eq!(ledger.document(&id("d1")).expect("read").map(|(ordinal, _)| ordinal), Some(3));
    let other = ledger.append_again(vec![document("d1", "a", "other")], again).await;
    assert_eq!(other, Ok(vec![Appended::Conflict]));
}

#[tokio::test]
async fn another_encoding_cuts_everything_anew() {
    let (ledger, _folder) = filled(&["a"], 3).await;
    assert_eq!(ledger.encode_as("one"), Ok(false));
    settle(&ledger, (1..=3).map(|n| settlement(n, "a", 2, 0)).collect()).await;
    ledger.withdraw(None, 2, 3).expect("withdrawn");
    assert_eq!(ledger.encode_as("one"), Ok(false));
    assert_eq!((ledger.intake_cursor(), ledger.examples_in(&domain("a"))), (3, Ok(4)));
    assert_eq!(ledger.encode_as("two"), Ok(true));
    assert_eq!((ledger.intake_cursor(), ledger.examples_in(&domain("a"))), (0, Ok(0)));
    settle(&ledger, (1..=2).map(|n| settlement(n, "a", 1, 0)).collect()).await;
    assert_eq!((ledger.intake_cursor(), ledger.examples_in(&domain("a"))), (3, Ok(2)));
}

#[tokio::test]
async fn after_a_failed_commit_nothing_is_taken_any_more() {
    let (ledger, _folder) = filled(&["a"], 1).await;
    ledger.shared.fail("on purpose");
    ledger.failed().await;
    let refused = Err(LedgerError::Failed);
    assert_eq!(ledger.append(vec![document("d2", "a", "x")]).await, refused);
    assert_eq!(ledger.record(Vec::new()).await, Err(LedgerError::Failed));
    assert_eq!(ledger.forget(&id("d1")), Err(LedgerError::Failed));
    assert_eq!(ledger.document(&id("d1")).expect("still read").map(|(ordinal, _)| ordinal), Some(1));
}

#[tokio::test]
async fn a_ledger_in_use_says_so() {
    let (_ledger, folder) = open();
    let held = LedgerError::Held(folder.path().join("ledger.redb"));
    assert_eq!(Ledger::open(folder.path()).err(), Some(held));
}

#[tokio::test]
async fn damage_is_refused_or_harmless_and_never_a_panic() {
    let (ledger, folder) = filled(&["a"], 40).await;
    settle(&ledger, (1..=40).map(|n| settlement(n, "a", 2, 0)).collect()).await;
    drop(ledger);
    let whole = fs::read(folder.path().join("ledger.redb")).expect("read");
    let mut refused = 0;
    for flip in 0..200 {
        let damaged = tempfile::tempdir().expect("a folder");
        let mut bytes = whole.clone();
        let at = (flip * 7919 * 131) % bytes.len();
        bytes[at] ^= 1 << (flip % 8);
        fs::write(damaged.path().join("ledger.redb"), bytes).expect("written");
        let Ok(found) = Ledger::open(damaged.path()) else {
            refused += 1;
            continue;
        };
        // It opened, so the flip was in a page that holds nothing.
        assert_eq!((found.head(), found.intake_cursor()), (40, 40), "flip at {at}");
        for accepted in found.next_accepted(0, 100).expect("read") {
            assert_eq!(accepted.document.content, Content::Text(format!("text {}", accepted.ordinal)));
        }
        assert_eq!(found.fresh(None, 0, room(100, 100)).expect("a window").examples.len(), 80);
    }
    assert!(refused > 0, "none of the flips hit a page in use");
}

#[tokio::test]
async fn waiting_ends_with_the_next_document() {
    let (ledger, _folder) = open();
    let append = async {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        ledger.append(vec![document("d1", "a", "x")]).await.expect("appended");
        settle(&ledger, vec![settlement(1, "a", 1, 0)]).await;
    };
    tokio::join!(ledger.wait_for_append(0), ledger.wait_for_settled(), append);
    ledger.wait_for_append(0).await;
}

/// Not a test of correctness: prints what a commit costs. Run it with `--run-ignored`.
#[tokio::test]
#[ignore = "measures"]
async fn throughput_of_appends() {
    let (ledger, _folder) = open();
    let text = "x".repeat(1000);
    let started = std::time::Instant::now();
    for n in 0..300 {
        ledger.append(vec![document(&format!("single-{n}"), "a", &text)]).await.expect("appended");
    }
    let single = 300.0 / started.elapsed().as_secs_f64();
    let started = std::time::Instant::now();
    let caller = |caller: u64| {
        let (ledger, text) = (&ledger, &text);
        async move {
            for n in 0..100 {
                let name = format!("many-{caller}-{n}");
                ledger.append(vec![document(&name, "a", text)]).await.expect("appended");
            }
        }
    };
    futures_util::future::join_all((0..64).map(caller)).await;
    let many = 6400.0 / started.elapsed().as_secs_f64();
    println!("{single:.0} documents/s from one caller, {many:.0} documents/s from 64");
}
