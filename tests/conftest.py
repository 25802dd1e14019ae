from __future__ import annotations

import os

# Tensors here are tiny: threads cost more than they save, above all where tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .parsed_configs import parse_once
from .quick_cases import leave_out

# What measures the coverage, if anything does.
_measuring = getattr(sys.modules.get("slipcover.pytest_plugin"), "_slipcover_instance", None)
if _measuring is not None:
    # Probes stay. Before Python 3.12 slipcover looks through all modules each time it takes some out, over and over in
    # a run of thousands of tests, which costs more than they do. Its option for that does not reach xdist's workers.
    _measuring.d_miss_threshold = 2**30
# Before anything of Cleave is imported.
parse_once()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_out(items)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def chance_of_a_file() -> None:
    """What a file's fixtures draw does not depend on the files before."""
    _seed()


@pytest.fixture(autouse=True)
def chance(chance_of_a_file: None) -> None:
    """What a test draws does not depend on the tests before; nor do its threads, which a served bundle sets."""
    _seed()
    torch.set_num_threads(1)


@pytest.fixture
def take_probes() -> Callable[[], None]:
    """Call it between a plain run and one that is compiled: torch.compile cannot read code with slipcover's probes."""
    return getattr(_measuring, "deinstrument_seen", lambda: None)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bytes]:
    """Bundles draw from a generator that begins anew in each test, and not from the system's."""
    draw = np.random.default_rng(0).bytes
    monkeypatch.setattr("cleave.deployment.bundle.draws.os.urandom", draw)
    return draw


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests remember nothing in the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache_home"))


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of digits_teacher after one short epoch: a teacher file for whatever needs one."""
    from cleave.scripts.assembly.building import compose_config
    from cleave.scripts.assembly.starting.terminal import quiet
    from cleave.scripts.train import train

    quiet()
    folder = tmp_path_factory.mktemp("teacher")
    overrides = ["experiment=digits_teacher", "trainer=cpu", "trainer.max_epochs=1", "logger=none"]
    overrides += ["+trainer.enable_progress_bar=false", "callbacks.progress=null", "test=false"]
    train(compose_config("train", overrides, folder))
    return folder / "checkpoints/best.ckpt"
