//! Where the model runs and in which number format, decided once at the start and printed.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Once, OnceLock};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tch::{Cuda, Device, Kind};

use crate::quant::Quantisation;
use crate::selftest;

/// The device a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// MPS where there is one, else CUDA, else the CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
    /// The GPU of an Apple computer.
    Mps,
}

/// The number format a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionChoice {
    /// The fastest format that the device computes natively and trains without loss scaling.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16: the range of f32, 8 bits of precision.
    Bf16,
    /// 16-bit floats; training scales its loss so that small gradients survive.
    F16,
}

/// The number format of the base's weights and activations. Adapters and optimiser state stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

impl Precision {
    /// The libtorch name of this format.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

/// A device together with a precision that it can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where tensors live.
    pub device: Device,
    /// The format of base weights and activations.
    pub precision: Precision,
    /// How the base's matrices are stored.
    pub quantisation: Quantisation,
}

impl Placement {
    /// The processor in f32: what tests and goldens use.
    pub const CPU_F32: Self =
        Self { device: Device::Cpu, precision: Precision::F32, quantisation: Quantisation::None };

    /// Turns choices into a placement. A 16-bit format is used only after a self-test on the device: without
    /// passing it, `auto` is f32.
    ///
    /// # Errors
    /// When a device is asked for by name and this machine or this libtorch has none, or a 16-bit format is, and
    /// the device fails its self-test.
    pub fn resolve(
        device: DeviceChoice,
        precision: PrecisionChoice,
        quantisation: Quantisation,
    ) -> Result<Self> {
        let device = resolve_device(device)?;
        let precision = match precision {
            PrecisionChoice::Auto => match native_precision(device) {
                Precision::F32 => Precision::F32,
                half if selftest::check(device, half).is_ok() => half,
                _ => Precision::F32,
            },
            PrecisionChoice::F32 => Precision::F32,
            PrecisionChoice::Bf16 => tested(device, Precision::Bf16)?,
            PrecisionChoice::F16 => tested(device, Precision::F16)?,
        };
        Ok(Self { device, precision, quantisation })
    }

    /// The libtorch name of the precision.
    pub fn kind(&self) -> Kind {
        self.precision.kind()
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precision = match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        };
        match self.device {
            Device::Cpu => write!(f, "cpu, {precision}, {} threads", tch::get_num_threads()),
            Device::Cuda(index) => write!(f, "cuda:{index}, {precision}"),
            Device::Mps => write!(f, "mps, {precision}"),
            Device::Vulkan => write!(f, "vulkan, {precision}"),
        }?;
        match self.quantisation {
            Quantisation::None => Ok(()),
            quantised => write!(f, ", weights in {quantised}"),
        }
    }
}

impl DeviceChoice {
    /// Refuses one that is asked for by name and that this machine or this libtorch does not have.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn check(self) -> Result<()> {
        match self {
            // There is always one, and nothing has to be loaded to know that.
            Self::Auto | Self::Cpu => Ok(()),
            Self::Cuda | Self::Mps => resolve_device(self).map(drop),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "cuda" => Self::Cuda,
            "mps" => Self::Mps,
            _ => bail!("unknown device {text:?}: use auto, cpu, cuda or mps"),
        })
    }
}

impl FromStr for PrecisionChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "f32" => Self::F32,
            "bf16" => Self::Bf16,
            "f16" => Self::F16,
            _ => bail!("unknown precision {text:?}: use auto, f32, bf16 or f16"),
        })
    }
}

fn resolve_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Mps if tch::utils::has_mps() => Ok(Device::Mps),
        DeviceChoice::Mps => bail!(
            "device mps is not available: it needs a Mac with Apple silicon and the macOS libtorch; use auto or cpu"
        ),
        DeviceChoice::Cuda if cuda_available() => Ok(Device::Cuda(0)),
        DeviceChoice::Cuda => bail!(
            "device cuda is not available: it needs an NVIDIA driver and the CUDA libtorch (scripts/setup --cuda, or \
             ENGRAM_LIBTORCH_CUDA = the folder of libtorch_cuda.so); use auto or cpu"
        ),
        DeviceChoice::Auto if tch::utils::has_mps() => Ok(Device::Mps),
        DeviceChoice::Auto if cuda_available() => Ok(Device::Cuda(0)),
        DeviceChoice::Auto => Ok(Device::Cpu),
    }
}

fn tested(device: Device, precision: Precision) -> Result<Precision> {
    selftest::check(device, precision).with_context(|| {
        format!("{precision:?} on {device:?} fails its self-test; use precision f32 or auto").to_lowercase()
    })?;
    Ok(precision)
}

fn native_precision(device: Device) -> Precision {
    match device {
        Device::Cuda(_) => Precision::Bf16,
        Device::Cpu if cpu_has_bf16() => Precision::Bf16,
        // MPS computes bf16 only from macOS 14 on, and some of its kernels return wrong sums there: bf16 has to
        // be asked for, and then to pass the self-test.
        _ => Precision::F32,
    }
}

