//! Threads that share the work of one pass through a model, forward or back.
//!
//! A pass has hundreds of parts of some microseconds each, too short to start threads for, or to wake them. So the
//! helpers stay awake for a moment after each part, and sleep when none follows. A helper that is late, or has
//! lost its processor to somebody else, is not waited for: it finds the part done.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::hint::spin_loop;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::device::set_own_threads;

/// How long a helper waits for the next part before it sleeps.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks for work between two looks at the clock, which also let others have the processor.
const SPINS: u32 = 256;

/// Set in the state while helpers may join. Below it is how many did, above it the number of the part.
const OPEN: u64 = 1 << 31;
const NUMBER: u32 = 32;

type Work<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    state: AtomicU64,
    /// The work of the open part, and how many pieces it has. Written while nobody has joined.
    work: UnsafeCell<Option<(&'static Work<'static>, usize)>>,
    /// The next piece that nobody has taken.
    next: AtomicUsize,
    sleeping: AtomicUsize,
    panicked: AtomicBool,
    ended: AtomicBool,
}

// SAFETY: `work` is written by the leader alone, and only while the state has no helper and is not open; it is
// read only by helpers that joined an open state. Both sides synchronise on the state.
#[allow(unsafe_code)]
unsafe impl Sync for Shared {}
// SAFETY: as above; what it points to is `Sync`.
#[allow(unsafe_code)]
unsafe impl Send for Shared {}

/// A leader, the thread that owns this, and its helpers.
pub(crate) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `threads`, the caller's own included. When helpers cannot be started it is smaller.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let start = |_| {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("helper".into()).spawn(move || help(&shared)).ok()
        };
        let helpers = (1..threads).map_while(start).collect();
        Self { shared, helpers }
    }

    /// How many threads work, the leader included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Does `work(i)` for each i below `count`, in any order, on any of the threads.
    ///
    /// # Panics
    /// When `work` does.
    pub fn each(&mut self, count: usize, work: &Work<'_>) {
        if count <= 1 || self.helpers.is_empty() {
            return (0..count).for_each(work);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `Closing` below ends the part before this function returns, whether
        // or not `work` panics here: from then on no helper holds the reference.
        #[allow(unsafe_code)]
        let erased = unsafe { std::mem::transmute::<&Work<'_>, &'static Work<'static>>(work) };
        // SAFETY: the last part was closed and left by all helpers, so nobody looks.
        #[allow(unsafe_code)]
        unsafe {
            *shared.work.get() = Some((erased, count));
        }
        shared.next.store(0, Ordering::Relaxed);
        shared.panicked.store(false, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> NUMBER).wrapping_add(1);
        let closing = Closing(shared);
        shared.state.store(number << NUMBER | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.helpers.iter().for_each(|helper| helper.thread().unpark());
        }
        take_pieces(&shared.next, count, work);
        drop(closing);
        assert!(!self.shared.panicked.load(Ordering::Relaxed), "a helper panicked");
    }

    /// Cuts `out` into pieces of `unit`, and fills each by its number.
    pub fn parts<T: Send>(&mut self, out: &mut [T], unit: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        let (all, len) = (Pointer(out.as_mut_ptr()), out.len());
        self.each(len.div_ceil(unit.max(1)), &|i| {
            let (start, end) = (i * unit, len.min((i + 1) * unit));
            // SAFETY: each piece is given out once, pieces do not overlap, and `out` is borrowed until all are done.
            #[allow(unsafe_code)]
            work(i, unsafe { std::slice::from_raw_parts_mut(all.at(start), end - start) });
        });
    }

    /// Cuts the rows of `out`, each `width` long, into bands of `band` columns, and fills each.
    pub fn bands(&mut self, out: &mut [f32], width: usize, band: usize, work: impl Fn(&mut Band<'_>) + Sync) {
        let rows = out.len() / width.max(1);
        let all = Pointer(out.as_mut_ptr());
        self.each(width.div_ceil(band), &|i| {
            let first = i * band;
            let count = band.min(width - first);
            work(&mut Band { all: &all, rows, width, first, count });
        });
    }
}

/// The same columns of all rows of a matrix; nobody else has them.
pub(crate) struct Band<'a> {
    all: &'a Pointer<f32>,
    rows: usize,
    width: usize,
    /// Its first column.
    pub first: usize,
    /// How many columns it has.
    pub count: usize,
}

impl Band<'_> {
    /// How many rows it has.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its part of a row.
    #[inline]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: row and columns lie within the matrix, which is borrowed as long as bands live; bands do not
        // overlap, each exists once, and `self` is borrowed as long as the slice is.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.all.at(row * self.width + self.first), self.count)
        }
    }
}

