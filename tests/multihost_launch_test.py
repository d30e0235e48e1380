"""The launch files of several processes, with a stand-in for main.py and for the clusters."""

import functools
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import pytest

from tests import scripts, tiny
from tests.scripts import LAUNCH

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TIMEOUT = 40  # of each command with stand-ins
finish = functools.partial(scripts.finish, timeout=TIMEOUT)
wait_until = functools.partial(scripts.wait_until, timeout=TIMEOUT)

# Records that it was started, then does what the test says.
MAIN = r"""
import json, os, pathlib, signal, sys, time

flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
process = int(flags.get("process_id", os.environ.get("SLURM_PROCID", 0)))
records = pathlib.Path(os.environ["RECORDS"])
start = len(list(records.glob(f"{process}.*")))
record = {"pid": os.getpid(), "argv": sys.argv[1:], "environment": dict(os.environ)}
(records / "new").mkdir(exist_ok=True)
(records / "new" / f"{process}").write_text(json.dumps(record))
(records / "new" / f"{process}").rename(records / f"{process}.{start}")


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def save_on_sigterm(*_):
  print("saved", flush=True)
  os._exit(0)


def finish(step=10):
  workdir = pathlib.Path(flags["workdir"])
  (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text('{"training": {"num_steps": 10}}')


exec(os.environ["BEHAVIOUR"])
"""
# As a training and as an export behave: the export dies of SIGTERM.
DRAW = "open(records / f'{process}.ready', 'w'); time.sleep(60)"
SERVE = f"signal.signal(signal.SIGTERM, save_on_sigterm); {DRAW}"


@pytest.fixture
def checkout(tmp_path):
  root = scripts.copy_checkout(tmp_path / "checkout", "launch")
  (root / "main.py").write_text(MAIN)
  for directory in ("configs", "lrdit", "bin"):
    (root / directory).mkdir()
  for file in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
    (root / file).touch()
  (root / ".venv" / "bin").mkdir(parents=True)
  (root / ".venv" / "bin" / "activate").touch()
  (tmp_path / "records").mkdir()
  yield root
  for path in (tmp_path / "records").glob("*.[0-9]*"):  # what a failed test has left
    pid = json.loads(path.read_text())["pid"]
    if is_running(pid) and "main.py" in pathlib.Path(f"/proc/{pid}/cmdline").read_text():
      os.kill(pid, signal.SIGKILL)


