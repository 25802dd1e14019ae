"""Which cases of a test `make test` runs: one for each path through the code; `make test-full` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some_quick(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """The cases of a test, of which those that are not ``quick`` are marked slow."""
    return [case if quick(case) else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
