"""Privacy from the command line: a term or noise over any objective, from training to a bundle."""

import csv
import re
from pathlib import Path

import pytest
import torch

from cleave.architectures import GaussianMechanism
from cleave.deployment import Pipeline, load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.train import train

from .training_helpers import PLAIN

FEW = "+trainer.limit_test_batches=2"
EVALUATE = ["trainer=cpu", "logger=none", "+trainer.enable_progress_bar=false", FEW]
CONSTRAINED = ["privacy=constrained", "method=cross_entropy", "method.extra_terms.bound.loss.threshold=0.5"]
TERM = "method.extra_terms.nopeek"
CORRECTED = ["privacy=nopeek", f"{TERM}.loss.bias_corrected=true"]
SHORT = [*PLAIN, "experiment=digits_hnd", "trainer.max_epochs=1", "+trainer.limit_train_batches=3", "export=true", FEW]


def trained(folder: Path, base: Path, *overrides: str) -> dict[str, float]:
    quiet()
    return train(compose_config("train", [*SHORT, f"base.ckpt_path={base}", *overrides], folder))


def test_noise_is_trained_measured_exported_and_said(tmp_path, teacher_file, capsys):
    metrics = trained(tmp_path, teacher_file, "privacy=gaussian", "noise.epsilon=50")
    said = " ".join(capsys.readouterr().out.split())
    assert "Privacy at layer2, against any other input: ε = 50 and δ = 1e-05 for one release" in said
    assert re.search(r"ideal codewords of 10 classes are told apart in 9[56]\.\d %", said)
    checkpoint = tmp_path / "checkpoints/best.ckpt"
    noise = restore(checkpoint).network.bottlenecks["layer2"].noise
    assert isinstance(noise, GaussianMechanism)
    assert noise.bound > 0
    again = evaluate(compose_config("evaluate", [f"ckpt_path={checkpoint}", *EVALUATE], tmp_path / "evaluate"))
    assert again["test/acc"] == pytest.approx(metrics["test/acc"])  # the same images meet the same noise
    bundle = load_bundle(tmp_path / "bundle")
    (draw,) = bundle.manifest.draws
    assert (draw.name, draw.distribution, draw.shape) == ("layer2.noise", "normal", (4, 4, 4))
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    first, second = (Pipeline(bundle).run(images).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_distance_correlation_goes_over_any_objective(tmp_path, teacher_file):
    logged = ["logger=csv", "trainer.log_every_n_steps=1"]
    trained(tmp_path, teacher_file, "privacy=nopeek", "method.extra_terms.nopeek.weight=2", "export=false", *logged)
    (file,) = tmp_path.rglob("metrics.csv")
    header = file.read_text().splitlines()[0].split(",")
    assert {"train/nopeek", "train/head"} <= set(header)


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        (["privacy=ressfl"], {"attacker/conv", "attacker/residual"}),
        (["privacy=constrained", "method=cross_entropy", "method.extra_terms.bound.loss.threshold=0.5"], {"bound"}),
    ],
)
def test_attackers_and_bounds_go_over_any_objective(overrides, terms, tmp_path, teacher_file):
    logged = ["logger=csv", "trainer.log_every_n_steps=1", "export=false", "test=false"]
    trained(tmp_path, teacher_file, *overrides, *logged)
    (file,) = tmp_path.rglob("metrics.csv")
    assert {f"train/{term}" for term in terms} <= set(file.read_text().splitlines()[0].split(","))
    with file.open() as opened:
        first = next(row for row in csv.DictReader(opened) if row.get("train/attacker/conv"))
    assert float(first["train/attacker/conv"]) > 0.05  # of images from 0 to 1, and decoders that know nothing
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = {name for name in state if name.startswith("terms.attacker.loss.decoders.")}
    assert weights
    resumed = tmp_path / "resumed"
    again = [*overrides, *logged, f"ckpt_path={tmp_path}/checkpoints/last.ckpt", "trainer.max_epochs=2"]
    trained(resumed, teacher_file, *again)
    later = torch.load(resumed / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(later[name], state[name]) for name in weights)