def start(checkout, command, behaviour="", **environment):
  """Starts a command in the checkout, with stand-ins first in its PATH."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
  for_main = {"RECORDS": str(checkout.parent / "records"), "BEHAVIOUR": behaviour}
  return scripts.start(command, checkout, clean | for_main | environment, [checkout / "bin"])


def run(*args, **environment):
  return finish(start(*args, **environment))


def wait_for_ready(checkout, count, process):
  """Until so many processes of a started command are at work."""
  paths = [checkout.parent / "records" / f"{i}.ready" for i in range(count)]
  wait_until(lambda: all(path.exists() for path in paths), process)


def records(checkout, process):
  """What was recorded by each start of a process."""
  paths = sorted((checkout.parent / "records").glob(f"{process}.[0-9]*"))
  return [json.loads(path.read_text()) for path in paths]


def is_running(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def wait_for_none(checkout):
  started = [json.loads(p.read_text()) for p in (checkout.parent / "records").glob("*.[0-9]*")]
  assert started
  wait_until(lambda: not any(is_running(record["pid"]) for record in started))


def write_command(checkout, name, text):
  path = checkout / "bin" / name
  path.write_text(text)
  path.chmod(0o755)


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n# ")
  assert "\nset -euo pipefail\n" in text
  assert "\t" not in text
  assert not any(line != line.rstrip() for line in text.splitlines())
  checkers = [["bash", "-n"]]
  if shutil.which("shellcheck"):
    checkers.append(["shellcheck", "--external-sources", "--exclude=SC1091,SC2034"])
  for checker in checkers:
    done = finish(scripts.start([*checker, script], tiny.ROOT, os.environ))
    assert done == (0, "", "")


@pytest.mark.parametrize("script", ["multihost_local.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_help(checkout, script):
  scripts.assert_help(run(checkout, ["bash", f"launch/{script}", "--help"]), script)


@pytest.mark.parametrize(
  ("script", "flags", "environment", "words"),
  [
    ("multihost_local.sh", [], {}, "N, the number of processes, is missing"),
    ("multihost_local.sh", ["--workdir=w"], {}, "N=--workdir=w: a whole number from 1"),
    ("multihost_local.sh", ["0"], {}, "N=0: a whole number from 1"),
    ("multihost_local.sh", ["2"], {"RESTARTS": "x"}, "RESTARTS=x: a whole number from 0"),
    ("multihost_local.sh", ["2", "--process_id=1"], {}, "--process_id=1: this script sets it"),
    ("slurm.sbatch", ["--config=c"], {"SLURM_JOB_ID": "1"}, "--workdir=DIR is missing"),
    ("slurm.sbatch", ["--workdir=w"], {}, "submit it by sbatch"),
    ("tpu_pod.sh", ["--workdir=/w"], {"TPU": "t"}, "TPU and ZONE are missing"),
    ("tpu_pod.sh", ["--workdir=w"], {"TPU": "t", "ZONE": "z"}, "not an absolute path"),
  ],
)
def test_a_wrong_argument_ends_with_the_usage(checkout, script, flags, environment, words):
  done = run(checkout, ["bash", f"launch/{script}", *flags], **environment)
  scripts.assert_wrong_argument(done, script, words)


# multihost_local.sh


def local(num_processes, *flags):
  return ["bash", "launch/multihost_local.sh", num_processes, "--workdir=w", *flags]


def test_processes_get_their_flags_and_their_lines_a_prefix(checkout):
  behaviour = "print('out', process); print('err', process, file=sys.stderr)"
  command = local(3, "--config.data.name=a 'b' $c")
  status, stdout, stderr = run(checkout, command, behaviour, DEVICES="2")
  assert status == 0, stderr
  assert sorted(stdout.splitlines()) == [f"[{i}] out {i}" for i in range(3)]
  assert sorted(stderr.splitlines()) == [f"[{i}] err {i}" for i in range(3)]
  (coordinator,) = {records(checkout, i)[0]["argv"][2] for i in range(3)}
  assert coordinator.startswith("--coordinator=localhost:")
  for i in range(3):
    (record,) = records(checkout, i)
    assert record["argv"] == [
      *("--workdir=w", "--config.data.name=a 'b' $c", coordinator),
      *("--num_processes=3", f"--process_id={i}"),
    ]
    assert record["environment"]["JAX_PLATFORMS"] == "cpu"
    assert record["environment"]["JAX_NUM_CPU_DEVICES"] == "2"


def test_when_one_process_dies_the_others_are_ended_and_all_start_again(checkout):
  """Process 0 hangs and swallows SIGTERM, process 2 ends by it."""
  behaviour = """
if start == 0:
  if process == 0:
    signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
    while True:
      time.sleep(60)
  if process == 2:
    time.sleep(60)
  while not (records / "0.0").exists() or not (records / "2.0").exists():
    time.sleep(0.01)
  time.sleep(0.3)
  die()
"""
  status, stdout, stderr = run(checkout, local(3), behaviour, GRACE="1")
  assert status == 0, stderr
  assert stdout == "[0] told\n"
  assert stderr.splitlines() == [
    "== process 1 ended with status 137",
    "== all start again (restart 1 of 3)",
  ]
  assert [len(records(checkout, i)) for i in range(3)] == [2, 2, 2]
  wait_for_none(checkout)


def test_restarts_are_counted(checkout):
  status, _, stderr = run(checkout, local(2), "os._exit(139)", RESTARTS="2")
  assert status == 139
  assert [len(records(checkout, i)) for i in range(2)] == [3, 3]
  assert stderr.splitlines()[-1] == "== given up after 2 restarts"


WHO = ("", "a process: ", "process 0: ", "process 1: ", "process 12: ")
ERROR = "print('process 0: error: no such data', file=sys.stderr, flush=True); os._exit({})"


@pytest.mark.parametrize("mistake", [1, 2])
def test_a_mistake_of_the_users_ends_it(checkout, mistake):
  """Even though the other process crashes as a consequence."""
  behaviour = f"""
