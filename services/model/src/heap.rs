//! The C library's heap while a base learns on the CPU.
//!
//! A step takes some hundred megabytes in pieces and frees all of them. glibc gives them back to the system at once, and has each page
//! cleared when the next step asks for it again: a tenth of a step's time. So what is freed is kept as long as there is a learner,
//! and given back when the last one ends.

use std::sync::{Mutex, PoisonError};

/// While there is one of these, freed memory stays with the process.
pub(crate) struct Kept(());

/// How many there are.
static HOLDERS: Mutex<usize> = Mutex::new(0);

impl Kept {
    pub fn new() -> Self {
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        *holders += 1;
        if *holders == 1 {
            keep();
        }
        Self(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        *holders -= 1;
        if *holders == 0 {
            give_back();
        }
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep() {
    set(1 << 30, 1 << 30, 64 << 20);
}

/// With what glibc comes to by itself when such pieces have been freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    set(32 << 20, 64 << 20, 128 << 10);
    // SAFETY: it gives back what is free, and nothing else.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// From how many bytes on a piece has pages of its own, how many free ones at the end of the heap are given back, and how many are
/// asked for beyond what is needed, by which the heaps of other threads than the first are kept too.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set(own_pages: libc::c_int, free: libc::c_int, beyond: libc::c_int) {
    // SAFETY: other threads may read these numbers meanwhile, each a word, of which any value will do.
    #[allow(unsafe_code)]
    unsafe {
        // Before 2.35 glibc takes no more than this.
        if libc::mallopt(libc::M_MMAP_THRESHOLD, own_pages) == 0 {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        }
        libc::mallopt(libc::M_TRIM_THRESHOLD, free);
        libc::mallopt(libc::M_TOP_PAD, beyond);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep() {}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}
