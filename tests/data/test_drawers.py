"""The drawers of minilora/data import downwards only; the doors stand above them all."""

import pytest

from tests.support.layout import MODULES
from tests.test_layout import of_project

BELOW = {"pictures": [], "generated": ["pictures"], "questions": ["pictures"], "shards": ["pictures", "questions"]}


@pytest.mark.parametrize("drawer", BELOW)
def test_a_drawer_imports_only_the_drawers_below_it(drawer):
    allowed = tuple(f"minilora.data.{name}" for name in ("workers", drawer, *BELOW[drawer]))
    files = [name for name in MODULES if name.startswith(f"minilora.data.{drawer}.")]
    assert files
    for name in files:
        found = {module for module in of_project(name) if module.startswith("minilora.data.")}
        assert not [module for module in found if not module.startswith(allowed)], name
