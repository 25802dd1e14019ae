"""DP-SGD as a person runs it: train.py with privacy=dp_sgd, what it writes down, and what it refuses."""

import json

import pytest
import torch

from cleave.deployment import load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import train

from .training_helpers import PLAIN, differences

NET = ["data=digits", "data.image_size=8", "data.batch_size=200", "backbone.name=alexnet", "backbone.in_channels=1"]
NET += ["backbone.kwargs={width: 0.1, dropout: 0.1}", "trainer.max_epochs=2", "+trainer.limit_val_batches=2"]
SPLIT = ["split.at=features.2", "split.form=insert", "bottleneck.channels=4", "bottleneck.width=8"]
PRIVATE = ["privacy=dp_sgd", "training.dp.epsilon=null", "training.dp.noise_multiplier=1.0", "bottleneck.norm=group"]


def run(folder, *overrides):
    quiet()
    return train(compose_config("train", [*PLAIN, *NET, *overrides], folder))


def test_a_private_split_network_is_trained_written_down_and_exported(tmp_path, capsys):
    metrics = run(tmp_path, *SPLIT, *PRIVATE, "export=true")
    assert 0 < metrics["train/epsilon"] < 20
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["dp"]["epsilon"] == pytest.approx(metrics["train/epsilon"], rel=1e-5)
    assert saved["dp"]["steps"] == 12
    printed = capsys.readouterr().out
    assert "DP-SGD: ε = " in printed
    assert "what a base or teacher learned is not covered" in " ".join(printed.split())
    (point,) = json.loads((tmp_path / "results.json").read_text())["points"]
    assert "DP-SGD of ε" in json.dumps(point, ensure_ascii=False)
    assert load_bundle(tmp_path / "bundle").manifest.config["training"]["dp"]["noise_multiplier"] == 1.0


def test_encoder_and_decoder_are_distilled_privately_beside_frozen_batchnorm(tmp_path, teacher_file):
    quiet()
    overrides = ["experiment=digits_hnd", f"base.ckpt_path={teacher_file}", "bottleneck.norm=group", *PRIVATE[:-1]]
    more = ["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "test=false", "feature_cache.use=false"]
    metrics = train(compose_config("train", [*PLAIN, *overrides, *more], tmp_path))
    assert metrics["train/epsilon"] > 0
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["dp"]["steps"] == 3


def test_a_run_goes_on_where_it_was_left(tmp_path):
    run(tmp_path / "half", *PRIVATE[:-1], "test=false", "trainer.max_epochs=1", "training.scheduler=null")
    kept = [f"ckpt_path={tmp_path}/half/checkpoints/last.ckpt", "training.scheduler=null", "test=false"]
    run(tmp_path / "rest", *PRIVATE[:-1], *kept)
    run(tmp_path / "again", *PRIVATE[:-1], "training.scheduler=null", "test=false")
    rest, again = (
        torch.load(tmp_path / f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("rest", "again")
    )
    assert differences(rest["state_dict"], again["state_dict"]) == []
    assert rest["dp"] == again["dp"]
    assert rest["dp"]["steps"] == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*PRIVATE[:-1], *SPLIT], r"BatchNorm, and these would train: features.2\.bottleneck\.encoder\.1.*norm=group"),
        ([*PRIVATE, "training.dp.epsilon=1"], r"give either epsilon"),
        (["privacy=dp_sgd", "training.dp.epsilon=0"], r"epsilon must be a positive finite number, got 0"),
        (["privacy=dp_sgd", "training.dp.delta=1"], r"delta must lie between 0 and 1, such as 1e-5, got 1"),
        ([*PRIVATE, "data.sampling=shuffled"], r"set data\.sampling=poisson"),
        ([*PRIVATE, "data.mixup=0.2"], r"mixup or cutmix mixes them"),
        ([*PRIVATE, "training.compile=true"], r"set training\.compile=false"),
        ([*PRIVATE, *SPLIT, "noise=gaussian"], r"the noise at features\.2 follows the norms.*noise\.bound a number"),
        ([*PRIVATE, *SPLIT, "bottleneck.norm=layer"], r"norm must be one of batch, group, got 'layer'"),
        (
            [
                *PRIVATE,
                "~method",
                "+method@steps.a.method=cross_entropy",
                "+method@steps.b.method=cross_entropy",
            ],
            r"keeps account of one training, and the recipe a, b",
        ),
    ],
)
def test_what_would_break_the_promise_is_refused_in_words(tmp_path, overrides, message):
    with pytest.raises(Exception, match=message):
        run(tmp_path, *overrides)


def test_a_term_over_the_batch_is_refused(tmp_path):
    term = "+method.extra_terms.nopeek={_target_: cleave.lightning_modules.Term, of: [images, student/features.2/z], "
    term += "loss: {_target_: cleave.losses.DistanceCorrelationLoss}}"
    with pytest.raises(ValueError, match=r"the term 'nopeek' \(DistanceCorrelationLoss\) couples the samples"):
        run(tmp_path, *SPLIT, *PRIVATE, term)