if process == 1:
  while not (records / "0.0").exists():
    time.sleep(0.01)
  time.sleep(0.2)
  os._exit(134)
{ERROR.format(mistake)}
"""
  status, _, stderr = run(checkout, local(2), behaviour)
  assert status == mistake
  assert stderr.splitlines() == [
    "[0] process 0: error: no such data",
    f"== process 0 ended with status {mistake}",
  ]
  assert [len(records(checkout, i)) for i in range(2)] == [1, 1]


ANOTHER_ENDED = (
  "print('process 0: error: another process has ended', file=sys.stderr, flush=True); os._exit(75)"
)
NOT_REACHED = ANOTHER_ENDED.replace(
  "another process has ended", "the other processes cannot be reached"
)


@pytest.mark.parametrize(
  ("failure", "expected", "restarts"),
  [
    *((f"print('{who}error: x', file=sys.stderr); sys.exit(1)", 1, 0) for who in WHO),
    ("die()", 137, 1),
  ],
)
def test_the_cause_is_told_from_its_consequence(checkout, failure, expected, restarts):
  """Though they are seen at once."""
  behaviour = f"""
if process == 1: {failure}
while not (records / f"1.{{start}}").exists():
  time.sleep(0.01)
{ANOTHER_ENDED}
"""
  status, _, stderr = run(checkout, local(2), behaviour, RESTARTS="1")
  assert status == expected
  assert f"== process 1 ended with status {expected}" in stderr.splitlines()
  assert "== process 0" not in stderr
  assert len(records(checkout, 1)) == 1 + restarts


@pytest.mark.parametrize(
  "behaviour",
  [
    "sys.exit(1)",  # no error: line
    ERROR.format(70),
    # The error is the consequence of another's death.
    f"if process == 1: die()\ntime.sleep(1)\n{ERROR.format(1)}",
  ],
  ids=["no-line", "status-70", "after-a-death"],
)
def test_what_is_no_mistake_is_started_again(checkout, behaviour):
  status, _, stderr = run(checkout, local(2), behaviour, RESTARTS="1")
  assert status != 0
  assert stderr.splitlines()[-1] == "== given up after 1 restarts"
  assert len(records(checkout, 0)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(checkout, number):
  """To the whole group of the script, as a terminal or a supervisor sends it."""
  process = start(checkout, local(2), SERVE)
  wait_for_ready(checkout, 2, process)
  os.killpg(process.pid, number)
  status, stdout, stderr = finish(process)
  assert (status, stderr) == (0, "")
  assert sorted(stdout.splitlines()) == ["[0] saved", "[1] saved"]
  assert [len(records(checkout, i)) for i in range(2)] == [1, 1]
  wait_for_none(checkout)


def test_an_export_that_dies_of_the_signal_is_not_started_again(checkout):
  process = start(checkout, local(2, "--mode=sample"), DRAW)
  wait_for_ready(checkout, 2, process)
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  status, _, stderr = finish(process)
  assert (status, stderr) == (143, "== process 0 ended with status 143\n")
  assert time.monotonic() - began < 20  # not GRACE
  assert [len(records(checkout, i)) for i in range(2)] == [1, 1]
  wait_for_none(checkout)


def test_an_export_that_lost_a_process_to_a_signal_is_started_again(checkout):
  behaviour = f"""
if process == 1 and start == 0: os.kill(os.getpid(), signal.SIGTERM)
while not (records / f"1.{{start}}").exists():
  time.sleep(0.01)
if start == 0:
  {ANOTHER_ENDED}
