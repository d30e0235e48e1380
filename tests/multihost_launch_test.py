"""The launch files of several processes, with a stand-in for main.py and for the clusters."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TIMEOUT = 40  # of each command

# Records that it was started, then does what the test says.
MAIN = r"""
import json, os, pathlib, signal, sys, time

flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
process = int(flags.get("process_id", 0))
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
  (workdir / "checkpoints" / str(step)).mkdir(parents=True)
  (workdir / "config.json").write_text('{"training": {"num_steps": 10}}')


exec(os.environ["BEHAVIOUR"])
"""
SERVE = "signal.signal(signal.SIGTERM, save_on_sigterm); open(records / f'{process}.ready', 'w');"
SERVE += "time.sleep(60)"


@pytest.fixture
def checkout(tmp_path):
  root = tmp_path / "checkout"
  shutil.copytree(LAUNCH, root / "launch")
  (root / "launch" / "setup.sh").write_text("")
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
  """Starts a command in the checkout, in a process group of its own."""
  path = f"{checkout / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
  return subprocess.Popen(
    [str(argument) for argument in command],
    cwd=checkout,
    env=clean
    | {"PATH": path, "RECORDS": str(checkout.parent / "records"), "BEHAVIOUR": behaviour}
    | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def finish(process):
  """(exit status, standard output, standard error)."""
  try:
    stdout, stderr = process.communicate(timeout=TIMEOUT)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  return process.returncode, stdout, stderr


def run(*args, **environment):
  return finish(start(*args, **environment))


def wait_until(condition):
  deadline = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


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
    checkers.append(["shellcheck", "--exclude=SC1091,SC2034"])
  for checker in checkers:
    done = subprocess.run([*checker, script], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", ["multihost_local.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_help(checkout, script):
  status, stdout, stderr = run(checkout, ["bash", f"launch/{script}", "--help"])
  assert (status, stderr) == (0, "")
  assert f"launch/{script}" in stdout
  assert "set -euo" not in stdout


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
  status, stdout, stderr = run(checkout, ["bash", f"launch/{script}", *flags], **environment)
  assert (status, stdout) == (2, "")
  error, usage = stderr.splitlines()
  assert error.startswith("error: ")
  assert words in error
  assert usage.startswith("Usage: ")


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


@pytest.mark.parametrize(
  ("failure", "expected", "restarts"),
  [("print('error: x', file=sys.stderr); sys.exit(1)", 1, 0), ("die()", 137, 1)],
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
  wait_until(lambda: all((checkout.parent / f"records/{i}.ready").exists() for i in range(2)))
  os.killpg(process.pid, number)
  status, stdout, stderr = finish(process)
  assert (status, stderr) == (0, "")
  assert sorted(stdout.splitlines()) == ["[0] saved", "[1] saved"]
  assert [len(records(checkout, i)) for i in range(2)] == [1, 1]
  wait_for_none(checkout)


def test_what_does_not_stop_is_killed_and_not_started_again(checkout):
  behaviour = SERVE.replace("save_on_sigterm", "signal.SIG_IGN")
  process = start(checkout, local(2), behaviour, GRACE="1")
  wait_until(lambda: all((checkout.parent / f"records/{i}.ready").exists() for i in range(2)))
  process.send_signal(signal.SIGTERM)
  status, _, stderr = finish(process)
  assert (status, stderr) == (137, "== process 0 ended with status 137\n")
  wait_for_none(checkout)


def test_nothing_outlives_the_killed_script(checkout):
  process = start(checkout, local(2), SERVE)
  wait_until(lambda: all((checkout.parent / f"records/{i}.ready").exists() for i in range(2)))
  process.kill()
  wait_for_none(checkout)
  finish(process)


# slurm.sbatch

SRUN = """#!/usr/bin/env bash
# Records its options; runs one task. Takes SIGTERM as srun does, by forwarding it.
printf '%s ' "$@" >> "$RECORDS/srun"
while [[ "$1" == --* ]]; do shift; done
"$@" > >(sed -u 's/^/0: /') 2> >(sed -u 's/^/0: /' >&2) &
trap 'kill -TERM $!' TERM
wait $!; status=$?
if ((status == 143)); then wait $!; status=$?; fi
exit $status
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$RECORDS/scontrol"\n'
SLURM = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8"}


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


def test_slurm_a_mistake_is_not_requeued(checkout, slurm):
  status, stdout, _ = run(checkout, slurm, ERROR.format(1), **SLURM)
  assert (status, stdout) == (1, "0: process 0: error: no such data\n")
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 1)


def test_slurm_a_crash_is_started_again_within_the_job(checkout, slurm):
  behaviour = f"if start == 0: die()\nif start == 1: {ANOTHER_ENDED}\nfinish()"
  status, _, stderr = run(checkout, slurm, behaviour, RESTARTS="2", **SLURM)
  assert status == 0, stderr
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 3)


def test_slurm_crashes_are_given_up(checkout, slurm):
  status, _, stderr = run(checkout, slurm, "die()", RESTARTS="1", **SLURM)
  assert (status, stderr.splitlines()[-1]) == (137, "== given up after 1 restarts")
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 2)


def test_slurm_a_crash_near_the_time_limit_is_requeued(checkout, slurm):
  end = str(int(time.time()) + 60)
  status, _, stderr = run(checkout, slurm, "die()", SLURM_JOB_END_TIME=end, **SLURM)
  assert status == 0, stderr
  assert (requeued(checkout), len(records(checkout, 0))) == (["requeue 17"], 1)


