"""The examples in docstrings run, and every loss has one."""

import doctest
import importlib
from pathlib import Path

import pytest

from cleave import losses

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["losses", "deployment", "architectures", "datamodules", "lightning_modules", "planning", "reports"]
MODULES = sorted(
    ".".join(("cleave", *file.relative_to(ROOT).with_suffix("").parts))
    for room in ROOMS
    for file in (ROOT / room).rglob("*.py")
    if any(">>> " in line and "+SKIP" not in line for line in file.read_text().splitlines())
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", losses.__all__)
def test_every_loss_has_an_example_and_cites_its_paper(name):
    text = getattr(losses, name).__doc__
    assert ">>> " in text
    assert "eq." in text
