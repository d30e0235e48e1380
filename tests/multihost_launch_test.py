"""The launch files for several processes, with a stand-in for main.py and for srun."""

import os
import pathlib
import re
import shutil
import signal
import time

import pytest

from tests import scripts, tiny
from tests.scripts import LAUNCH

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.fixture
def stand_in(tmp_path):
  return scripts.StandIn(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n# ")
  assert "\nset -euo pipefail\n" in text or '/setup.sh"\n' in text  # which sets it
  assert "\t" not in text
  assert not any(line != line.rstrip() for line in text.splitlines())
  checkers = [["bash", "-n"]]
  if shutil.which("shellcheck"):
    checkers.append(["shellcheck", "--external-sources", "--exclude=SC1091,SC2034,SC2154"])
  for checker in checkers:
    done = scripts.finish(scripts.start([*checker, script], tiny.ROOT, os.environ))
    assert done == (0, "", "")


def test_launch_files_stay_small():
  files = [path for path in LAUNCH.iterdir() if path.is_file() and path.suffix != ".txt"]
  assert sum(path.read_text().count("\n") for path in files) <= 500


# multihost_local.sh


def local(num_processes, *flags):
  return ["bash", "checkout/launch/multihost_local.sh", num_processes, "--workdir=w", *flags]


def test_processes_get_their_flags_and_their_lines_a_label(stand_in):
  behavior = "print('out', process); print('err', process, file=sys.stderr)"
  flags = local(3, "--config.data.name=a 'b' $c")
  status, stdout, stderr = stand_in.run(flags, behavior, DEVICES="2")
  assert status == 0, stderr
  assert sorted(stdout.splitlines()) == [f"[{i}] out {i}" for i in range(3)]
  assert sorted(stderr.splitlines()) == [f"[{i}] err {i}" for i in range(3)]
  (coordinator,) = {stand_in.starts(i)[0]["argv"][2] for i in range(3)}
  assert coordinator.startswith("--coordinator=localhost:")
  for i in range(3):
    (record,) = stand_in.starts(i)
    assert record["argv"] == [
      *("--workdir=w", "--config.data.name=a 'b' $c", coordinator),
      *("--num_processes=3", f"--process_id={i}"),
    ]
    assert record["environment"]["JAX_PLATFORMS"] == "cpu"
    assert record["environment"]["JAX_NUM_CPU_DEVICES"] == "2"


@pytest.mark.parametrize(
  ("flags", "environment", "words"),
  [
    ([], {}, "N= is not a whole number from 1"),
    (["--workdir=w"], {}, "N=--workdir=w is not a whole number from 1"),
    (["0"], {}, "N=0 is not a whole number from 1"),
    (["2"], {"RESTARTS": "x"}, "RESTARTS=x is not a whole number from 0"),
    (["2", "--process_id=1"], {}, "--process_id=1: this script sets it"),
  ],
)
def test_a_wrong_argument_ends_before_anything_runs(stand_in, flags, environment, words):
  done = stand_in.run(["bash", "checkout/launch/multihost_local.sh", *flags], **environment)
  scripts.assert_wrong_argument(done, words)


def test_help(stand_in):
  status, stdout, _ = stand_in.run(local(2, "--help"))
  assert (status, "launch/multihost_local.sh N" in stdout) == (0, True)


def test_when_one_process_dies_the_others_are_ended_and_all_start_again(stand_in):
  """Process 0 hangs and ignores SIGTERM, process 2 ends by it."""
  behavior = """
if start == 0:
  if process == 1:
    wait_for("ready.0"), wait_for("ready.2")
    os.kill(os.getpid(), signal.SIGKILL)
  work(signal.SIG_IGN if process == 0 else None)
"""
  status, _, stderr = stand_in.run(local(3), behavior, GRACE="1")
  assert (status, stderr) == (0, "== ended with status 137 (start 1 of 4)\n")
  assert [len(stand_in.starts(i)) for i in range(3)] == [2, 2, 2]
  stand_in.assert_all_have_ended()


@pytest.mark.parametrize(
  ("failure", "status", "starts"),
  [
    ("sys.exit(1)", 1, 1),
    ("sys.exit(2)", 2, 1),
    ("os._exit(70)", 70, 2),
    ("sys.exit(75)", 75, 2),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, 2),  # not by way of the script
  ],
)
def test_a_mistake_ends_it_and_everything_else_starts_again(stand_in, failure, status, starts):
  """The other process ends with status 75 as a consequence, which may be seen first."""
  behavior = f"if process == 0: sys.exit(75)\ntime.sleep(0.3)\n{failure}"
  done = stand_in.run(local(2), behavior, RESTARTS="1")
  assert done[0] == status
  assert [len(stand_in.starts(i)) for i in range(2)] == [starts, starts]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
  ("handler", "status"), [("stop_on_sigterm", 75), ("", 143), ("signal.SIG_IGN", 137)]
)
def test_a_signal_is_passed_on_and_ends_it(stand_in, number, handler, status):
  """The whole group of the script gets it, as from a terminal or a supervisor."""
  process = stand_in.start(local(2), f"work({handler})", GRACE="1")
  stand_in.wait_for_work(2, process)
  os.killpg(process.pid, number)
  done = scripts.finish(process)
  lines = ["[0] saved", "[1] saved"] if status == 75 else []
  assert (done[0], sorted(done[1].splitlines()), done[2]) == (status, lines, "")
  assert [len(stand_in.starts(i)) for i in range(2)] == [1, 1]
  stand_in.assert_all_have_ended()