@pytest.mark.parametrize("preset", ["shredder", "cloak"])
def test_learned_noise_grows_and_is_exported(preset, tmp_path, teacher_file):
    over = ["method=cross_entropy", f"privacy={preset}", "method.extra_terms.noise.weight=1"]
    trained(tmp_path, teacher_file, *over, "training.optimizer.lr=0.1", "test=false")
    network = restore(tmp_path / "checkpoints/last.ckpt").network
    noise = network.bottlenecks["layer2"].noise
    start = type(noise)()
    start.build(network.bottlenecks["layer2"].shape)
    z = torch.zeros(1, *network.bottlenecks["layer2"].shape)
    assert noise.magnitude(z).mean() > 1.2 * start.magnitude(z).mean()
    assert "layer2.noise" in [draw.name for draw in load_bundle(tmp_path / "bundle").manifest.draws]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["noise=laplace", "noise.epsilon=0"], r"noise\.epsilon must be a positive finite number, got 0"),
        (["noise=gaussian", "noise.delta=2"], r"noise\.delta must lie between 0 and 1, got 2"),
        pytest.param(
            ["noise=gaussian", "noise.bound=-1"],
            r"noise\.bound must be a positive finite number, .* got -1",
            marks=pytest.mark.slow,
        ),
        (["noise=laplace", "noise.bound=null"], r"noise\.epsilon=10 is promised of clipped representations alone"),
        (["noise=nullification", "noise.share=1"], r"noise\.share must be at least 0 and below 1, got 1"),
        (["privacy=nopeek", "method.train=[decoder]"], "'nopeek' reads .*layer2/z, of which nothing is trained"),
        pytest.param(
            ["privacy=nopeek", "split.at=null", "method=cross_entropy"],
            r"reads student/None/z.*set split\.at=LAYER",
            marks=pytest.mark.slow,
        ),
        (
            [
                "privacy=nopeek",
                "split.at=null",
                "method=cross_entropy",
                "method.extra_terms.nopeek.of=[images,student/layer2]",
            ],
            r"'nopeek' should hide images .* the network is not split; set split\.at=LAYER",
        ),
        (["privacy=nopeek", "split.form=none"], r"split\.form=none sends the feature of layer2 itself.*'nopeek'"),
        (["privacy=ressfl", "split.form=none", "method=cross_entropy"], r"split\.form=none .*'attacker' is a defence"),
        pytest.param(
            [*CONSTRAINED, "split.form=none"],
            r"split\.form=none sends .* set split\.form=insert or replace",
            marks=pytest.mark.slow,
        ),
        (
            ["privacy=ressfl", "method.train=[decoder,tail]", "method=cross_entropy"],
            "'attacker' .* leaves all before it frozen",
        ),
        ([*CONSTRAINED, "method.train=[tail]"], r"train=\['tail'\] leaves all before it frozen.* strength=0"),
        pytest.param(
            ["privacy=nopeek", "data.batch_size=1"],
            r"'nopeek' needs batches of at least 2 samples, got data",
            marks=pytest.mark.slow,
        ),
        ([*CORRECTED, "data.batch_size=3"], r"'nopeek' needs batches of at least 4 samples, got data\.batch_size=3"),
        (
            [*CORRECTED, "data.batch_size=37", "data.drop_last=false", "~trainer.limit_train_batches"],
            r"at least 4 samples, but the last of an epoch would have 1 .* data\.drop_last=true",
        ),
    ],
)
def test_mistakes_are_told_before_training(overrides, told, tmp_path, teacher_file):
    with pytest.raises(ValueError, match=told):
        trained(tmp_path, teacher_file, *overrides)


def test_an_attacker_of_strength_0_learns_beside_a_frozen_encoder(tmp_path, teacher_file):
    more = ["privacy=ressfl", "method=cross_entropy", "method.extra_terms.attacker.loss.strength=0", "test=false"]
    trained(tmp_path, teacher_file, *more, "method.train=[decoder,tail,terms]", "export=false")
    state = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("terms.attacker.loss.decoders.") for name in state)
