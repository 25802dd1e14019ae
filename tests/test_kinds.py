"""No room asks of what family a network is: not by its class, a config's keys, or the names of what it logs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("losses", "deployment", "datamodules", "planning", "lightning_modules", "reports", "scripts")
GROUPS = "exits|teacher|split|bottleneck|codec|network"
KINDS = {
    "the class of a network": r"isinstance\([^)]*Network\b",
    "an attribute of a family": r"(getattr|hasattr)\((\w+\.)*network, ['\"](channel|head|heads|quantizer|exits)",
    "a key of a config": rf"['\"]({GROUPS})['\"] (not )?in (cfg|config)\b|\b(cfg|config)\.get\(['\"]({GROUPS})['\"]",
    "a part of a metric's name": r"startswith\(\(?f?['\"](test|val|train)/\w|removeprefix\(['\"](bits|test/bits)",
    "the kind of a policy": r"['\"]patience['\"]",
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_guessed_from(kind):
    pattern = re.compile(KINDS[kind])
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    lines = ((file, number, line) for file in files for number, line in enumerate(file.read_text().splitlines(), 1))
    found = [f"{file.relative_to(ROOT)}:{number}" for file, number, line in lines if pattern.search(line)]
    # A policy's own file is where its name stands.
    assert not [place for place in found if not place.startswith("deployment/exits/")]
    assert pattern.search(
        "isinstance(x, SplitNetwork) getattr(task.network, 'channel') 'exits' in cfg; cfg.get('split') "
        "startswith('test/bits') kind == 'patience'"
    )