"""
  status, _, stderr = run(checkout, local(2, "--mode=sample"), behaviour)
  assert status == 0, stderr
  assert "== process 1 ended with status 143" in stderr.splitlines()
  assert [len(records(checkout, i)) for i in range(2)] == [2, 2]


def test_what_does_not_stop_is_killed_and_not_started_again(checkout):
  behaviour = SERVE.replace("save_on_sigterm", "signal.SIG_IGN")
  process = start(checkout, local(2), behaviour, GRACE="1")
  wait_for_ready(checkout, 2, process)
  process.send_signal(signal.SIGTERM)
  status, _, stderr = finish(process)
  assert (status, stderr) == (137, "== process 0 ended with status 137\n")
  wait_for_none(checkout)


def test_nothing_outlives_the_killed_script(checkout):
  process = start(checkout, local(2), SERVE)
  wait_for_ready(checkout, 2, process)
  process.kill()
  wait_for_none(checkout)
  finish(process)


@pytest.mark.slow
def test_the_real_main_is_stopped_and_killed_and_goes_on(tmp_path):
  root = scripts.copy_checkout(tmp_path / "checkout", "configs", "launch", "lrdit", "main.py")
  workdir, steps = tmp_path / "w", 200
  flags = tiny.command(workdir, f"--config.training.num_steps={steps}")[2:]
  command = ["bash", "launch/multihost_local.sh", 2, *flags]
  process = scripts.start(command, root, tiny.environment())
  scripts.wait_until(lambda: scripts.has_lines(workdir / "metrics.jsonl", 3), process)
  process.send_signal(signal.SIGTERM)
  status, _, stderr = scripts.finish(process)
  assert status == 0, stderr
  assert stderr.count("[0] process 0: stopped by SIGTERM at step") == 1
  assert "==" not in stderr  # nothing was killed or started again
  stopped_at = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
  assert 3 <= stopped_at < steps

  process = scripts.start(command, root, tiny.environment())
  scripts.wait_until(lambda: scripts.has_lines(workdir / "metrics.jsonl", stopped_at + 3), process)
  os.kill(pid_of(f"--workdir={workdir}", "--process_id=1"), signal.SIGKILL)
  status, _, stderr = scripts.finish(process)
  assert status == 0, stderr
  assert f"[0] process 0: resuming from the checkpoint of step {stopped_at}" in stderr
  assert stderr.count("== all start again (restart 1 of 3)") == 1
  assert (workdir / "checkpoints" / str(steps)).is_dir()
  assert [line["step"] for line in tiny.read_metrics(workdir)] == list(range(1, steps + 1))


def pid_of(*arguments):
  """Of the process whose command line has all of these."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_text().split("\0")
    except OSError:  # it has ended
      continue
    if set(arguments) <= set(words):
      return int(path.parent.name)
  raise AssertionError(f"no process of {arguments}")


# slurm.sbatch

# Records its options; runs SLURM_NTASKS tasks and labels their lines. As srun does, it ends all
# once one has failed (--kill-on-bad-exit), and its status is the highest of theirs.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, threading, time

words = sys.argv[1:]
with (pathlib.Path(os.environ["RECORDS"]) / "srun").open("a") as file:
  file.write(" ".join(words) + " ")
while words[0].startswith("--"):
  del words[0]


def relabel(stream, output, label):
  for line in stream:
    output.write(label + line)
    output.flush()


tasks, readers = [], []
for i in range(int(os.environ.get("SLURM_NTASKS", 1))):
  environment, pipe = os.environ | {{"SLURM_PROCID": str(i)}}, subprocess.PIPE
  task = subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
  tasks.append(task)
  for stream, output in ((task.stdout, sys.stdout), (task.stderr, sys.stderr)):
    readers.append(threading.Thread(target=relabel, args=(stream, output, f"{{i}}: ")))
    readers[-1].start()
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
told = False
while None in (statuses := [task.poll() for task in tasks]):
  if not told and any(statuses):
    time.sleep(0.3)
    [task.terminate() for task in tasks]
    told = True
  time.sleep(0.02)
for reader in readers:
  reader.join()
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$RECORDS/scontrol"\n'
SLURM = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}
SQUEUE = '#!/usr/bin/env bash\n[[ "$*" == *--jobs=17*%e ]] && cat "$RECORDS/end"\n'


@pytest.fixture
def slurm(checkout):
  write_command(checkout, "srun", SRUN)
  write_command(checkout, "scontrol", SCONTROL)
  # SLURM runs a copy from elsewhere.
  script = checkout.parent / "slurm_script"
  shutil.copy(checkout / "launch" / "slurm.sbatch", script)
  SLURM["SLURM_SUBMIT_DIR"] = str(checkout)
  return ["bash", script, "--workdir=runs/w", "--config.data.name=a b"]


def requeued(checkout):
  path = checkout.parent / "records" / "scontrol"
  return path.read_text().splitlines() if path.exists() else []


def test_slurm_options():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
  # Below its first command sbatch reads no options.
  assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index(
    "set -euo pipefail"
  )
  values = dict(option.partition("=")[::2] for option in options)
  assert {"nodes", "requeue", "time"} <= values.keys()
  assert values["signal"] == "TERM@120"  # not B:, which would reach the script alone
  assert values["open-mode"] == "append"
  assert values["ntasks-per-node"] == values["gpus-per-node"]


def test_slurm_a_finished_run_is_not_requeued(checkout, slurm):
  status, stdout, stderr = run(checkout, slurm, "print('done'); finish()", **SLURM)
  assert (status, stdout, stderr) == (0, "0: done\n", "")
  assert requeued(checkout) == []
  assert records(checkout, 0)[0]["argv"] == ["--workdir=runs/w", "--config.data.name=a b"]
  options = (checkout.parent / "records" / "srun").read_text()
  for option in ("--kill-on-bad-exit=1", "--label", "--gpu-bind=none", "--cpus-per-task=8"):
    assert f"{option} " in options


