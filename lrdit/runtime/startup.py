"""What a process sets up before it computes: its allocator, its limits, jax's settings and cache.

XLA allocates the temporaries of a computation on a CPU anew for every call, some
gigabytes for a training step, and glibc gives such blocks back to the system as
soon as they are freed. Every step then starts by faulting them in again, page by
page, which took a third of a DiT-S/2 step. An analysis, though, asks for blocks of
ever other sizes, between which a heap that keeps everything grows in pieces: to 20 GiB
where DiT-XL/2 needs 14.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
import resource
import sys
import warnings
from collections.abc import Mapping

from lrdit.runtime.errors import UserError

# mallopt's parameters and madvise's advice, of glibc's malloc.h and mman.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MADV_HUGEPAGE = 14

# Modes that do not repeat one computation.
VARIED_MODES = ("analyze",)
# Blocks from this size on are given back as soon as they are freed, in those modes.
GIVEN_BACK_BYTES = 1 << 20

# Whether XLA makes kernels of its own for matrix products on GPUs, and what finds those.
PRODUCTS_OF_XLA = "xla_gpu_enable_triton_gemm"
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# Quicker compilations are not worth a file.
MIN_CACHED_SECONDS = 0.1

# Files that may be open at once, if the system lets a process have so many.
OPEN_FILES = 1 << 16

# What the shell may not choose: a run's random streams and dtypes, and whether it is compiled,
# are the same in every process that goes on with it or samples it. All are jax's defaults.
# The rest of jax's settings say where and how fast a process computes, or help to debug it.
SETTINGS_OF_A_RUN = {
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_high_dynamic_range_gumbel": False,
  "jax_enable_x64": False,
  "jax_explicit_x64_dtypes": "warn",
  "jax_numpy_dtype_promotion": "standard",
  "jax_numpy_rank_promotion": "allow",
  "jax_softmax_custom_jvp": False,
  "jax_allow_f16_reductions": True,
  "jax_disable_jit": False,
}
# What helps to debug jax itself, and ends every run at its first step.
UNUSABLE_SETTINGS = {
  "jax_no_execution": False,
  "jax_no_tracing": False,
  "jax_transfer_guard": None,
  "jax_transfer_guard_host_to_device": None,
  "jax_transfer_guard_device_to_device": None,
  "jax_transfer_guard_device_to_host": None,
  "jax_error_checking_behavior_nan": "ignore",
  "jax_error_checking_behavior_divide": "ignore",
  "jax_error_checking_behavior_oob": "ignore",
}
# As `SETTINGS_OF_A_RUN`, but flax's.
FLAX_SETTINGS_OF_A_RUN = {
  "flax_fix_rng_separator": False,
  "flax_return_frozendict": False,
  "flax_preserve_adopted_names": False,
}


def prepare(mode: str) -> list[str]:
  """All of it; to be called before numpy or jax are imported.

  Args:
    mode: that the process is for.

  Returns:
    lines for the log: what of the environment is not as it was set.

  Raises:
    UserError: a variable of the environment is no setting that jax or XLA know.
  """
  raise_limit_of_open_files()
  if mode in VARIED_MODES:
    give_back_freed_memory()
  # Several devices allocate at once and leave the one heap in pieces: it grew by a
  # gigabyte every few steps of DiT-S/2, without end.
  elif num_cpu_devices(os.environ) == 1:
    keep_freed_memory()
  os.environ["MPLBACKEND"] = "agg"  # plots are files, whatever window the shell wants
  check_xla_flags()
  take_products_from_libraries()
  import_libraries()
  use_compilation_cache()
  return fix_settings_of_a_run()


def raise_limit_of_open_files() -> None:
  """Let the process open as many files as it may, up to `OPEN_FILES`.

  A prepared dataset has a thousand files and more, and shells allow 1,024 by default
  where the system would allow many more.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_cpu_devices(environment: Mapping[str, str]) -> int:
  """Virtual CPU devices that jax is asked for, by either of its variables.

  Raises:
    UserError: it is not a number of devices.
  """
  forced = re.findall(
    r"xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
  )
  given = environment.get("JAX_NUM_CPU_DEVICES")
  if given and (not given.strip().isdecimal() or int(given) < 1):
    raise UserError(
      f"JAX_NUM_CPU_DEVICES={given} in the environment is not a number of devices from 1: correct "
      "or unset it",
      2,
    )
  return int(given or (forced or ["1"])[-1])


