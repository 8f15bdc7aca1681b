//! The numbers of a tensor that nobody writes to any more.

use anyhow::{Context, Result};
use std::ops::{Deref, Range};
use tch::{Device, Tensor};

/// The numbers of a contiguous tensor on the CPU, which is kept alive with them.
pub(super) struct Frozen<T> {
    _tensor: Tensor,
    data: *const T,
    len: usize,
}

impl<T: Copy> Frozen<T> {
    /// Looks into `tensor`, whose elements have to be `T`, and which is not written to from here on.
    ///
    /// # Errors
    /// When it is not contiguous, on the CPU, and of elements as large as `T`.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let fits = tensor.device() == Device::Cpu
            && tensor.is_contiguous()
            && tensor.f_kind()?.elt_size_in_bytes() == size_of::<T>();
        fits.then_some(())
            .context("a frozen matrix has to be contiguous, on the CPU and of the expected type")?;
        let (data, len) = (tensor.data_ptr().cast::<T>().cast_const(), tensor.numel());
        Ok(Self { _tensor: tensor.detach(), data, len })
    }

    /// Where in memory they lie.
    pub fn memory(&self) -> Range<usize> {
        let start = self.data as usize;
        start..start + self.len * size_of::<T>()
    }
}

impl<T> Deref for Frozen<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `new` checked that these are so many elements of this size, all plain numbers; the tensor keeps
        // them where they are.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.data, self.len)
        }
    }
}

// SAFETY: frozen weights are only read, and the tensor in here is touched again only to be dropped, whose count of
// handles is atomic.
#[allow(unsafe_code)]
unsafe impl<T: Sync> Sync for Frozen<T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Send> Send for Frozen<T> {}
