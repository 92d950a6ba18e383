"""Settings that must stand before JAX starts its backend, the cache, and the device's name."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import sys
from pathlib import Path

import jax
import jaxlib

from resnet_flax.errors import InputError

# jaxlib 0.10.2 hands reductions, products and convolutions to YNNPACK, which gets some large
# reductions wrong (jax#39103; tests/machine/test_runtime.py shows it) and trains this network at
# two thirds of the speed of XLA's own path; that of 0.12.0.1, at four fifths.
YNNPACK_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
# Without this pass optimisation barriers last until the code is generated: XLA then no longer
# computes a layer again inside the transposition of its output, which took a third of a step.
BARRIER_FLAG = "--xla_disable_hlo_passes=cse_barrier_expander"
M_MMAP_MAX, M_TRIM_THRESHOLD, MADV_HUGEPAGE = -4, -1, 14  # of glibc's malloc.h and madvise(2)
HUGE_PAGE = 2**21  # bytes


def configure_runtime(*, deterministic: bool = False) -> None:
    """Chooses sound and quick settings; once JAX has started its backend it has no effect.

    What the user has set in the environment always wins.

    * YNNPACK is turned off on CPUs (``XLA_FLAGS``): it is slower, and wrong in jaxlib 0.10.2.
    * Without an accelerator, optimisation barriers are kept (``XLA_FLAGS``), for speed; and, on
      Linux, the C library keeps freed memory, unless ``GLIBC_TUNABLES`` says how.
    * The GPU's memory is taken as needed instead of three quarters of it at once
      (``XLA_PYTHON_CLIENT_PREALLOCATE``).
    * If ``deterministic``, its results have the same bits in each run; a CPU's always have.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    add_flag(YNNPACK_FLAG)
    if deterministic:
        add_flag("--xla_gpu_deterministic_ops=true")
    if not accelerator_expected():
        add_flag(BARRIER_FLAG)
        if sys.platform == "linux" and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
            keep_memory()


def keep_memory() -> None:
    """Has glibc keep freed memory, in huge pages: worth about a seventh of a training step.

    Nothing goes by mmap, which would return memory to the system after each step, and the heap is
    not trimmed: both would pay for the same pages again in the next step. The heap grows by half
    the machine's memory, in addresses alone; pages come when used, huge ones if asked for before.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # other C libraries have none
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    library.malloc.restype = ctypes.c_void_p
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = library.malloc(ctypes.c_size_t(size))
    if block:
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        length = ctypes.c_size_t(size - (start - block))
        library.madvise(ctypes.c_void_p(start), length, MADV_HUGEPAGE)
        library.free(ctypes.c_void_p(block))


def add_flag(flag: str) -> None:
    """Adds ``--name=value`` to ``XLA_FLAGS``, unless the user has set it or XLA has it not."""
    flags, name = os.environ.get("XLA_FLAGS", ""), flag.partition("=")[0]
    if name not in flags and known_to_xla(name):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def known_to_xla(name: str) -> bool:
    """Whether the jaxlib at hand has a flag: XLA ends the process that sets another."""
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return text.find(name.lstrip("-").encode()) >= 0
    return True


def keep_compiled_programs() -> None:
    """Keeps what XLA compiles in the user's cache folder, for the next start.

    The folder is private, since programs in it are run, and one for each kind of machine, since
    they use its instructions. ``JAX_COMPILATION_CACHE_DIR`` wins; a folder that cannot be written
    is done without.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "resnet_flax" / machine_key()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        trusted = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except (OSError, RuntimeError, AttributeError):  # no home; Windows has no getuid
        return
    if trusted:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # there are many


def machine_key() -> str:
    """Names the processor's instruction set, and the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    digest = hashlib.sha256(features.encode()).hexdigest()[:16]
    return f"{platform.system()}-{platform.machine()}-{digest}".lower()


def accelerator_expected() -> bool:
    """Whether JAX may compute on something else than the CPU; does not start its backend."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms != "cpu"
    # JAX finds its GPU backends by this entry point; TPUs come as the package libtpu.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def start_backend() -> None:
    """Has JAX find its devices.

    Raises:
        InputError: when there are none, as those that ``JAX_PLATFORMS`` names.
    """
    try:
        jax.devices()
    except Exception as error:  # RuntimeError; AssertionError, without a word, for no known name
        why = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0][:300]
        why = f" ({why})" if why else ""
        if platforms := jax.config.values["jax_platforms"]:
            mend = "unset it, or set it to cpu"
            message = f"JAX_PLATFORMS is {platforms!r}, which JAX cannot use here{why}: {mend}"
            raise InputError(message) from error
        raise InputError(f"JAX can use no device{why}") from error


def device_name() -> str:
    """The device that computes, in PyTorch's words: ``cpu``, ``cuda:0`` (AMD's too), ``tpu:0``."""
    device = jax.devices()[0]
    kind = "cuda" if device.platform in ("gpu", "cuda", "rocm") else device.platform.lower()
    return "cpu" if kind == "cpu" else f"{kind}:{device.id}"
