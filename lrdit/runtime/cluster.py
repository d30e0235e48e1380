"""The processes of a job: how they find each other, meet and stop together."""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lrdit.runtime import lost_peers
from lrdit.runtime.errors import RESTART_STATUS, UserError, end_process
from lrdit.runtime.parallel import AXIS

log = logging.getLogger("lrdit")

HEARTBEAT_SECONDS = 20  # The others end when a process has been silent for this long.
START_SECONDS = 300  # All processes must start within this time.
LOGGED_AFTER_SECONDS = 5  # A longer wait for the others is logged.
SHUTDOWN_SECONDS = 24 * 3600  # At the end, the others wait while the first process writes.
MAX_PROCESSES = 2**31 - 1
# Launchers set these variables to the number of processes.
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
NOT_REACHED = (
  "the other processes cannot be reached ({}): check that all are started, and --coordinator, "
  "--num_processes and --process_id; {}"
)


def detection_method(environment: Mapping[str, str]) -> str | None:
  """Return how a process that mpirun, srun or a TPU pod started finds the others.

  The result is "jax" where jax finds the coordinator itself, "mpi4py" where it needs that package
  (every MPI but Open MPI 4), or None for a process on its own.
  """

  def count(name: str) -> int:
    value = environment.get(name) or "1"  # a script may set it to ""
    if not value.strip().isdecimal():
      raise UserError(
        f"{name}={value} in the environment is not a number of processes: correct or unset it, or "
        "give --num_processes=1 to stay alone",
        2,
      )
    return int(value)

  # The processes of mpirun may belong to a SLURM step too, but not the other way round. With
  # --mpi=pmi2, srun sets PMI_SIZE as MPICH and Intel MPI do, but to the size of its step.
  if count("OMPI_COMM_WORLD_SIZE") > 1:
    return "jax" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
  if count("PMI_SIZE") > 1 and count("PMI_SIZE") != count("SLURM_STEP_NUM_TASKS"):
    return "mpi4py"
  if count("SLURM_STEP_NUM_TASKS") > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
    return "jax"
  # Nothing else distinguishes the hosts of a TPU pod from a single one.
  has_chips = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
  is_pod = "TPU_SKIP_MDS_QUERY" not in environment and has_chips
  return "jax" if is_pod and importlib.util.find_spec("libtpu") else None


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where the processes of a job meet; fields are None where jax finds them itself."""

  coordinator: str | None = None  # "HOST:PORT" at which the first process listens
  num_processes: int | None = None
  process_id: int | None = None  # from 0
  detection: str | None = None  # jax's cluster_detection_method

  @property
  def process_name(self) -> str:
    """Prefix of this process's log lines before it has met the others."""
    return "a process: " if self.process_id is None else f"process {self.process_id}: "

  @property
  def how_to_stay_alone(self) -> str:
    """The fix where there are no other processes, as in an interactive shell of several tasks."""
    if self.num_processes is not None:
      return "leave out these flags to run this process alone"
    counts = [f"{name}={os.environ[name]}" for name in COUNTS if os.environ.get(name)]
    reason = f" (there are several by {' '.join(counts)})" if counts else ""
    return f"--num_processes=1 runs this process alone{reason}"