def test_slurm_a_cancelled_job_saves_and_is_not_requeued(checkout, slurm):
  """scancel sends SIGTERM to the script and what it started."""
  process = start(checkout, slurm, SERVE, **SLURM)
  wait_until((checkout.parent / "records" / "0.ready").exists)
  os.killpg(process.pid, signal.SIGTERM)
  status, _, stderr = finish(process)
  assert status == 143, stderr
  assert (requeued(checkout), len(records(checkout, 0))) == ([], 1)
  wait_for_none(checkout)


# kubernetes.yaml


@pytest.fixture(scope="module")
def manifests():
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_kubernetes_fields_fit_together(manifests):
  service, job = manifests
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  environment = {variable["name"]: variable["value"] for variable in container["env"]}
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
  assert (codes["FailJob"]["values"], codes["Ignore"]["values"]) == ([2], [75])
  assert rules[-1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


@pytest.fixture
def pod(checkout, manifests):
  """(command, environment) of the container, of index 1, on a disk of its own."""
  (container,) = manifests[1]["spec"]["template"]["spec"]["containers"]
  environment = {variable["name"]: variable["value"] for variable in container["env"]}
  environment |= {"WORKDIR": str(checkout / "w"), "NUM_STEPS": "10", "JOB_COMPLETION_INDEX": "1"}
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


def test_kubernetes_sigterm_is_passed_on_and_is_no_completion(checkout, pod):
  command, environment = pod
  process = start(checkout, command, SERVE, **environment)
  wait_until((checkout.parent / "records" / "1.ready").exists)
  process.send_signal(signal.SIGTERM)
  status, stdout, _ = finish(process)
  assert status == 75
  assert stdout.startswith("saved\n")
  wait_for_none(checkout)


def test_kubernetes_a_stop_by_another_pod_is_no_completion(checkout, pod):
  command, environment = pod
  write_command(checkout, "sleep", "#!/bin/sh\n")
  assert run(checkout, command, "pass", **environment)[0] == 75


def test_kubernetes_waits_for_the_disk_to_show_the_end(checkout, pod):
  command, environment = pod
  write_command(checkout, "sleep", '#!/bin/sh\nmkdir -p "$WORKDIR/checkpoints/$NUM_STEPS"\n')
  assert run(checkout, command, "pass", **environment)[0] == 0


@pytest.mark.parametrize(("behaviour", "expected"), [("die()", 137), ("sys.exit(2)", 2)])
def test_kubernetes_failures_keep_their_status(checkout, pod, behaviour, expected):
  command, environment = pod
  assert run(checkout, command, behaviour, **environment)[0] == expected


# tpu_pod.sh

# Answers `describe` from a list of states; runs what is meant for the hosts on this machine, in
# a home directory of its own, except for the installation.
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
    if [[ "$state" == none ]]; then exit 1; fi
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
  set_states(checkout, "none", "CREATING", "PREEMPTED", "READY")
  behaviour = "finish() if start else None"  # stopped by SIGTERM at first
  environment = TPU | {"ACCELERATOR": "v4-32", "RESTARTS": "0"}
  status, _, stderr = run(checkout, tpu, behaviour, **environment)
  assert status == 0, stderr
  verbs = gcloud_calls(checkout, "create", "delete", "install")
  assert verbs == ["create", "install", "delete", "create", "install"]
  created = (checkout.parent / "records" / "create").read_text()
  assert created.count("--accelerator-type=v4-32 --version=tpu-ubuntu2204-base --spot") == 2


@pytest.mark.parametrize(
  ("state", "words"), [("none", "not there"), ("PREEMPTED", "PREEMPTED"), ("STOPPED", "stopped")]
)
def test_tpu_is_not_made_unasked(checkout, tpu, state, words):
  set_states(checkout, state)
  status, _, stderr = run(checkout, tpu, "finish()", **TPU)
  assert status == 1
  assert stderr.startswith(f"error: pod is {words}")
  assert gcloud_calls(checkout, "create", "delete") == []


def test_tpu_crashes_are_started_again_and_counted(checkout, tpu):
  set_states(checkout, "READY")
  behaviour = f"if start == 0: {ANOTHER_ENDED}\ndie()"
  status, _, stderr = run(checkout, tpu, behaviour, RESTARTS="2", **TPU)
  assert (status, stderr.splitlines()[-1]) == (137, "== given up after 2 restarts")
  assert len(records(checkout, 0)) == 3
  assert gcloud_calls(checkout, "install") == ["install"]


def test_tpu_a_mistake_ends_it(checkout, tpu):
  set_states(checkout, "READY")
  status, stdout, _ = run(checkout, tpu, ERROR.format(1), **TPU)
  assert (status, stdout) == (1, "process 0: error: no such data\n")
  assert len(records(checkout, 0)) == 1


def test_tpu_a_signal_reaches_the_hosts(checkout, tpu):
  set_states(checkout, "READY")
  process = start(checkout, tpu, SERVE, **TPU)
  wait_until((checkout.parent / "records" / "0.ready").exists)
  process.send_signal(signal.SIGTERM)
  status, stdout, stderr = finish(process)
  assert (status, stdout) == (0, "saved\n"), stderr
  assert len(records(checkout, 0)) == 1
  wait_for_none(checkout)


def test_tpu_what_an_earlier_start_left_is_stopped_first(checkout, tpu):
  set_states(checkout, "READY")
  left = start(checkout, [sys.executable, "main.py", "--process_id=5"], SERVE)
  wait_until((checkout.parent / "records" / "5.ready").exists)
  (checkout / "main.pid").write_text(f"{left.pid}\n")
  status, _, stderr = run(checkout, tpu, "finish()", **TPU)
  assert status == 0, stderr
  assert finish(left)[:2] == (0, "saved\n")