/// Without AVX-512 BF16 or AMX the processor emulates bf16, which is slower than f32.
fn cpu_has_bf16() -> bool {
    let Ok(info) = std::fs::read_to_string("/proc/cpuinfo") else { return false };
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "avx512_bf16" || flag == "amx_bf16")
}

fn cuda_available() -> bool {
    static LOADED: Once = Once::new();
    LOADED.call_once(load_cuda_library);
    Cuda::is_available()
}

/// Loads libtorch's CUDA half, so that one binary serves machines with and without a GPU.
///
/// It has to happen before the first CUDA call, because libtorch looks for its CUDA hooks only once. A failure
/// is no error here: the device is then reported as absent.
fn load_cuda_library() {
    let Some(library) = cuda_library() else { return };
    // SAFETY: the library is libtorch's own other half, of the version that setup pinned; its initialisers only
    // register kernels. It is leaked, because those stay registered for the life of the process.
    #[allow(unsafe_code)]
    if let Ok(handle) = unsafe { libloading::Library::new(library) } {
        std::mem::forget(handle);
    }
}

fn cuda_library() -> Option<PathBuf> {
    let folder = match std::env::var_os("ENGRAM_LIBTORCH_CUDA") {
        Some(folder) => PathBuf::from(folder),
        None => libtorch_folder()?.parent()?.join("cuda/torch/lib"),
    };
    let library = folder.join("libtorch_cuda.so");
    library.exists().then_some(library)
}

/// The folder of the libtorch that this process has loaded.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.ends_with("/libtorch_cpu.so"))?;
    Some(PathBuf::from(path).parent()?.to_path_buf())
}

/// Sets how many threads libtorch computes with on behalf of the calling thread.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(threads.clamp(1, 1024) as i32);
}

/// The same on Linux, but for threads that have not computed yet: [`set_threads`] is for them too, whoever calls it.
pub(crate) fn set_own_threads(threads: usize) {
    type Set = unsafe extern "C" fn(std::ffi::c_int);
    static FOUND: OnceLock<Option<Set>> = OnceLock::new();
    // SAFETY: of this name and type in every OpenMP. It changes a number of the calling thread.
    #[allow(unsafe_code)]
    unsafe {
        if let Some(set) = FOUND.get_or_init(|| openmp(b"omp_set_num_threads\0")) {
            set(threads as std::ffi::c_int);
        }
    }
}

/// Those threads that libtorch has started to help the calling one, which end with this; they are started again when they are
/// needed.
///
/// Every thread that computes has its own. While a process has no more of them than cores, they wait for their next work without
/// sleeping; otherwise each product has to wake them. So learning and judging end with those that they had.
#[must_use = "they end with it"]
pub struct Helpers(PhantomData<*const ()>);

/// The calling thread's helpers.
pub fn helpers() -> Helpers {
    Helpers(PhantomData)
}

impl Drop for Helpers {
    fn drop(&mut self) {
        type Pause = unsafe extern "C" fn(std::ffi::c_int) -> std::ffi::c_int;
        static FOUND: OnceLock<Option<Pause>> = OnceLock::new();
        // SAFETY: of this name and type in OpenMP 5.0. It ends threads that wait for work; within a parallel region, where this is
        // never called, it would do nothing. 1 stands for what keeps all settings.
        #[allow(unsafe_code)]
        unsafe {
            if let Some(pause) = FOUND.get_or_init(|| openmp(b"omp_pause_resource_all\0")) {
                pause(1);
            }
        }
    }
}

/// A function of the OpenMP that libtorch brings on Linux, if this process has it.
///
/// # Safety
/// It has to be of type `T`.
#[allow(unsafe_code)]
pub(crate) unsafe fn openmp<T: Copy>(name: &[u8]) -> Option<T> {
    #[cfg(target_os = "linux")]
    {
        let this = libloading::os::unix::Library::this();
        // SAFETY: as the caller promises.
        unsafe { this.get::<T>(name) }.ok().map(|symbol| *symbol)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = name;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_and_refused_by_name() {
        assert_eq!("mps".parse::<DeviceChoice>().unwrap(), DeviceChoice::Mps);
        assert_eq!("bf16".parse::<PrecisionChoice>().unwrap(), PrecisionChoice::Bf16);
        assert!("gpu".parse::<DeviceChoice>().unwrap_err().to_string().contains("cuda"));
        assert!("int8".parse::<PrecisionChoice>().unwrap_err().to_string().contains("bf16"));
    }

    #[test]
    fn an_explicit_choice_is_kept_and_printed() {
        let placement =
            Placement::resolve(DeviceChoice::Cpu, PrecisionChoice::F16, Quantisation::Int8).unwrap();
        assert_eq!((placement.device, placement.kind()), (Device::Cpu, Kind::Half));
        assert!(placement.to_string().starts_with("cpu, f16, "));
        assert!(placement.to_string().ends_with("weights in int8"));
    }

    #[test]
    fn an_absent_device_is_refused_with_what_to_do() {
        if !tch::utils::has_mps() {
            let error =
                Placement::resolve(DeviceChoice::Mps, PrecisionChoice::Auto, Quantisation::None).unwrap_err();
            assert!(error.to_string().contains("use auto or cpu"));
        }
    }
}