@pytest.mark.parametrize("behaviour", ["finish(step=9)", "pass"])
def test_slurm_a_run_stopped_before_its_end_is_requeued(checkout, slurm, behaviour):
  status, _, stderr = run(checkout, slurm, behaviour, **SLURM)
  assert status == 0, stderr
  assert requeued(checkout) == ["requeue 17"]
  assert len(records(checkout, 0)) == 1


def test_slurm_other_modes_end(checkout, slurm):
  status, _, stderr = run(checkout, [*slurm, "--mode=sample"], "pass", **SLURM)
  assert (status, requeued(checkout)) == (0, []), stderr


@pytest.mark.parametrize("who", WHO)
def test_slurm_a_mistake_is_not_requeued(checkout, slurm, who):
  """Which the last task alone sees."""
  behaviour = f"""
if process == 1:
  print("{who}error: no such data", file=sys.stderr, flush=True)
  os._exit(1)
{ANOTHER_ENDED}
"""
  environment = SLURM | {"SLURM_NTASKS": "2", "SLURM_JOB_END_TIME": str(int(time.time()) + 60)}
  status, stdout, _ = run(checkout, slurm, behaviour, **environment)
  assert status == 75  # srun's: the highest
  assert f"1: {who}error: no such data" in stdout.splitlines()
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 1)


def test_slurm_a_crash_is_started_again_within_the_job(checkout, slurm):
  behaviour = f"""
if start == 0: die()
if start == 1: {ANOTHER_ENDED}
if start == 2: {NOT_REACHED}
finish()
"""
  status, _, stderr = run(checkout, slurm, behaviour, **SLURM)
  assert status == 0, stderr
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 4)


def test_slurm_crashes_are_given_up(checkout, slurm):
  status, _, stderr = run(checkout, slurm, "die()", RESTARTS="1", **SLURM)
  assert (status, stderr.splitlines()[-1]) == (137, "== given up after 1 restarts")
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 2)


def test_slurm_a_crash_near_the_time_limit_is_requeued(checkout, slurm):
  end = str(int(time.time()) + 60)
  status, _, stderr = run(checkout, slurm, "die()", SLURM_JOB_END_TIME=end, **SLURM)
  assert status == 0, stderr
  assert (requeued(checkout), len(records(checkout, 0))) == (["requeue 17"], 1)


@pytest.mark.parametrize("variable", [True, False], ids=["variable", "squeue"])
def test_slurm_what_dies_of_the_signal_near_the_time_limit_is_requeued(checkout, slurm, variable):
  """SLURM sends SIGTERM to the tasks (--signal), not to the script."""
  end, environment = int(time.time()) + 150, SLURM | {"SLURM_NTASKS": "2"}
  if variable:
    environment["SLURM_JOB_END_TIME"] = str(end)
  else:
    write_command(checkout, "squeue", SQUEUE)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end))
    (checkout.parent / "records" / "end").write_text(text)
  process = start(checkout, [*slurm, "--mode=sample"], DRAW, **environment)
  wait_for_ready(checkout, 2, process)
  for i in range(2):
    os.kill(records(checkout, i)[0]["pid"], signal.SIGTERM)
  status, _, stderr = finish(process)
  assert status == 0, stderr
  assert "== srun ended with status 143" in stderr.splitlines()
  assert requeued(checkout) == ["requeue 17"]
  assert [len(records(checkout, i)) for i in range(2)] == [1, 1]


@pytest.mark.parametrize("limit", ["", "N/A"])
def test_slurm_what_dies_of_a_signal_earlier_is_started_again_within_the_job(
  checkout, slurm, limit
):
  write_command(checkout, "squeue", SQUEUE)
  (checkout.parent / "records" / "end").write_text(limit)
  behaviour = "if start == 0: os.kill(os.getpid(), signal.SIGTERM)"
  status, _, stderr = run(checkout, [*slurm, "--mode=evaluate"], behaviour, **SLURM)
  assert (status, requeued(checkout)) == (0, []), stderr
  assert len(records(checkout, 0)) == 2


