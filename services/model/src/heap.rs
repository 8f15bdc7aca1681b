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
    set(1 << 30, 1 << 30);
}

/// With what glibc comes to by itself when such pieces have been freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    set(32 << 20, 64 << 20);
    // SAFETY: may be called at any time.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// From how many bytes on a piece has pages of its own, and how many free ones at the end of the heap are given back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set(own_pages: libc::c_int, free: libc::c_int) {
    // SAFETY: may be called at any time, with any numbers.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, own_pages);
        libc::mallopt(libc::M_TRIM_THRESHOLD, free);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep() {}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}
