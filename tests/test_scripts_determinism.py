"""One seed gives one result: in separate processes, with any number of workers."""

from pathlib import Path

import pytest

from .training_helpers import PLAIN, differences, load, run_script, small

pytestmark = pytest.mark.slow  # several whole runs; within a process test_lightning_modules_split compares them

RUN = [*PLAIN, *small("DropoutNet"), "data.augment=crop", "trainer.max_epochs=2"]
RUNS = {
    "a run": ["data.num_workers=0"],
    "its twin": ["data.num_workers=0"],
    "with two workers": ["data.num_workers=2"],
    "with another seed": ["seed=1"],
    "with averaged weights": ["callbacks=ema", "callbacks.ema.decay=0.9"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("determinism")
    folders = {name: parent / name.replace(" ", "_") for name in RUNS}
    for name, overrides in RUNS.items():  # the twin with another seed of Python's hashes
        run_script("train", *RUN, *overrides, folder=folders[name], fresh=name == "its twin")
    return folders


def last(folder: Path) -> dict:
    return load(folder / "checkpoints/last.ckpt")


@pytest.mark.parametrize("other", ["its twin", "with two workers"])
def test_one_seed_gives_equal_weights_in_separate_processes(runs, other):
    one, two = last(runs["a run"]), last(runs[other])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert differences(one[key], two[key]) == [], key


def test_another_seed_gives_other_weights(runs):
    found = differences(last(runs["a run"])["state_dict"], last(runs["with another seed"])["state_dict"])
    assert {name.rpartition(".")[2] for name in found} >= {"weight", "bias", "running_mean", "running_var"}


def test_averaging_saves_the_average_and_leaves_the_trained_weights_as_they_would_be(runs):
    plain, averaged = last(runs["a run"])["state_dict"], last(runs["with averaged weights"])
    assert differences(plain, averaged["current_model_state"]) == []
    assert "/network.logits.weight" in differences(plain, averaged["state_dict"])
