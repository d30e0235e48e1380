import pytest

from lrdit.report import page as report_page
from lrdit.report.contents import make_report
from tests.workdirs import make_run


@pytest.fixture(scope="package")
def workdirs(tmp_path_factory):
  """Two seeds of full, three of adaptive, one of static."""
  root = tmp_path_factory.mktemp("runs")
  values = {
    "full": ((0.200, 0.90), (0.202, 0.94)),
    "adaptive": ((0.206, 0.95), (0.208, 0.91), (0.210, 0.93)),
    "static": ((0.3, 0.8),),
  }
  return [
    make_run(root / f"{method}_{seed}", method, seed, *numbers, rate=100.0 + 10 * seed)
    for method, of_seed in values.items()
    for seed, numbers in enumerate(of_seed)
  ]


@pytest.fixture(scope="package")
def made(workdirs):
  return make_report(workdirs, "out")


@pytest.fixture(scope="package")
def page(made):
  return report_page.render(made)
