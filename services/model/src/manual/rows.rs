//! The memory of tensors as rows of numbers, shared out among the threads that libtorch computes with.

use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use half::bf16;
use tch::{Device, Kind, Tensor};

use super::kernels::Real;
use super::tiles::View;
use crate::cpu::team::{self, take_pieces};
use crate::device::openmp;

/// A format together with libtorch's name of it.
pub(super) trait Element: Real {
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// The rows of a contiguous tensor on the CPU.
pub(super) struct Rows<W> {
    start: *mut W,
    width: usize,
    count: usize,
    /// Keeps the memory.
    _tensor: Tensor,
}

// SAFETY: threads get parts of it, and whoever writes promises that nobody else has the same part at the same time, to read or to
// write: see `columns_mut`.
#[allow(unsafe_code)]
unsafe impl<W: Sync> Sync for Rows<W> {}

impl<W: Element> Rows<W> {
    /// Rows of `width` numbers.
    pub fn of(tensor: &Tensor, width: i64) -> Result<Self> {
        let fits = tensor.device() == Device::Cpu && tensor.f_kind()? == W::KIND && tensor.is_contiguous();
        ensure!(
            fits,
            "a part of a training step got a tensor that is not {:?} in one piece on the CPU",
            W::KIND
        );
        let (width, numbers) = (width as usize, tensor.numel());
        ensure!(width > 0 && numbers.is_multiple_of(width), "{numbers} numbers are no rows of {width}");
        let start = tensor.data_ptr().cast();
        Ok(Self { start, width, count: numbers / width, _tensor: tensor.shallow_clone() })
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// One row, to read.
    pub fn get(&self, row: usize) -> &[W] {
        assert!(row < self.count);
        // SAFETY: the row lies within the tensor's memory, which lives as long as this; whoever writes it has it alone.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.start.wrapping_add(row * self.width), self.width)
        }
    }

    /// Rows one after the other, to read.
    pub fn some(&self, first: usize, count: usize) -> &[W] {
        assert!(first + count <= self.count);
        // SAFETY: as for `get`.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.start.wrapping_add(first * self.width), count * self.width)
        }
    }

    /// One row, to write.
    ///
    /// # Safety
    /// Nobody else may have the same row at the same time, through this or another view of the same tensor.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self, row: usize) -> &mut [W] {
        // SAFETY: as the caller promises.
        unsafe { self.columns_mut(row, 0, self.width) }
    }

    /// Some columns of one row, to write.
    ///
    /// # Safety
    /// Nobody else may have the same columns of the row at the same time.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn columns_mut(&self, row: usize, first: usize, count: usize) -> &mut [W] {
        assert!(row < self.count && first + count <= self.width);
        // SAFETY: as for `get`; that nobody else has them is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.wrapping_add(row * self.width + first), count) }
    }
}

impl Rows<f32> {
    /// All of it, to read.
    pub fn view(&self) -> View<'_> {
        View { numbers: self.some(0, self.count), width: self.width }
    }
}

/// Does `work` with each number below `count`, some at a time, on as many threads as compute on behalf of the calling one: on libtorch's
/// own where it works beside us and those are OpenMP's, since they wait for their next work without sleeping and others would have to
/// share the cores with them; otherwise on a team's ([`team::each`]).
pub(super) fn each(count: usize, work: impl Fn(usize) + Sync) {
    each_in(CHUNK, count, &work);
}

/// The same one at a time: for work that takes longer than a thread's look at the counter.
pub(super) fn each_alone(count: usize, work: impl Fn(usize) + Sync) {
    each_in(1, count, &work);
}

/// Rows that are taken at a time: no thread should wait for the counter of another at each.
const CHUNK: usize = 8;

fn each_in(chunk: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
    let chunks = count.div_ceil(chunk);
    let work = |i: usize| (i * chunk..count.min((i + 1) * chunk)).for_each(work);
    match parallel() {
        Some(parallel) if chunks > 1 && !team::is_alone() => {
            let task = Task {
                next: AtomicUsize::new(0),
                count: chunks,
                work: &work,
                panicked: AtomicBool::new(false),
            };
            // SAFETY: libgomp's own entry: it calls `run` with this pointer on its threads, and returns when all have. The
            // task outlives the call, and is `Sync`.
            #[allow(unsafe_code)]
            unsafe {
                parallel(run, std::ptr::from_ref(&task).cast_mut().cast(), 0, 0);
            }
            assert!(!task.panicked.load(Ordering::Relaxed), "a part of a training step panicked");
        }
        _ => team::each(chunks, &work),
    }
}

thread_local! {
    /// Kept from one row to the next, which needs as much as often as not.
    static ROOM: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends `work` so many numbers, whatever they are.
pub(super) fn with_room<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    ROOM.with_borrow_mut(|room| {
        if room.len() < len {
            room.resize(len, 0.0);
        }
        work(&mut room[..len])
    })
}

struct Task<'a> {
    next: AtomicUsize,
    count: usize,
    work: &'a (dyn Fn(usize) + Sync),
    panicked: AtomicBool,
}

/// One thread's part. A panic must not leave it: libgomp is no Rust.
extern "C" fn run(task: *mut c_void) {
    // SAFETY: `each` gives a pointer to a task that lives until all threads have returned.
    #[allow(unsafe_code)]
    let task = unsafe { &*task.cast::<Task<'_>>() };
    if catch_unwind(AssertUnwindSafe(|| take_pieces(&task.next, task.count, task.work))).is_err() {
        task.panicked.store(true, Ordering::Relaxed);
    }
}

/// The function that starts a parallel region in the OpenMP that libtorch brings on Linux, if this process has it.
fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
    // SAFETY: of this name and type since GCC 4.9, and part of its stable interface.
    #[allow(unsafe_code)]
    *FOUND.get_or_init(|| unsafe { openmp(b"GOMP_parallel\0") })
}

type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, u32, u32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::team::Alone;

    #[test]
    fn each_number_is_worked_on_once_whoever_helps() {
        assert!(cfg!(not(target_os = "linux")) || parallel().is_some());
        for alone in [false, true] {
            let _alone = alone.then(Alone::begin);
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..20 {
                each(counts.len(), |i| {
                    counts[i].fetch_add(i, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().enumerate().all(|(i, count)| count.load(Ordering::Relaxed) == 20 * i));
        }
    }

    #[test]
    fn a_panic_is_the_callers_too() {
        for alone in [false, true] {
            let _alone = alone.then(Alone::begin);
            let result = catch_unwind(|| each(100, |i| assert!(i != 57)));
            assert!(result.is_err());
        }
    }

    #[test]
    fn only_what_lies_in_one_piece_has_rows() {
        let tensor = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([3, 2]);
        assert_eq!(Rows::<f32>::of(&tensor, 2).unwrap().get(2), [5.0, 6.0]);
        assert!(Rows::<f32>::of(&tensor.tr(), 3).is_err());
        assert!(Rows::<bf16>::of(&tensor, 2).is_err() && Rows::<f32>::of(&tensor, 4).is_err());
    }
}
