"""What `make test` leaves out of long families is there to be left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from .quick_cases import EVERY


@pytest.mark.parametrize("family", EVERY)
def test_a_family_of_which_some_cases_are_left_out_is_there(family):
    file, name = family.split("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
