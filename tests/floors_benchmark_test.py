"""The benchmark of a training step's parts."""

from tests.benchmarks import floors


def test_every_part_has_a_floor_and_a_time(capsys):
  floors.main(["--variant=T/2", "--image_size=8", "--batch_size=4", "--rank=16", "--rounds=1"])
  rates, _, _, *rows = capsys.readouterr().out.splitlines()
  assert "GFLOP/s" in rates
  names = [row.split("|")[1].strip() for row in rows]
  assert {"attention", "GELU", "mlp/fc1", "update and moving average"} < set(names)
  assert len(names) == 5 + 4 + 1 + 1 and names[-1] == "all"


def test_the_floor_is_the_slower_of_products_and_memory():
  part = floors.Part("part", 1, lambda: None, macs=100, num_bytes=50)
  assert floors.floor(part, flops_rate=10.0, bytes_rate=10.0) == 20.0
  assert floors.floor(part, flops_rate=100.0, bytes_rate=10.0) == 5.0
