"""What a process sets up before it computes: its allocator and the compilation cache.

XLA allocates the temporaries of a computation on a CPU anew for every call, some
gigabytes for a training step, and glibc gives such blocks back to the system as
soon as they are freed. Every step then starts by faulting them in again, page by
page, which took a third of a DiT-S/2 step. An analysis, though, asks for blocks of
ever other sizes, between which a heap that keeps everything grows in pieces: to 20 GiB
where DiT-XL/2 needs 14.
"""

import ctypes
import os
import re
import sys
from collections.abc import Mapping

# mallopt's parameters and madvise's advice, of glibc's malloc.h and mman.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MADV_HUGEPAGE = 14

# Modes that do not repeat one computation.
VARIED_MODES = ("analyze",)
# Blocks from this size on are given back as soon as they are freed, in those modes.
GIVEN_BACK_BYTES = 1 << 20

TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"

# Quicker compilations are not worth a file.
MIN_CACHED_SECONDS = 0.1


def prepare(mode: str) -> None:
  """All of it; to be called before numpy or jax are imported.

  Args:
    mode: that the process is for.
  """
  if mode in VARIED_MODES:
    give_back_freed_memory()
  # Several devices allocate at once and leave the one heap in pieces: it grew by a
  # gigabyte every few steps of DiT-S/2, without end.
  elif num_cpu_devices(os.environ) == 1:
    keep_freed_memory()
  use_library_products()
  use_compilation_cache()


def use_library_products() -> None:
  """Have XLA take matrix products on NVIDIA GPUs from cuBLAS, unless XLA_FLAGS says otherwise.

  It would also try its own kernels, in dozens of variants for every shape. On an H100 with 16
  cores the training step of two blocks was not compiled in 80 s then, and that of DiT-B/2 takes
  36 s with cuBLAS alone.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if TRITON_PRODUCTS not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --{TRITON_PRODUCTS}=false".strip()


def num_cpu_devices(environment: Mapping[str, str]) -> int:
  """Virtual CPU devices that jax is asked for, by either of its variables."""
  forced = re.findall(
    r"xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
  )
  return int(environment.get("JAX_NUM_CPU_DEVICES") or (forced or ["1"])[-1])


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
  import jax  # only now: importing it starts threads

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
