//! Weights in memory pages of 2 MiB.
//!
//! A token reads every weight once, and with pages of 4 KiB the processor also looks up where each 4 KiB of them lie: two cores
//! of a virtual Zen 4 then read 19 to 22 GB/s, and 28 to 32 with large pages.

use std::ops::Range;

/// Bytes of a large page.
#[cfg(target_os = "linux")]
const PAGE: usize = 2 << 20;
/// `MADV_COLLAPSE` of Linux 6.1, which not every C library names.
#[cfg(target_os = "linux")]
const COLLAPSE: libc::c_int = 25;
/// Where Linux says whether its owner wants large pages.
#[cfg(target_os = "linux")]
const WANTED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Asks the system to put memory at these addresses into large pages, with what lies between it. Where it will not, all stays
/// as it is, and where its owner wants none, too.
#[cfg(target_os = "linux")]
pub(super) fn gather(memory: impl Iterator<Item = Range<usize>>) {
    if std::fs::read_to_string(WANTED).is_ok_and(|wanted| wanted.contains("[never]")) {
        return;
    }
    for page in pages(memory) {
        let start = std::ptr::without_provenance_mut(page * PAGE);
        // SAFETY: what is stored there stays the same, and an address where nothing is gets an error, which is no harm.
        #[allow(unsafe_code)]
        unsafe {
            libc::madvise(start, PAGE, COLLAPSE);
        }
    }
}

/// The numbers of the large pages that memory lies in.
#[cfg(target_os = "linux")]
fn pages(memory: impl Iterator<Item = Range<usize>>) -> std::collections::BTreeSet<usize> {
    memory.flat_map(|range| range.start / PAGE..range.end.div_ceil(PAGE)).collect()
}

/// Other systems choose the size of pages themselves.
#[cfg(not(target_os = "linux"))]
pub(super) fn gather(_: impl Iterator<Item = Range<usize>>) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn pages_are_those_that_any_of_it_lies_in() {
        let of = |ranges: &[Range<usize>]| pages(ranges.iter().cloned()).into_iter().collect::<Vec<_>>();
        assert_eq!(of(&[PAGE - 1..PAGE + 1, PAGE + 5..3 * PAGE]), [0, 1, 2]);
        assert_eq!(of(&[4 * PAGE..5 * PAGE, 9 * PAGE..9 * PAGE + 1]), [4, 9]);
    }

    #[test]
    fn what_is_gathered_stays_what_it_is_and_addresses_of_nothing_do_no_harm() {
        let numbers: Vec<u32> = (0..3 << 20).collect();
        let start = numbers.as_ptr() as usize;
        gather([start..start + 4 * numbers.len(), 0..1, usize::MAX / 2..usize::MAX / 2 + 9].into_iter());
        assert!(numbers.iter().zip(0..).all(|(&number, n)| number == n));
    }
}