def test_nothing_outlives_the_killed_script(stand_in):
  process = stand_in.start(local(2), "work(signal.SIG_IGN)")
  stand_in.wait_for_work(2, process)
  process.kill()
  stand_in.assert_all_have_ended()
  scripts.finish(process)


@pytest.mark.slow
def test_the_real_main_is_stopped_and_killed_and_goes_on(tmp_path):
  root = scripts.copy_checkout(tmp_path / "checkout", "configs", "launch", "lrdit", "main.py")
  workdir, steps = tmp_path / "w", 200
  flags = tiny.command(workdir, f"--config.training.num_steps={steps}")[2:]
  command = ["bash", "launch/multihost_local.sh", 2, *flags]
  process, metrics = scripts.start(command, root, tiny.environment()), workdir / "metrics.jsonl"
  scripts.wait_until(lambda: scripts.has_lines(metrics, 3), process)
  process.send_signal(signal.SIGTERM)
  status, _, stderr = scripts.finish(process)
  assert status == 75, stderr
  assert stderr.count("[0] process 0: stopped by SIGTERM at step") == 1
  assert "==" not in stderr  # nothing was killed or started again
  stopped_at = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
  assert 3 <= stopped_at < steps

  process = scripts.start(command, root, tiny.environment())
  scripts.wait_until(lambda: scripts.has_lines(metrics, stopped_at + 3), process)
  os.kill(pid_of(f"--workdir={workdir}", "--process_id=1"), signal.SIGKILL)
  status, _, stderr = scripts.finish(process)
  assert status == 0, stderr
  assert f"[0] process 0: resuming from the checkpoint of step {stopped_at}" in stderr
  assert "== ended with status 137 (start 1 of 4)" in stderr
  assert (workdir / "checkpoints" / str(steps)).is_dir()
  assert [line["step"] for line in tiny.read_metrics(workdir)] == list(range(1, steps + 1))


def pid_of(*arguments):
  """Return the process whose command line has all of these."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_text().split("\0")
    except OSError:  # it has ended
      words = []
    if set(arguments) <= set(words):
      return int(path.parent.name)
  raise AssertionError(f"no process of {arguments}")


# slurm.sbatch

# srun runs one task; scontrol records that it is called.
COMMANDS = {
  "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
  "scontrol": 'echo "$@" >>"$RECORDS/scontrol"',
  "squeue": "date --date=@$JOB_END +%Y-%m-%dT%H:%M:%S",
}


@pytest.mark.parametrize(
  ("behavior", "seconds_left", "status", "starts", "requeued"),
  [
    ("", 60, 0, 1, False),
    ("sys.exit(1)", 60, 1, 1, False),
    ("sys.exit(2)", 60, 1, 1, False),
    ("sys.exit(75)", 60, 0, 1, True),
    ("os.kill(os.getpid(), signal.SIGTERM)", 60, 0, 1, True),
    ("sys.exit(75 if start < 2 else 0)", 6000, 0, 3, False),
    ("os.kill(os.getpid(), signal.SIGKILL)", 6000, 137, 4, False),
  ],
)
@pytest.mark.parametrize("variable", ["SLURM_JOB_END_TIME", "JOB_END"])  # of newer SLURM, or squeue
def test_slurm_judges_by_the_exit_status(
  stand_in, tmp_path, behavior, seconds_left, status, starts, requeued, variable
):
  (stand_in.root / ".venv" / "bin").mkdir(parents=True)
  (stand_in.root / ".venv" / "bin" / "activate").touch()
  for name, text in COMMANDS.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "job")  # SLURM runs a copy of it
  environment = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(stand_in.root)}
  environment[variable] = str(int(time.time()) + seconds_left)
  words = ["bash", "job", "--workdir=w", "--config.data.name=a b"]
  done = stand_in.run(words, behavior, [tmp_path], **environment)
  assert done[0] == status, done
  assert len(stand_in.starts()) == starts
  assert stand_in.starts()[0]["argv"] == words[2:]
  assert (stand_in.records / "scontrol").exists() == requeued


def test_slurm_sends_sigterm_to_the_tasks():
  head, _, _ = (LAUNCH / "slurm.sbatch").read_text().partition("\nset -euo pipefail\n")
  options = head.splitlines()  # sbatch reads none below the first command
  assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue"} <= set(options)


# kubernetes.yaml


def test_kubernetes_fields_fit_together():
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  flags = dict(re.findall(r"--(\S+?)=(\S+)", " ".join(container["command"])))
  name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
  assert service["spec"]["clusterIP"] == "None"
  assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
  assert pod["subdomain"] == name
  assert spec["completions"] == spec["parallelism"] == int(flags["num_processes"])
  assert flags["coordinator"] == f"{job['metadata']['name']}-0.{name}:{port}"
  assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
  assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
  rules = spec["podFailurePolicy"]["rules"]
  codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
  assert codes == {"FailJob": [1, 2], "Ignore": [75, 143]}