struct Pointer<T>(*mut T);

impl<T> Pointer<T> {
    #[inline]
    fn at(&self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: it is only ever used to give each thread its own part of what it points to.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Pointer<T> {}

/// Ends a part: nobody joins any more, and those who did are waited for.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spins = 0u32;
        while self.0.state.load(Ordering::Acquire) & (OPEN - 1) > 0 {
            spin_loop();
            spins += 1;
            if spins.is_multiple_of(4 * SPINS) {
                thread::yield_now();
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // Its panics were caught.
            let _ = helper.join();
        }
    }
}

/// Takes pieces that nobody has taken, until there are none.
pub(crate) fn take_pieces(next: &AtomicUsize, count: usize, work: &Work<'_>) {
    loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        if i >= count {
            return;
        }
        work(i);
    }
}

thread_local! {
    /// A thread's own team, and for how many threads it was made.
    static OWN: RefCell<Option<(usize, Team)>> = const { RefCell::new(None) };
    /// How many threads compute on behalf of this one while it is alone.
    static ALONE: Cell<Option<usize>> = const { Cell::new(None) };
    /// Whether this thread is somebody's helper.
    static HELPS: Cell<bool> = const { Cell::new(false) };
}

/// While this lives, libtorch has no thread but the calling one, and [`each`] as many as libtorch had: for work of which libtorch does
/// little. Its own threads either wait for their next work without sleeping, for milliseconds, which takes the cores from answers; or they
/// sleep at once, and waking them hundreds of times a step costs a fifth of it.
pub(crate) struct Alone(PhantomData<*const ()>);

impl Alone {
    /// Begins it; within another there is nothing to begin, and nothing ends with it.
    pub fn begin() -> Option<Self> {
        if is_alone() {
            return None;
        }
        ALONE.set(Some(threads()));
        set_own_threads(1);
        Some(Self(PhantomData))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if let Some(threads) = ALONE.take() {
            set_own_threads(threads);
        }
    }
}

/// Whether libtorch has no thread but this one.
pub(crate) fn is_alone() -> bool {
    ALONE.get().is_some()
}

/// How many threads compute on behalf of the calling one.
pub(crate) fn threads() -> usize {
    ALONE.get().unwrap_or_else(|| tch::get_num_threads().max(1) as usize)
}

/// Does `work(i)` for each i below `count` on the calling thread and helpers of its own. Work within such work is done by the one
/// thread that asks for it.
///
/// # Panics
/// When `work` does.
pub(crate) fn each(count: usize, work: &Work<'_>) {
    OWN.with(|own| match own.try_borrow_mut() {
        Ok(mut own) if count > 1 && !HELPS.get() => {
            let threads = threads();
            if own.as_ref().is_none_or(|(of, _)| *of != threads) {
                *own = Some((threads, Team::new(threads)));
            }
            if let Some((_, team)) = own.as_mut() {
                team.each(count, work);
            }
        }
        _ => (0..count).for_each(work),
    });
}

