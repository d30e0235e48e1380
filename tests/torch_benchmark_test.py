"""The comparison with PyTorch: its arithmetic and what it leaves out. No timings, no PyTorch."""

import sys
import types

import pytest

from tests.benchmarks import torch_benchmark
from tests.benchmarks.torch_benchmark import OURS, Side, format_report, summarize

SECONDS = {
  ("peak", OURS): [0.5, 0.5, 9.0],
  ("peak", "PyTorch glibc"): [2.0, 2.0, 1.0],
  ("peak", "PyTorch jemalloc"): [1.0, 1.0, 1.0],
  ("step", OURS): [4.0, 3.0, 5.0],
  ("step", "PyTorch eager, glibc"): [8.0, 8.0, 1.0],
  ("step", "PyTorch compiled, glibc"): [5.0, 5.0, 5.0],
  ("forward", OURS): [1.0, 1.0, 1.0],
  ("forward", "PyTorch eager, glibc"): [2.0, 2.0, 2.0],
  ("forward", "PyTorch compiled, glibc"): [2.5, 2.5, 2.5],
}
FLOPS = {"peak": 100, "step": 400, "forward": 100}


def test_each_quantity_is_compared_with_the_fastest_of_pytorch():
  found = summarize(SECONDS, FLOPS)
  assert list(found["step"]) == [OURS, "PyTorch compiled, glibc", "PyTorch eager, glibc"]
  # lrdit's peak is 200 FLOP/s, and PyTorch's best 100.
  assert found["step"][OURS] == {"median": 4, "min": 3, "rate": 100, "share": 0.5, "ratio": 1}
  eager = {"median": 8, "min": 1, "rate": 50, "share": 0.5, "ratio": 0.5}
  assert found["step"]["PyTorch eager, glibc"] == eager
  assert found["peak"]["PyTorch glibc"]["share"] == 0.5
  assert format_report(found).splitlines()[-3:] == [
    "matrix products: lrdit / PyTorch jemalloc 0.500, 1.000 at equal peaks",
    "training step: lrdit / PyTorch compiled, glibc 0.800, 1.600 at equal peaks",
    "forward pass: lrdit / PyTorch eager, glibc 0.500, 1.000 at equal peaks",
  ]


def test_a_jemalloc_that_is_none_is_left_out_or_an_error(monkeypatch, tmp_path):
  (tmp_path / "libjemalloc.so.2").touch()
  given = str(tmp_path / "libjemalloc.so.2")
  assert torch_benchmark.find_jemalloc(given) == given
  environment = torch_benchmark.allocators(given)["jemalloc"]
  assert environment["LD_PRELOAD"] == given
  assert "dirty_decay_ms:-1" in environment["MALLOC_CONF"]
  monkeypatch.setattr(torch_benchmark.ctypes.util, "find_library", lambda name: None)
  assert "jemalloc" not in torch_benchmark.allocators(torch_benchmark.find_jemalloc(""))
  with pytest.raises(SystemExit, match=r"^error: --jemalloc=nowhere is no file"):
    torch_benchmark.find_jemalloc("nowhere")


# A worker that compiles nothing, and takes as many seconds as its request has characters.
WORKER = """
import json, sys
tasks, left_out = ["peak", "step, eager"], "torch.compile: no compiler"
print(json.dumps(dict(name="x", num_parameters=7, tasks=tasks, left_out=left_out)), flush=True)
for line in sys.stdin:
  print(float(len(line.strip())), flush=True)
"""


def test_what_is_left_out_is_named():
  theirs = Side("PyTorch", "glibc", [sys.executable, "-c", WORKER], {})
  tasks = theirs.tasks()
  seconds = {key: task(0) for key, task in tasks.items()}
  theirs.close()
  assert seconds == {("peak", "PyTorch glibc"): 4.0, ("step", "PyTorch eager, glibc"): 11.0}
  fields = dict(variant="T/2", dtype="bfloat16", image_size=4, channels=3, batch_size=2, rounds=1)
  ours = types.SimpleNamespace(about=theirs.about | {"left_out": ""}, allocator="glibc")
  said = torch_benchmark.describe(types.SimpleNamespace(**fields), [ours, theirs]).splitlines()
  assert said[3:] == [
    "left out under glibc: torch.compile: no compiler",
    "left out: jemalloc, which this system does not have: see --jemalloc",
  ]
