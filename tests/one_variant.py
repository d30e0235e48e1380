"""A pytest plugin that runs one variant of each test: python -m pytest -p tests.one_variant."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  """Keep the middle one of the variants that the marks select."""
  variants = {}
  for item in items:
    variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
  items[:] = [group[len(group) // 2] for group in variants.values()]