/// What a helper does all its life.
fn help(shared: &Shared) {
    HELPS.set(true);
    let mut done = 0;
    while let Some(state) = next_part(shared, done) {
        let joined =
            shared.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if !joined {
            continue;
        }
        done = state >> NUMBER;
        // SAFETY: this thread has joined the open part, so the leader neither writes here nor goes on before it
        // has left.
        #[allow(unsafe_code)]
        let work = unsafe { *shared.work.get() };
        if let Some((work, count)) = work
            && catch_unwind(AssertUnwindSafe(|| take_pieces(&shared.next, count, work))).is_err()
        {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.state.fetch_sub(1, Ordering::Release);
    }
}

/// Waits for an open part other than number `done`; none when the team ends.
fn next_part(shared: &Shared, done: u64) -> Option<u64> {
    let open = || {
        let state = shared.state.load(Ordering::SeqCst);
        (state & OPEN > 0 && state >> NUMBER != done).then_some(state)
    };
    loop {
        let since = Instant::now();
        while since.elapsed() < AWAKE {
            for _ in 0..SPINS {
                if let Some(state) = open() {
                    return Some(state);
                }
                spin_loop();
            }
            thread::yield_now();
        }
        // The leader looks at `sleeping` after it has opened a part, and this looks for one after it has said
        // that it sleeps: one of the two sees the other.
        shared.sleeping.fetch_add(1, Ordering::SeqCst);
        while open().is_none() && !shared.ended.load(Ordering::SeqCst) {
            thread::park();
        }
        shared.sleeping.fetch_sub(1, Ordering::SeqCst);
        if shared.ended.load(Ordering::SeqCst) {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_is_done_once_whether_helpers_are_awake_or_asleep() {
        let mut team = Team::new(3);
        for round in 0..200 {
            let mut counts = vec![0u32; 1000];
            team.parts(&mut counts, 7, |i, part| part.iter_mut().for_each(|n| *n += 1 + i as u32));
            assert!(counts.iter().enumerate().all(|(at, &n)| n as usize == 1 + at / 7));
            if round % 50 == 0 {
                thread::sleep(2 * AWAKE);
            }
        }
    }

    #[test]
    fn bands_cover_a_matrix() {
        let mut matrix = vec![0.0; 3 * 50];
        Team::new(2).bands(&mut matrix, 50, 16, |band| {
            for row in 0..band.rows() {
                let first = band.first;
                band.row(row).iter_mut().enumerate().for_each(|(i, x)| *x = (100 * row + first + i) as f32);
            }
        });
        assert!(matrix.iter().enumerate().all(|(at, &x)| x as usize == at / 50 * 100 + at % 50));
    }

    #[test]
    fn a_panic_is_the_leaders_too_and_the_team_goes_on() {
        let mut team = Team::new(2);
        for _ in 0..20 {
            let panics = catch_unwind(AssertUnwindSafe(|| {
                team.each(100, &|i| assert!(i < 50, "injected"));
            }));
            assert!(panics.is_err());
            let sum = AtomicUsize::new(0);
            team.each(100, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 99 * 50);
        }
    }

    #[test]
    fn work_within_work_is_done_too() {
        let sum = AtomicUsize::new(0);
        let add = |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        };
        each(50, &|_| each(20, &add));
        assert_eq!(sum.into_inner(), 50 * 19 * 10);
    }

    #[test]
    fn who_is_alone_has_all_threads_and_libtorch_one_until_it_ends() {
        tch::set_num_threads(3);
        let alone = Alone::begin();
        assert!(alone.is_some() && Alone::begin().is_none(), "the inner one ends nothing");
        let of_libtorch = if cfg!(target_os = "linux") { 1 } else { 3 };
        assert_eq!((is_alone(), threads(), tch::get_num_threads()), (true, 3, of_libtorch));
        let another = thread::spawn(|| (is_alone(), threads())).join();
        assert_eq!(another.expect("ended"), (false, 3), "one that starts meanwhile");
        drop(alone);
        assert_eq!((is_alone(), threads(), tch::get_num_threads()), (false, 3, 3));
    }
}