@pytest.mark.parametrize(("behaviour", "words"), [(SERVE, "saved"), (DRAW, "")])
def test_slurm_a_cancelled_job_ends_and_is_not_requeued(checkout, slurm, behaviour, words):
  """scancel sends SIGTERM to the script and what it started."""
  environment = SLURM | {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)}
  process = start(checkout, slurm, behaviour, **environment)
  wait_for_ready(checkout, 1, process)
  os.killpg(process.pid, signal.SIGTERM)
  status, stdout, stderr = finish(process)
  assert status == 143, stderr
  assert words in stdout
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 1)
  wait_for_none(checkout)


# kubernetes.yaml


@pytest.fixture(scope="module")
def manifests():
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def values(container):
  """Its environment, but for what Kubernetes fills in."""
  return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def test_kubernetes_fields_fit_together(manifests):
  service, job = manifests
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  environment = values(container)
  name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
  assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
  assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
  assert (job["apiVersion"], job["kind"], pod["subdomain"]) == ("batch/v1", "Job", name)
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == int(environment["NUM_PROCESSES"])
  assert environment["COORDINATOR"] == f"{job['metadata']['name']}-0.{name}:{port}"
  assert all(isinstance(value, str) for value in environment.values())
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 60
  assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
  rules = spec["podFailurePolicy"]["rules"]
  codes = {rule["action"]: rule["onExitCodes"] for rule in rules if "onExitCodes" in rule}
  assert all(code["containerName"] == container["name"] for code in codes.values())
  assert (codes["FailJob"]["values"], codes["Ignore"]["values"]) == ([1, 2], [75])
  assert rules[-1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


@pytest.fixture
def pod(checkout, manifests):
  """(command, environment) of the container, of index 1, on a disk of its own."""
  (container,) = manifests[1]["spec"]["template"]["spec"]["containers"]
  filled_in = {item["name"] for item in container["env"]} - values(container).keys()
  assert filled_in == {"JOB_UID"}
  environment = values(container) | {"JOB_UID": "a-1", "JOB_COMPLETION_INDEX": "1"}
  environment |= {"WORKDIR": str(checkout / "w"), "NUM_STEPS": "10"}
  (checkout / "w").mkdir()
  # Kubernetes would expand these before bash sees them.
  assert not any(f"$({name})" in container["args"][0] for name in environment)
  return container["command"] + container["args"], environment


def test_kubernetes_a_finished_run_completes_the_pod(checkout, pod):
  command, environment = pod
  status, _, stderr = run(checkout, command, "finish()", **environment)
  assert status == 0, stderr
  (record,) = records(checkout, 1)
  flags = {"--process_id=1", "--num_processes=2", "--coordinator=lrdit-0.lrdit:8476"}
  assert flags | {f"--workdir={checkout / 'w'}", "--config.training.num_steps=10"} <= set(
    record["argv"]
  )
  # A pod made again after the end has nobody to connect to.
  assert run(checkout, command, "die()", **environment)[0] == 0
  assert len(records(checkout, 1)) == 1


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_kubernetes_a_finished_export_completes_the_pods_of_its_job(checkout, pod, mode):
  command, environment = pod
  environment = environment | {"MODE": mode}
  assert run(checkout, command, "", **environment)[0] == 0
  assert f"--mode={mode}" in records(checkout, 1)[0]["argv"]
  assert run(checkout, command, "die()", **environment)[0] == 0
  assert len(records(checkout, 1)) == 1
  for other in ({"JOB_UID": "b-2"}, {"MODE": "train"}):
    assert run(checkout, command, "die()", **environment | other)[0] == 137
  assert len(records(checkout, 1)) == 3


@pytest.mark.parametrize(
  ("mode", "behaviour", "words"), [("train", SERVE, "saved\n"), ("sample", DRAW, "")]
)
def test_kubernetes_sigterm_is_passed_on_and_is_no_completion(
  checkout, pod, mode, behaviour, words
):
  command, environment = pod
  environment = environment | {"MODE": mode}
  process = start(checkout, command, behaviour, **environment)
  wait_until((checkout.parent / "records" / "1.ready").exists, process)
  process.send_signal(signal.SIGTERM)
  status, stdout, _ = finish(process)
  assert status == 75
  assert stdout.startswith(words)
  wait_for_none(checkout)
  assert run(checkout, command, "die()", **environment)[0] == 137  # it begins again


def test_kubernetes_a_stop_by_another_pod_is_no_completion(checkout, pod):
  command, environment = pod
  write_command(checkout, "sleep", "#!/bin/sh\n")
  assert run(checkout, command, "pass", **environment)[0] == 75


def test_kubernetes_waits_for_the_disk_to_show_the_end(checkout, pod):
  command, environment = pod
  write_command(checkout, "sleep", '#!/bin/sh\nmkdir -p "$WORKDIR/checkpoints/$NUM_STEPS"\n')
  assert run(checkout, command, "pass", **environment)[0] == 0


@pytest.mark.parametrize(
  ("behaviour", "expected"),
  [
    ("die()", 137),
    ("sys.exit(2)", 2),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143),  # not by way of the pod
  ],
)
def test_kubernetes_failures_keep_their_status(checkout, pod, behaviour, expected):
  command, environment = pod
  assert run(checkout, command, behaviour, **environment)[0] == expected


