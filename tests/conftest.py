from __future__ import annotations

import os
import signal
import sys
from collections import Counter

# Tensors here are tiny: threads cost more than they save, above all where tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Generator
from pathlib import Path

import pytest

TRACED_CASES = 2
TRACED_SECONDS = 0.8
_cases: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Leave most of the tests' time out of the coverage, as tracing nearly doubles it.

    A test is traced for its first seconds of computing, as what takes longer goes over the same lines again; of a
    parametrised test the first cases are, and what is marked ``untraced`` is not at all, fixtures included. Not by
    stopping coverage, which goes back to an outer one where pytest-cov has started two.
    """
    tracer, test = sys.gettrace(), item.nodeid.partition("[")[0]
    if type(tracer).__module__ != "coverage":
        return (yield)
    _cases[test] += 1
    if _cases[test] > TRACED_CASES or item.get_closest_marker("untraced"):
        sys.settrace(None)
    else:
        signal.signal(signal.SIGVTALRM, lambda number, frame: sys.settrace(None))
        signal.setitimer(signal.ITIMER_VIRTUAL, TRACED_SECONDS)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
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
