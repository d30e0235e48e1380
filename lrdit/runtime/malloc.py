"""glibc's malloc, tuned for computing on a CPU.

XLA allocates gigabytes of temporaries anew for every training step. By default glibc returns freed
blocks to the system, and faulting them in again takes up to a third of a step. An analysis asks for
blocks of ever-changing sizes instead. A heap that kept all of them would fragment, to 20 GiB where
DiT-XL/2 needs 14. On accelerators the defaults stay, as many threads decode images there.

glibc reads its tunables once, when a program starts.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence

# One heap in huge pages, without separately mapped blocks, which never shrinks.
KEEP_FREED = ":".join(
  f"glibc.malloc.{setting}"
  for setting in ("mmap_max=0", f"trim_threshold={2**64 - 1}", "arena_max=1", "hugetlb=1")
)
# Blocks from 1 MiB on are mapped separately and returned when freed. By default, glibc would raise
# that threshold to up to 32 MiB.
RETURN_FREED = f"glibc.malloc.mmap_threshold={1 << 20}"

ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def count_cpu_devices(environment: Mapping[str, str]) -> str:
  """Return the requested number of virtual CPU devices, as written in the environment."""
  xla_flags = environment.get("XLA_FLAGS", "")
  forced = re.findall(r"xla_force_host_platform_device_count=(\S+)", xla_flags)
  return environment.get("JAX_NUM_CPU_DEVICES") or (forced or ["1"])[-1]


def choose_tunables(argv: Sequence[str], environment: Mapping[str, str]) -> str | None:
  """Return the value of GLIBC_TUNABLES for a command line, or None to leave malloc as it is."""
  if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in environment:
    return None
  platforms = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME")
  if platforms is None:
    on_cpu = not any(map(importlib.util.find_spec, ACCELERATOR_PLUGINS))
  else:
    on_cpu = platforms.split(",")[0].strip() == "cpu"
  if not on_cpu:
    return None
  if any(word.endswith("analyze") for word in argv):
    return RETURN_FREED
  # Several devices allocate at once and fragment the single heap. With DiT-S/2 it grew by a
  # gigabyte every few steps, without end.
  return KEEP_FREED if count_cpu_devices(environment).strip() == "1" else None


def restart_tuned() -> None:
  """Start this Python program again with its malloc tuned, where that helps."""
  if tunables := choose_tunables(sys.argv, os.environ):
    os.environ["GLIBC_TUNABLES"] = tunables
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
