"""Set up a process before it computes: its limits and jax's settings."""

import contextlib
import importlib.util
import os
import resource
import sys
import warnings

from lrdit.runtime.compilation_cache import use_compilation_cache
from lrdit.runtime.errors import UserError
from lrdit.runtime.malloc import count_cpu_devices

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
OPEN_FILES = 1 << 16  # Files that may be open at once, where the system allows it.

# The environment may not change these settings of jax and flax from their defaults. They define
# what a run computes (random streams, dtypes, compilation) in every process that resumes or samples
# it. The last ones, which debug jax itself, would end every run at its first step.
FIXED_SETTINGS = {
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
  "flax_fix_rng_separator": False,
  "flax_return_frozendict": False,
  "flax_preserve_adopted_names": False,
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


def prepare() -> list[str]:
  """Set up the process; call this before numpy or jax are imported.

  Returns:
    Log lines about environment settings that are overridden or change rounding.

  Raises:
    UserError: an environment variable has a value that jax or XLA does not accept.
  """
  raise_open_files_limit()
  os.environ["MPLBACKEND"] = "agg"  # plots go to files, whatever backend the shell asks for
  flags = os.environ.get("XLA_FLAGS", "").strip()
  if flags and (complaint := _xla_complaint()):  # XLA itself would end the process
    raise _environment_error(f"XLA_FLAGS={flags}", complaint)
  count = count_cpu_devices(os.environ)
  if not count.strip().isdecimal() or int(count) < 1:
    rule = "in the environment is not a number of devices from 1: correct or unset it"
    raise UserError(f"JAX_NUM_CPU_DEVICES={count} {rule}", 2)
  use_cublas()
  import_libraries()
  use_compilation_cache()
  return fix_settings()


def _environment_error(settings: str, cause: str) -> UserError:
  return UserError(f"{settings} in the environment: {cause}: correct or unset it", 2)


def raise_open_files_limit() -> None:
  """Let the process open as many files as the system allows, up to `OPEN_FILES`."""
  # A prepared dataset has over a thousand files, and shells allow 1,024 by default.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they report
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def use_cublas() -> None:
  """Have XLA compute matrix products on NVIDIA GPUs by cuBLAS, unless XLA_FLAGS say otherwise.

  By default, XLA also tries dozens of its own kernels for every shape. On an H100 with 16 cores, it
  had not compiled the training step of two blocks after 80 s. With cuBLAS alone, that of DiT-B/2
  takes 36 s.
  """
  if any(map(importlib.util.find_spec, CUDA_PLUGINS)):
    add_xla_flag("xla_gpu_enable_triton_gemm", "false")


def add_xla_flag(name: str, value: str) -> None:
  """Add a flag to XLA_FLAGS, unless it is there already or XLA does not know it."""
  before = os.environ.get("XLA_FLAGS")
  if name in (before or ""):
    return
  os.environ["XLA_FLAGS"] = f"{before or ''} --{name}={value}".strip()
  if _xla_complaint():
    if before is None:
      del os.environ["XLA_FLAGS"]
    else:
      os.environ["XLA_FLAGS"] = before


def _xla_complaint() -> str | None:
  """Return XLA's complaint about XLA_FLAGS, or None if it accepts or has already read them."""
  if "jax" in sys.modules or not sys.platform.startswith("linux"):
    return None
  from jaxlib import _jax

  read_end, write_end = os.pipe()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the child does not need the threads that numpy has started
    child = os.fork()
  if child == 0:  # XLA reads the flags here, as it would end the process at a wrong one
    try:
      os.dup2(write_end, 2)
      _ = _jax.CompileOptions().executable_build_options.debug_options
    finally:
      os._exit(0)
  os.close(write_end)
  with open(read_end, errors="replace") as file:
    output = file.read()
  if os.waitpid(child, 0)[1] == 0:
    return None
  lines = [line.partition("] ")[2] for line in output.splitlines() if "] " in line]
  return lines[0] if lines else "XLA cannot read it"


def import_libraries() -> None:
  """Import the libraries that read the environment while they are imported."""
  try:
    import flax  # noqa: F401
    import jax  # noqa: F401  # only now: importing them starts threads
    import tqdm  # noqa: F401
  except ValueError as error:
    message = str(error) or "a library cannot be imported"
    suspects = [name for name in sorted(os.environ) if name.startswith(("JAX_", "FLAX_", "TQDM_"))]
    named = [name for name in suspects if name.lower() in message.lower()] or suspects
    settings = " or ".join(f"{name}={os.environ[name]}" for name in named) or "a variable"
    raise _environment_error(settings, message.splitlines()[0]) from error


def open_devices() -> None:
  """Open jax's devices; call this after the processes of a job have met."""
  import jax

  try:
    jax.devices()
    jax.numpy.zeros(())  # on the default device
  except (RuntimeError, AssertionError, ValueError) as error:
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
    settings = " and ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
    cause = (str(error).splitlines() or ["there is no such device"])[0]
    fix = "correct or unset these variables, or " if settings else ""
    fix += "install jax for a device that is there"
    message = f"{settings or 'jax'}: no device to compute on ({cause}): {fix}"
    raise UserError(message, 2) from error


def fix_settings() -> list[str]:
  """Apply `FIXED_SETTINGS` and return a log line for each that the environment had changed.

  A process may choose the precision of matrix products, like its device.
  """
  import flax
  import jax

  notes = []
  for name, value in FIXED_SETTINGS.items():
    config = flax.config if name.startswith("flax_") else jax.config
    if not hasattr(config, name):  # a setting of another version
      continue
    found = getattr(config, name)
    config.update(name, value)
    if getattr(config, name) != found:
      notes.append(f"{name.upper()} is ignored: a run computes with {name}={value}")
  if (precision := jax.config.jax_default_matmul_precision) is not None:
    effect = "is used: resuming without it changes rounding"
    notes.append(f"JAX_DEFAULT_MATMUL_PRECISION={precision} {effect}")
  return notes
