from __future__ import annotations

import os

# Tensors here are tiny: threads cost more than they save, above all where tests start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


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
