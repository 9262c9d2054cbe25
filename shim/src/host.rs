//! What this machine is and has.

use std::fs;

use dunlin_api::wire::Needs;
use dunlin_checkpoint::image;

/// Oldest kernel the engine works on.
const OLDEST_KERNEL: (u32, u32) = (6, 7);

/// Flags of `/proc/cpuinfo` that programs can feel: instructions and registers
/// that user code may use.
const CPU_FEATURES: &[&str] = &[
    "fpu",
    "cx8",
    "cmov",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "pni",
    "pclmulqdq",
    "ssse3",
    "fma",
    "cx16",
    "sse4_1",
    "sse4_2",
    "movbe",
    "popcnt",
    "aes",
    "xsave",
    "avx",
    "f16c",
    "rdrand",
    "rdtscp",
    "lahf_lm",
    "abm",
    "sse4a",
    "fsgsbase",
    "bmi1",
    "avx2",
    "bmi2",
    "rtm",
    "avx512f",
    "avx512dq",
    "rdseed",
    "adx",
    "avx512ifma",
    "clflushopt",
    "clwb",
    "avx512cd",
    "sha_ni",
    "avx512bw",
    "avx512vl",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "avx_vnni",
    "avx512_bf16",
    "avx512vbmi",
    "pku",
    "ospke",
    "waitpkg",
    "avx512_vbmi2",
    "gfni",
    "vaes",
    "vpclmulqdq",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "rdpid",
    "movdiri",
    "movdir64b",
    "serialize",
    "user_shstk",
    "amx_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_fp16",
    "avx_ifma",
];

/// What does not change while the machine runs.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Kernel release.
    pub(crate) kernel: String,
    /// As `uname -m` says it.
    pub(crate) arch: String,
    /// Instructions programs may use here.
    pub(crate) cpu_features: Vec<String>,
    /// Processors.
    pub(crate) cpus: usize,
}

impl Host {
    /// Looks at this machine.
    pub(crate) fn probe() -> Self {
        let uname = rustix::system::uname();
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            arch: uname.machine().to_string_lossy().into_owned(),
            cpu_features: cpu_features(&info),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// What a container of this machine needs elsewhere.
    pub(crate) fn needs(&self, memory: u64, processes: u64) -> Needs {
        Needs {
            arch: self.arch.clone(),
            kernel: self.kernel.clone(),
            cpu_features: self.cpu_features.clone(),
            memory,
            processes,
            image_version: image::VERSION,
        }
    }

    /// Instructions in `needed` that this machine does not have.
    pub(crate) fn lacks(&self, needed: &[String]) -> Vec<String> {
        needed.iter().filter(|name| !self.cpu_features.contains(name)).cloned().collect()
    }

    /// Whether the engine works on this kernel.
    pub(crate) fn kernel_is_new_enough(&self) -> bool {
        kernel_version(&self.kernel).is_some_and(|version| OLDEST_KERNEL <= version)
    }
}

/// Total and available memory in bytes.
pub(crate) fn memory() -> (u64, u64) {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let bytes = |name| field(name).unwrap_or(0).saturating_mul(1024);
    (bytes("MemTotal:"), bytes("MemAvailable:"))
}

fn cpu_features(info: &str) -> Vec<String> {
    let line = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let flags = line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags);
    let told = |flag: &&str| CPU_FEATURES.contains(flag) || cfg!(not(target_arch = "x86_64"));
    flags.split_whitespace().filter(told).map(str::to_owned).collect()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(kernel_version("6.18.0-rc1+"), Some((6, 18)));
        assert_eq!(kernel_version("5.10"), Some((5, 10)));
        assert_eq!(kernel_version("x"), None);
        assert!(OLDEST_KERNEL <= (6, 18) && (6, 6) < OLDEST_KERNEL && OLDEST_KERNEL <= (7, 0));
    }

    #[test]
    fn only_what_programs_feel_is_compared() {
        let features = cpu_features("model\t: x\nflags\t\t: fpu vme avx2 hypervisor\n");
        assert_eq!(features, ["fpu", "avx2"]);
        let host = Host { cpu_features: features, ..Host::probe() };
        assert_eq!(host.lacks(&["avx2".into(), "amx_tile".into()]), ["amx_tile"]);
    }

    #[test]
    fn memory_is_known() {
        let (total, available) = memory();
        assert!(0 < available && available <= total);
    }
}
