"""Stages of a defence: recipes whose steps share the terms of the run, attackers first, and privacy alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cleave.lightning_modules.checkpoints.loading import read_checkpoint
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.recipe import all_steps
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import train

from .training_helpers import DIGITS, PLAIN

NET = [*DIGITS, "backbone.name=resnet20", "split.at=layer2", "bottleneck.width=8", "bottleneck.channels=4"]
SHORT = ["+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1", "test=false", "trainer.max_epochs=1"]
BOTTLEFIT = ["experiment=bottlefit", "compare={layer2: 1.0}"]


def composed(folder: Path, base: Path, *overrides: str):
    quiet()
    given = [*PLAIN, *NET, *SHORT, f"base.ckpt_path={base}", *overrides]
    return compose_config("train", given, folder)


def state(folder: Path, step: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoints/{step}/last.ckpt", weights_only=True)["state_dict"]


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], part: str) -> bool:
    names = [name for name in before if part in name and before[name].is_floating_point()]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


def test_terms_of_the_run_go_with_every_step(tmp_path, teacher_file):
    steps = all_steps(composed(tmp_path, teacher_file, *BOTTLEFIT, "privacy=nopeek"))
    assert [list(step.config.method.extra_terms) for step in steps] == [["nopeek"], ["nopeek"]]
    assert steps[0].config.method.extra_terms.nopeek.of == ["images", "student/layer2/z"]
    assert steps[0].config.method._target_ != steps[1].config.method._target_


def test_a_step_changes_or_leaves_out_a_term_of_the_run(tmp_path, teacher_file):
    own = ["+steps.head.method.extra_terms.nopeek=null", "+steps.finetune.method.extra_terms.nopeek.weight=7"]
    steps = all_steps(composed(tmp_path, teacher_file, *BOTTLEFIT, "privacy=nopeek", *own))
    assert list(steps[0].config.method.extra_terms) == []
    assert steps[1].config.method.extra_terms.nopeek.weight == 7
    assert steps[1].config.method.extra_terms.nopeek.loss._target_ == "cleave.losses.DistanceCorrelationLoss"


@pytest.mark.parametrize("key", ["method.train=[decoder]", "+method.loss.temperature=2"])
def test_what_no_step_would_read_is_refused(key, tmp_path, teacher_file):
    named = key.lstrip("+").partition("=")[0].split(".")[1]
    with pytest.raises(ValueError, match=rf"method\.{named} has no meaning in a recipe.*steps\.head\.method\.{named}"):
        all_steps(composed(tmp_path, teacher_file, *BOTTLEFIT, f"+{key.lstrip('+')}"))


def test_attackers_learn_first_then_the_encoder_against_them_then_all(tmp_path, teacher_file):
    split = composed(tmp_path / "split", teacher_file, "method=knowledge_distillation")
    train(split)
    base = tmp_path / "split/checkpoints/best.ckpt"
    recipe = ["experiment=privacy_stages", "privacy=ressfl", f"teacher.ckpt_path={teacher_file}"]
    train(composed(tmp_path / "stages", base, *recipe, "steps.attacker.trainer.max_epochs=2"))
    before = torch.load(base, weights_only=True)["state_dict"]
    attacker, privacy, task = (state(tmp_path / "stages", step) for step in ("attacker", "privacy", "task"))
    assert not moved(before, attacker, "network.")  # running statistics included
    assert moved(attacker, privacy, "bottleneck.encoder")
    assert not moved(attacker, privacy, "bottleneck.decoder")
    assert moved(attacker, privacy, "terms.attacker")
    assert moved(privacy, task, "bottleneck.decoder")
    # Each step begins with the last decoders of the one before, whatever the accuracy said.
    begun = [
        record["best"] for record in read_checkpoint(tmp_path / "stages/checkpoints/task/last.ckpt")["cleave"]["before"]
    ]
    assert [Path(file).relative_to(tmp_path / "stages/checkpoints").as_posix() for file in begun] == [
        "attacker/last.ckpt",
        "privacy/last.ckpt",
    ]


def test_privacy_alone_needs_a_term(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="needs at least one term"):
        train(composed(tmp_path, teacher_file, "method=terms"))