def find_cluster(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Cluster | None:
  """Return the cluster that the flags or else the environment describe, or None for one process.

  The flags are given together or not at all, except that num_processes=1 alone overrides the
  environment.
  """
  given = (coordinator, num_processes, process_id)
  if num_processes is not None and not 1 <= num_processes <= MAX_PROCESSES:
    raise UserError(f"--num_processes={num_processes} must be in [1, {MAX_PROCESSES}]", 2)
  if num_processes == 1 and process_id in (None, 0):
    return None
  if given == (None, None, None):
    return _detect()
  if None in given:
    raise UserError("--coordinator, --num_processes and --process_id go together: give all", 2)
  if not 0 <= process_id < num_processes:
    rule = f"is not in [0, {num_processes}): it counts from 0, and --num_processes={num_processes}"
    raise UserError(f"--process_id={process_id} {rule}", 2)
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    rule = f"is not HOST:PORT, the address of process 0 with a port from 1 to {2**16 - 1}"
    raise UserError(f"--coordinator={coordinator} {rule}", 2)
  return Cluster(*given)


def _detect() -> Cluster | None:
  method = detection_method(os.environ)
  if method != "mpi4py":
    return method and Cluster()
  try:
    importlib.import_module("mpi4py.MPI")
  except (ImportError, RuntimeError) as error:
    raise UserError(
      f"this MPI leaves it to mpi4py to find the first process, which does not work ({error}): "
      "install mpi4py and the MPI it is for, or give --coordinator, --num_processes and "
      "--process_id",
      2,
    ) from error
  return Cluster(detection=method)


def connect(cluster: Cluster, shares_sigterm: bool) -> None:
  """Join the processes of a job; call this before any device is used.

  With `shares_sigterm`, SIGTERM makes `is_preempted` true in all processes instead of ending this
  one. From now on, this process ends in one line when it loses another.
  """
  jax.config.update("jax_enable_preemption_service", shares_sigterm)
  try:
    with _limited_wait(cluster), lost_peers.reported():
      jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster_detection_method=cluster.detection,
        initialization_timeout=2 * START_SECONDS,  # `_limited_wait` gives up first
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
      )
  except Exception as error:  # a wrong address or variable makes jax raise many types
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(NOT_REACHED.format(cause, cluster.how_to_stay_alone), RESTART_STATUS) from error
  _open_connections()


@contextlib.contextmanager
def _limited_wait(cluster: Cluster) -> Iterator[None]:
  """Log that this process waits for the others, and end it after `START_SECONDS`."""
  # jax would abort from one of its threads, with a stack trace that nothing can catch.
  met = threading.Event()

  def watch() -> None:
    if met.wait(LOGGED_AFTER_SECONDS):
      return
    log.warning(
      "waiting for the other processes, up to %d s: %s", START_SECONDS, cluster.how_to_stay_alone
    )
    if met.wait(START_SECONDS - LOGGED_AFTER_SECONDS):
      return
    cause = f"not all came within {START_SECONDS} s"
    error = UserError(NOT_REACHED.format(cause, cluster.how_to_stay_alone), RESTART_STATUS)
    end_process(error, False, cluster.process_name)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    met.set()


def _open_connections() -> None:
  """Run each kind of collective once."""
  # On CPUs, the first collective of a kind fails if a process is 30 s behind another, which may
  # happen later in a run. Those that follow wait without a limit.
  counts = multihost_utils.process_allgather(np.int32(jax.local_device_count()))
  if len(set(counts.tolist())) > 1:
    raise UserError(f"the processes have {counts.tolist()} devices: each must have as many")
  multihost_utils.broadcast_one_to_all(np.int32(0))
  ones = np.ones((jax.local_device_count(), 1), np.float32)
  jax.block_until_ready(jax.pmap(lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS)(ones))


def num_processes() -> int:
  """Return the number of processes."""
  return jax.process_count()


def process_id() -> int:
  """Return this process's index, from 0."""
  return jax.process_index()


def process_name() -> str:
  """Return the prefix of this process's log lines, where it is one of several."""
  return f"process {jax.process_index()}: "


def is_first() -> bool:
  """Return whether this process reads and writes the workdir."""
  return jax.process_index() == 0


def from_first(tree: Any) -> Any:
  """Return the first process's tree on every process.

  The tree holds numpy arrays or scalars of at most 32 bits. The other processes pass a tree with
  the same structure, shapes and dtypes.
  """
  if jax.process_count() == 1:
    return tree
  return multihost_utils.broadcast_one_to_all(tree)


def json_from_first(make: Callable[[], Any]) -> Any:
  """Return what `make` returns on the first process, as JSON, on every process.

  The others do not call it.
  """
  text = json.dumps(make() if is_first() else None, sort_keys=True).encode()
  own = np.frombuffer(text, np.uint8)
  size = int(from_first(np.int32(len(own))))
  return json.loads(bytes(from_first(np.resize(own, size))))


def is_preempted(num_calls: int) -> bool:
  """Return whether all processes stop now because one of them got SIGTERM.

  All processes ask before every step and get the same answer. `num_calls` counts this process's
  earlier calls.
  """
  # jax answers at the number after the highest that any process has asked with. Step numbers would
  # never reach it if the signal came before the first question.
  return multihost_utils.reached_preemption_sync_point(num_calls)