def check_xla_flags() -> None:
  """Check XLA_FLAGS before XLA does, which ends the process that reads a wrong one.

  Raises:
    UserError: what XLA says of a flag or its value.
  """
  given = os.environ.get("XLA_FLAGS", "").strip()
  if given and (complaint := _complaint_of_xla()):
    raise UserError(f"XLA_FLAGS={given} in the environment: {complaint}: correct or unset it", 2)


def take_products_from_libraries() -> None:
  """Have XLA take matrix products on NVIDIA GPUs from cuBLAS, unless XLA_FLAGS says otherwise.

  It would also try its own kernels, in dozens of variants for every shape. On an H100 with 16
  cores the training step of two blocks was not compiled in 80 s then, and that of DiT-B/2 takes
  36 s with cuBLAS alone.
  """
  if any(map(importlib.util.find_spec, CUDA_PLUGINS)):
    add_xla_flag(PRODUCTS_OF_XLA, "false")


def add_xla_flag(name: str, value: str) -> None:
  """Add a flag to XLA_FLAGS, unless it is there or this version of XLA does not know it."""
  before = os.environ.get("XLA_FLAGS")
  if name in (before or ""):
    return
  os.environ["XLA_FLAGS"] = f"{before or ''} --{name}={value}".strip()
  if _complaint_of_xla():
    if before is None:
      del os.environ["XLA_FLAGS"]
    else:
      os.environ["XLA_FLAGS"] = before


def _complaint_of_xla() -> str | None:
  """What XLA says of XLA_FLAGS; None where it takes them, or can no longer be asked.

  A child process reads them, which takes some milliseconds.
  """
  if "jax" in sys.modules or not sys.platform.startswith("linux"):
    return None
  from jaxlib import _jax

  read_end, write_end = os.pipe()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # numpy has started threads, of which the child has no need
    child = os.fork()
  if child == 0:
    try:
      os.dup2(write_end, 2)
      _ = _jax.CompileOptions().executable_build_options.debug_options
    finally:
      os._exit(0)
  os.close(write_end)
  with open(read_end, errors="replace") as file:
    said = file.read()
  if os.waitpid(child, 0)[1] == 0:
    return None
  lines = [line.partition("] ")[2] for line in said.splitlines() if "] " in line]
  return lines[0] if lines else "XLA cannot read it"


def import_libraries() -> None:
  """Import those that read their variables while they are imported, and trip over wrong ones.

  Raises:
    UserError: a variable has a value that none of its settings is.
  """
  try:
    import flax  # noqa: F401
    import jax  # noqa: F401  # only now: importing them starts threads
    import tqdm  # noqa: F401
  except ValueError as error:
    raise _environment_error(str(error)) from error


def _environment_error(message: str) -> UserError:
  """The one line for what a library says of a variable, which most name in either case."""
  cause = (message.splitlines() or ["a library cannot be imported"])[0]
  suspects = [name for name in sorted(os.environ) if name.startswith(("JAX_", "FLAX_", "TQDM_"))]
  named = [name for name in suspects if name.lower() in message.lower()] or suspects
  said = " or ".join(f"{name}={os.environ[name]}" for name in named) or "a variable"
  return UserError(f"{said} in the environment: {cause}: correct or unset it", 2)