# tpu_pod.sh

# Answers `describe` from a list of states and of gcloud's errors; runs what is meant for the hosts
# on this machine, in a home directory of its own, except for the installation.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
verb="$4" command="" target=""
for argument in "$@"; do
  case "$argument" in
    --command=*) command="${argument#*=}" ;;
  esac
done
printf '%s\\n' "$verb" >> "$RECORDS/gcloud"
case "$verb" in
  describe)
    state="$(head -n 1 "$RECORDS/states")"
    if (($(wc -l < "$RECORDS/states") > 1)); then sed -i 1d "$RECORDS/states"; fi
    if [[ "$state" == ERROR:* ]]; then echo "$state" >&2; exit 1; fi
    echo "$state"
    ;;
  create) printf '%s ' "$@" >> "$RECORDS/create" ;;
  scp) tar -tzf "$5" > "$RECORDS/archive" ;;
  ssh)
    if [[ "$command" == *"python install"* ]]; then
      echo install >> "$RECORDS/gcloud"
    else
      cd "$(dirname "$RECORDS")/home"
      exec bash -c "$command"
    fi
    ;;
esac
"""
DESCRIBE_ERROR = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) "
NOT_THERE = f"{DESCRIBE_ERROR}NOT_FOUND: Resource 'projects/p/locations/z/nodes/pod' was not found"
NO_PERMISSION = f"{DESCRIBE_ERROR}PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on resource"
NO_PERMISSION += " 'projects/p/locations/z/nodes/pod' (or it may not exist)"
NO_PROJECT = f"{DESCRIBE_ERROR}NOT_FOUND: Project 'p' not found or deleted"
NO_NETWORK = "ERROR: gcloud crashed (TransportError): HTTPSConnectionPool: Max retries exceeded"
TPU = {"TPU": "pod", "ZONE": "z", "RETRY_SECONDS": "0"}


@pytest.fixture
def tpu(checkout):
  write_command(checkout, "gcloud", GCLOUD)
  home = checkout.parent / "home"
  home.mkdir()
  (home / "lrdit").symlink_to(checkout)
  workdir = f"--workdir={checkout.parent / 'w'}"
  return ["bash", "launch/tpu_pod.sh", workdir, "--config.data.name=a 'b' $c"]


def set_states(checkout, *states):
  (checkout.parent / "records" / "states").write_text("".join(f"{state}\n" for state in states))


def gcloud_calls(checkout, *verbs):
  calls = (checkout.parent / "records" / "gcloud").read_text().splitlines()
  return [call for call in calls if call in verbs]


def test_tpu_installs_prepares_and_runs(checkout, tpu):
  set_states(checkout, "READY")
  prepare = 'echo "prepared" > "$RECORDS/prepared"'
  status, _, stderr = run(checkout, tpu, "finish()", PREPARE=prepare, **TPU)
  assert status == 0, stderr
  assert gcloud_calls(checkout, "scp", "install", "create") == ["scp", "install"]
  archive = (checkout.parent / "records" / "archive").read_text().splitlines()
  assert {"main.py", "launch/setup.sh", "setup.cfg", "lrdit/"} <= set(archive)
  assert (checkout.parent / "records" / "prepared").exists()
  (record,) = records(checkout, 0)
  assert record["argv"] == tpu[2:]


def test_tpu_is_made_and_made_again_after_a_preemption(checkout, tpu):
  set_states(checkout, NOT_THERE, "CREATING", "PREEMPTED", "READY")
  behaviour = "finish() if start else None"  # stopped by SIGTERM at first
  environment = TPU | {"ACCELERATOR": "v4-32", "RESTARTS": "0"}
  status, _, stderr = run(checkout, tpu, behaviour, **environment)
  assert status == 0, stderr
  verbs = gcloud_calls(checkout, "create", "delete", "install")
  assert verbs == ["create", "install", "delete", "create", "install"]
  created = (checkout.parent / "records" / "create").read_text()
  assert created.count("--accelerator-type=v4-32 --version=tpu-ubuntu2204-base --spot") == 2


@pytest.mark.parametrize(
  ("state", "words"), [(NOT_THERE, "not there"), ("PREEMPTED", "PREEMPTED"), ("STOPPED", "stopped")]
)
def test_tpu_is_not_made_unasked(checkout, tpu, state, words):
  set_states(checkout, state)
  status, _, stderr = run(checkout, tpu, "finish()", **TPU)
  assert status == 1
  assert stderr.startswith(f"error: pod is {words}")
  assert gcloud_calls(checkout, "create", "delete") == []


@pytest.mark.parametrize("error", [NO_PERMISSION, NO_PROJECT, NO_NETWORK])
def test_tpu_what_cannot_be_looked_up_is_not_made(checkout, tpu, error):
  set_states(checkout, error, NOT_THERE)
  status, _, stderr = run(checkout, tpu, "finish()", **TPU, ACCELERATOR="v4-32")
  assert status == 1
  told, explained = stderr.splitlines()
  assert told == error
  assert explained.startswith("error: pod cannot be looked up: see gcloud's message above; ")
  assert gcloud_calls(checkout, "create", "delete") == []


def test_tpu_a_lost_network_changes_nothing(checkout, tpu):
  """While the TPU VM is being made, and while main.py is supervised."""
  set_states(checkout, "CREATING", NO_NETWORK, "READY", NO_NETWORK, NO_PERMISSION, "READY")
  behaviour = "if start == 0: sys.exit(255)  # as ssh ends\nfinish()"
  environment = TPU | {"ACCELERATOR": "v4-32", "RESTARTS": "1"}
  status, _, stderr = run(checkout, tpu, behaviour, **environment)
  assert status == 0, stderr
  assert gcloud_calls(checkout, "create", "delete", "install") == ["install"]
  assert len(records(checkout, 0)) == 2
  lines = stderr.splitlines()
  assert [lines.count(NO_NETWORK), lines.count(NO_PERMISSION)] == [2, 1]
  assert lines.count("== pod cannot be looked up: it is left as it is") == 3


def test_tpu_crashes_are_started_again_and_counted(checkout, tpu):
  set_states(checkout, "READY")
  behaviour = f"if start == 0: {ANOTHER_ENDED}\nif start == 1: {NOT_REACHED}\ndie()"
  status, _, stderr = run(checkout, tpu, behaviour, RESTARTS="2", **TPU)
  assert (status, stderr.splitlines()[-1]) == (137, "== given up after 2 restarts")
  assert len(records(checkout, 0)) == 3
  assert gcloud_calls(checkout, "install") == ["install"]


@pytest.mark.parametrize("who", WHO)
def test_tpu_a_mistake_ends_it(checkout, tpu, who):
  set_states(checkout, "READY")
  error = ERROR.format(1).replace("process 0: ", who)
  status, stdout, _ = run(checkout, tpu, error, **TPU)
  assert (status, stdout) == (1, f"{who}error: no such data\n")
  assert len(records(checkout, 0)) == 1


@pytest.mark.parametrize(
  ("mode", "behaviour", "expected"),
  [("train", SERVE, (0, "saved\n")), ("sample", DRAW, (143, "Terminated\n"))],  # bash's word
)
def test_tpu_a_signal_reaches_the_hosts(checkout, tpu, mode, behaviour, expected):
  set_states(checkout, "READY")
  process = start(checkout, [*tpu, f"--mode={mode}"], behaviour, **TPU)
  wait_for_ready(checkout, 1, process)
  process.send_signal(signal.SIGTERM)
  status, stdout, stderr = finish(process)
  assert (status, stdout) == expected, stderr
  assert len(records(checkout, 0)) == 1
  wait_for_none(checkout)


def test_tpu_what_an_earlier_start_left_is_stopped_first(checkout, tpu):
  set_states(checkout, "READY")
  left = start(checkout, [sys.executable, "main.py", "--process_id=5"], SERVE)
  wait_until((checkout.parent / "records" / "5.ready").exists, left)
  (checkout / "main.pid").write_text(f"{left.pid}\n")
  status, _, stderr = run(checkout, tpu, "finish()", **TPU)
  assert status == 0, stderr
  assert finish(left)[:2] == (0, "saved\n")
