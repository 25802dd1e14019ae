"""Early-exit methods from the command line to a checkpoint that is rebuilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf

from cleave.architectures import GeometricEnsemble
from cleave.losses import fit_geometric_ensemble
from cleave.reports.exits.measure import stored_logits
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.train import train

QUICK = [
    "trainer=cpu", "trainer.max_epochs=1", "+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1",
    "+trainer.limit_test_batches=1", "logger=none", "callbacks.progress=null", "+trainer.enable_progress_bar=false",
    "data=digits", "data.image_size=8", "backbone.name=resnet20", "backbone.in_channels=1",
]  # fmt: skip
EXITS = "exits.at=[layer1,layer2]"


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    quiet()
    return train(compose_config("train", [*QUICK, *overrides], folder))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=exits_joint", "exits.count=2", "exits.gradient_equilibrium=true", "training.compile=false"],
        ["method=exits_separate", EXITS, "base.ckpt_path=TEACHER", "method.train=[exits/layer2]"],
        ["method=exits_distilled", EXITS, "base.ckpt_path=TEACHER", "method.loss.source=teacher"],
        pytest.param(
            ["method=exits_distilled", EXITS, "teacher.ckpt_path=TEACHER", "method.loss.source=teacher"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_method_trains_tests_and_is_rebuilt_from_its_checkpoint(
    overrides: list[str], tmp_path: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [override.replace("TEACHER", str(teacher_file)) for override in overrides]
    metrics = run(tmp_path / "run", *overrides)
    assert {"val/acc", "val/acc_exits", "test/acc_exit/final", "test/policy/acc", "test/policy/macs"} <= set(metrics)
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    assert f"Next: python scripts/exits_report.py ckpt_path={checkpoint}" in capsys.readouterr().out
    assert len(restore(checkpoint).network.exits) == 3
    given = [f"ckpt_path={checkpoint}", "trainer=cpu", "+trainer.limit_test_batches=1"]
    again = evaluate(compose_config("evaluate", [*given, "+trainer.enable_progress_bar=false"], tmp_path / "evaluate"))
    for name, value in again.items():
        assert value == pytest.approx(metrics[name], abs=1e-6), name


def test_zero_time_waste_runs_its_three_steps_on_stored_features(tmp_path: Path, teacher_file: Path) -> None:
    cache = [f"feature_cache.directory={tmp_path / 'cache'}", "data.augment=none"]
    use = ["feature_cache.use=true"]
    chosen = ["experiment=zero_time_waste", EXITS, f"base.ckpt_path={teacher_file}", "exits.policy.thresholds=0.5"]
    run(tmp_path / "run", *chosen, *cache, *use)
    steps = {name: tmp_path / f"run/checkpoints/{name}/best.ckpt" for name in ("backbone", "exits", "ensemble")}
    states = {name: restore(path).network.state_dict() for name, path in steps.items()}

    def moved(before: str, after: str) -> set[str]:
        names = states[before]
        return {name for name in names if not torch.equal(names[name], states[after][name])}

    exits = {name for name in states["exits"] if name.startswith(("at:layer1.exit.", "at:layer2.exit."))}
    assert moved("backbone", "exits") <= exits
    assert {name.split(".")[0] for name in moved("backbone", "exits")} == {"at:layer1", "at:layer2"}
    assert moved("exits", "ensemble") == {name for name in states["exits"] if name.startswith("ensemble.")}
    # The backbone's features for the exits, and what the exits make of them for the ensembles.
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ensembles_are_fitted_in_one_epoch_to_the_logits_of_their_images(tmp_path: Path, teacher_file: Path) -> None:
    """On stored features, with the last exit by itself."""
    cache = [f"feature_cache.directory={tmp_path / 'cache'}", "feature_cache.use=true", "data.augment=none"]
    chosen = ["experiment=zero_time_waste", EXITS, f"base.ckpt_path={teacher_file}", "exits.ensemble_last=false"]
    chosen += ["~steps.backbone", "steps.ensemble.method.fit=lbfgs", *cache, "data.drop_last=false"]
    chosen += ["trainer.limit_train_batches=null"]
    run(tmp_path / "run", *chosen)
    restored = restore(tmp_path / "run/checkpoints/ensemble/best.ckpt")
    data = restore_data(restored, OmegaConf.create({}))
    found = stored_logits(restored.network, data, "train", torch.device("cpu"))
    weights, log_bias = fit_geometric_ensemble(list(found.logits), found.labels)
    ensemble = cast(GeometricEnsemble, restored.network.ensemble)
    assert not ensemble.last
    torch.testing.assert_close(ensemble.weights.double(), weights, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(ensemble.log_bias.double(), log_bias, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["exits.at=[layr1]"], ValueError, "no layer 'layr1'.*Did you mean 'layer1'"),
        ([], ValueError, "no exits; build it with exits.at or exits.count"),
        ([EXITS, "exits.count=2"], ValueError, "either exits.at or exits.count"),
        ([EXITS, "exits.at=layer1"], ValueError, r"exits\.at is a list .*exits\.at=\['layer1'\]"),
        ([EXITS, "exits.policy.thresholds=1.5"], ValueError, "1.5"),
        ([EXITS, "method.loss.weights=[1,1]"], ValueError, "weights has 2 numbers"),
        ([EXITS, "feature_cache.use=true"], ValueError, "no frozen part"),
        ([EXITS, "exits.head.pooling=avg"], ValueError, "pooling must be one of"),
        ([EXITS, "teacher.ckpt_path=TEACHER"], ValueError, "would be ignored: nothing learns from"),
    ],
)
def test_mistakes_are_told_before_training(
    overrides: list[str], error: type[Exception], words: str, tmp_path: Path, teacher_file: Path
) -> None:
    with pytest.raises(Exception, match=words) as raised:
        run(tmp_path, "method=exits_joint", *(each.replace("TEACHER", str(teacher_file)) for each in overrides))
    cause = raised.value if isinstance(raised.value, error) else raised.value.__cause__
    assert isinstance(cause, error)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_unknown_key_fails_at_composition(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="placces"):
        compose_config("train", ["method=exits_joint", "exits.placces=[layer1]"], tmp_path)