def open_devices() -> None:
  """Open jax's devices; to be called after the processes of a job have met.

  Raises:
    UserError: there is no such device as the environment asks for.
  """
  import jax

  try:
    jax.devices()
    jax.numpy.zeros(())  # on the default device
  except (RuntimeError, AssertionError, ValueError) as error:
    asked = [
      f"{name}={os.environ[name]}"
      for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
      if os.environ.get(name)
    ]
    cause = (str(error).splitlines() or ["there is no such device"])[0]
    mend = "install jax for a device that is there"
    if asked:
      mend = f"correct or unset what the environment says, or {mend}"
    raise UserError(
      f"{' and '.join(asked) or 'jax'}: no device to compute on ({cause}): {mend}", 2
    ) from error


def fix_settings_of_a_run() -> list[str]:
  """Set what the shell may not choose; lines that say what it had chosen instead.

  The precision of matrix products is left as it is: like the device, it is the choice of
  a process, and rounds differently.
  """
  import flax
  import jax

  notes = []
  for config, settings, why in (
    (jax.config, SETTINGS_OF_A_RUN, "it would change what a run computes"),
    (flax.config, FLAX_SETTINGS_OF_A_RUN, "it would change what a run computes"),
    (jax.config, UNUSABLE_SETTINGS, "no run would go on under it"),
  ):
    for name, value in settings.items():
      if not hasattr(config, name):  # of another version
        continue
      found = getattr(config, name)
      config.update(name, value)
      if getattr(config, name) != found:
        notes.append(f"{name.upper()} is ignored: {why} ({name}={value} is used)")
  if jax.config.jax_default_matmul_precision is not None:
    notes.append(
      f"JAX_DEFAULT_MATMUL_PRECISION={jax.config.jax_default_matmul_precision} is heeded: a run "
      "that goes on without it rounds differently"
    )
  return notes


def keep_freed_memory() -> None:
  """Makes malloc keep what is freed, in huge pages where the system grants them.

  To be called before there are threads; does nothing where malloc is not glibc's. The
  process then holds the most memory it ever needed until it ends.
  """
  libc = _glibc()
  if libc is None:
    return
  # One heap, without blocks of their own mapping, whose end is never given back.
  for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
    libc.mallopt(parameter, value)
  _reserve_huge_pages(libc)


def give_back_freed_memory() -> None:
  """Makes malloc map large blocks on their own, so that freeing them leaves no gaps.

  Does nothing where malloc is not glibc's, which would learn to keep those of up to 32 MiB.
  """
  libc = _glibc()
  if libc is not None:
    libc.mallopt(M_MMAP_THRESHOLD, GIVEN_BACK_BYTES)


def _glibc() -> ctypes.CDLL | None:
  if not sys.platform.startswith("linux"):
    return None
  libc = ctypes.CDLL(None)
  return libc if hasattr(libc, "mallopt") else None


def use_compilation_cache() -> None:
  """Keeps compiled programs in ~/.cache/lrdit, so that only a new one is compiled.

  XDG_CACHE_HOME and JAX_COMPILATION_CACHE_DIR name another place; jax tells
  programs apart by their code, jax's version and the device.
  """
  import jax

  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(home, "lrdit"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_CACHED_SECONDS)


def _memory_limit() -> int:
  """Bytes this process may use: the machine's memory, or its control group's limit."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  try:
    with open("/sys/fs/cgroup/memory.max") as file:
      return min(memory, int(file.read()))
  except (OSError, ValueError):  # no such group, or "max"
    return memory


def _reserve_huge_pages(libc: ctypes.CDLL) -> None:
  """Extends the heap, which takes no memory until it is written, by half of the
  machine's and asks for huge pages there; without them, 4 KiB pages are used."""
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  page = os.sysconf("SC_PAGE_SIZE")
  size = _memory_limit() // 2 // page * page
  block = libc.malloc(size)
  if block:
    start = -(-block // page) * page
    libc.madvise(start, size - page, MADV_HUGEPAGE)
    libc.free(block)
