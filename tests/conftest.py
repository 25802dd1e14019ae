from __future__ import annotations

import os
import sys
from collections import Counter

# Tensors here are tiny: threads cost more than they save, above all where tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator
from pathlib import Path

import pytest

TRACED_CASES = 2
_cases: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Leave most of the tests' time out of the coverage, as tracing more than doubles it.

    Of a parametrised test the first cases are traced, as the others run the same lines; what is marked ``untraced`` is
    not traced at all, fixtures included. Not by stopping coverage, which goes back to an outer one where pytest-cov has
    started two.
    """
    tracer, test = sys.gettrace(), item.nodeid.partition("[")[0]
    _cases[test] += 1
    repeated = _cases[test] > TRACED_CASES or item.get_closest_marker("untraced")
    if not repeated or type(tracer).__module__ != "coverage":
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests remember nothing in the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache_home"))


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of digits_teacher after one short epoch: a teacher file for whatever needs one."""
    from cleave.scripts.assembly.building import compose_config
    from cleave.scripts.assembly.terminal import quiet
    from cleave.scripts.train import train

    quiet()
    folder = tmp_path_factory.mktemp("teacher")
    overrides = ["experiment=digits_teacher", "trainer=cpu", "trainer.max_epochs=1", "logger=none"]
    overrides += ["+trainer.enable_progress_bar=false", "callbacks.progress=null", "test=false"]
    train(compose_config("train", overrides, folder))
    return folder / "checkpoints/best.ckpt"
