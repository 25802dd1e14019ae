"""Everything composes: exits, codes, links, forms and objectives, each pair of them from training to a bundle."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES, Pipeline, load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.export import export
from cleave.scripts.train import train

TERM = "_target_: cleave.lightning_modules.Term"
EXITS = f"{{{TERM}, loss: {{_target_: cleave.losses.JointExitLoss}}, of: [student/exits, labels, progress]}}"
EXTRA = f"{{{TERM}, weight: 0.1, loss: {{_target_: torch.nn.MSELoss}}, of: [student/layer3, teacher/layer3]}}"
RATE_LOSS = "{_target_: cleave.losses.RateLoss, pixels: 64}"
RATE = f"{{{TERM}, weight: 0.01, loss: {RATE_LOSS}, of: [student/layer2/likelihoods]}}"
TRAINED = {
    "kd": ["method=knowledge_distillation"],
    "hnd": ["method=head_distillation", "method.train=[bottleneck,exits]"],
    "ghnd": [
        "method=generalized_head_distillation",
        "method.loss.weights={layer2: 1.0, layer3: 1.0}",
        "method.train=[bottleneck,exits]",
    ],
    "reconstruction": ["method=reconstruction", "method.train=[bottleneck,exits]"],
    "extra": ["method=exits_joint", f"+method.extra_terms.feature={EXTRA}"],
}
CODES = {
    "uniform": ["codec.bits=4"],
    "prior": ["codec=entropy", f"+method.extra_terms.rate={RATE}"],  # a prior learns from a rate alone
    "widths": ["codec.bits=4", "codec.widths=[2,4]"],
    "stochastic": ["codec.bits=4", "bottleneck.variance=learned"],
}
LINKS = {"perfect": [], "lossy": ["channel=packet_loss", "channel.packet_bytes=null", "channel.packet_elements=4"]}


class Row(NamedTuple):
    """One combination; exits stand before, at and behind the split where it can have them."""

    codes: str
    link: str
    form: str
    objective: str
    refused: str | None = None
    slow: bool = False


# Every pair of two factors' values stands in some row; those that are not slow have each value of each factor but ghnd.
ROWS = [
    Row("uniform", "perfect", "insert", "kd", slow=True),
    Row("uniform", "lossy", "replace", "hnd"),
    Row("uniform", "perfect", "replace", "ghnd", slow=True),
    Row("uniform", "lossy", "insert", "reconstruction", slow=True),
    Row("uniform", "perfect", "replace", "extra", slow=True),
    Row("prior", "lossy", "replace", "kd", slow=True),
    Row("prior", "perfect", "insert", "hnd", slow=True),
    Row("prior", "lossy", "insert", "ghnd", slow=True),
    Row("prior", "perfect", "insert", "reconstruction"),
    Row("prior", "lossy", "insert", "extra", slow=True),
    Row("widths", "perfect", "replace", "kd"),
    Row("widths", "lossy", "insert", "hnd", slow=True),
    Row("widths", "perfect", "insert", "ghnd", slow=True),
    Row("widths", "lossy", "insert", "reconstruction", slow=True),
    Row("widths", "perfect", "insert", "extra", slow=True),
    Row("stochastic", "lossy", "insert", "kd", slow=True),
    Row("stochastic", "perfect", "replace", "hnd", slow=True),
    Row("stochastic", "lossy", "replace", "ghnd", slow=True),
    Row("stochastic", "perfect", "insert", "reconstruction", slow=True),
    Row("stochastic", "lossy", "replace", "extra"),
    # What replaces the head leaves no feature before the bottleneck.
    Row("uniform", "perfect", "replace", "reconstruction", refused="needs the head before the bottleneck"),
]


def overrides(row: Row, base: Path) -> list[str]:
    """What train.py is told to run a row."""
    exits = "[layer2,layer3]" if row.form == "replace" else "[layer1,layer2,layer3]"
    given = ["backbone.name=resnet20", "backbone.in_channels=1", "data.image_size=8", f"base.ckpt_path={base}"]
    given += ["split.at=layer2", f"split.form={row.form}", f"exits.at={exits}", "exits.head.convs=0"]
    given += ["bottleneck.channels=3", "bottleneck.width=8", *CODES[row.codes], *LINKS[row.link]]
    given += TRAINED[row.objective]
    if row.objective != "extra":
        given.append(f"+method.extra_terms.exits={EXITS}")
    given += ["trainer=cpu", "trainer.max_epochs=2", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1"]
    given += ["+trainer.limit_test_batches=2", "training.scheduler=null", "logger=none", "callbacks.progress=null"]
    return [*given, "+trainer.enable_progress_bar=false", "data.batch_size=16"]


def trained(folder: Path, *given: str) -> dict[str, float]:
    quiet()
    return train(compose_config("train", given, folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def exported(checkpoint: Path, bundle: Path, *options: str) -> Path:
    given = [f"ckpt_path={checkpoint}", f"bundle={bundle}", "trainer=cpu", "+trainer.enable_progress_bar=false"]
    return export(
        compose_config("export", [*given, "+trainer.limit_test_batches=1", *options], bundle.parent / "export")
    )


def params(rows: list[Row], quick: Container[str] = CODES) -> list[object]:
    return [
        pytest.param(row, id="-".join(row[:4]), marks=[pytest.mark.slow] * (row.slow or row.codes not in quick))
        for row in rows
    ]


RUN = [row for row in ROWS if row.refused is None]


class Whole(NamedTuple):
    """A row that was trained and tested without a break."""

    row: Row
    folder: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module", params=params(RUN))
def whole(request, tmp_path_factory, teacher_file) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    return Whole(request.param, folder, trained(folder, *overrides(request.param, teacher_file)))


def test_combinations_train_test_export_and_run(whole, tmp_path):
    row, metrics = whole.row, whole.metrics
    assert metrics["test/payload_bytes"] > 0
    exits = ["layer2", "layer3", "final"] if row.form == "replace" else ["layer1", "layer2", "layer3", "final"]
    assert {f"test/acc_exit/{name}" for name in exits} <= metrics.keys()
    assert 0 <= metrics["test/policy/acc"] <= 1
    assert metrics["test/policy/payload_bytes"] <= metrics["test/payload_bytes"] + 1e-6
    if row.codes == "widths":
        assert {"test/bits2/acc", "test/bits4/acc", "test/bits4/payload_bytes"} <= metrics.keys()
        assert metrics["test/bits4/payload_bytes"] == 2 * metrics["test/bits2/payload_bytes"] - ENVELOPE_BYTES

    bundle = exported(whole.folder / "checkpoints/best.ckpt", tmp_path / "bundle")
    loaded = load_bundle(bundle)
    loaded.self_test()
    result = Pipeline(loaded).run(Digits(image_size=8).sample_batch("test", 8)["images"])
    assert result.logits.shape == (8, 10)
    assert result.exits is not None
    assert set(result.exits.tolist()) <= set(range(len(exits)))
    on_device = len(exits) - (3 if row.form == "insert" else 4) + 1
    sent = [count > 0 for count in result.payload_bytes]
    assert sent == [int(left) >= on_device for left in result.exits] or row.form == "replace"


# A prior is learned beside the codes, and stochastic ones are drawn: both must go on where they were.
@pytest.mark.parametrize("whole", params(RUN, quick=("prior", "stochastic")), indirect=True)
def test_combinations_go_on_exactly(whole, tmp_path, teacher_file):
    row, half = whole.row, tmp_path / "half"
    trained(half, *overrides(row, teacher_file), "trainer.max_epochs=1", "test=false")
    resumed = half / "checkpoints/last.ckpt"
    trained(tmp_path / "resumed", *overrides(row, teacher_file), f"ckpt_path={resumed}", "test=false")
    straight, again = weights(whole.folder), weights(tmp_path / "resumed")
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.parametrize("row", params([row for row in ROWS if row.refused]))
def test_what_is_refused_is_refused_for_a_reason(row, tmp_path, teacher_file):
    with pytest.raises(ValueError, match=row.refused):
        trained(tmp_path, *overrides(row, teacher_file))


def test_every_pair_stands_in_some_row():
    for i in range(4):
        for j in range(i + 1, 4):
            first, second = ({row[k] for row in ROWS} for k in (i, j))
            assert {(row[i], row[j]) for row in ROWS} == {(a, b) for a in first for b in second}


@pytest.mark.parametrize("form", ["insert", pytest.param("replace", marks=pytest.mark.slow)])
def test_two_bottlenecks_on_one_route(form, tmp_path, teacher_file):
    row = Row("uniform", "perfect", form, "kd")
    given = [*overrides(row, teacher_file), "split.at=[layer2,layer3]", "exits.at=null", "~method.extra_terms.exits"]
    given += ["+codec.at.layer3={bits: 2}", "+bottleneck.at.layer3={channels: 2}"]
    metrics = trained(tmp_path / "run", *given)
    assert metrics["test/payload_bytes"] == pytest.approx(
        metrics["test/payload_bytes/layer2"] + metrics["test/payload_bytes/layer3"]
    )
    bundle = exported(
        tmp_path / "run/checkpoints/best.ckpt", tmp_path / "bundle", "exits.placements=[device,edge,cloud]"
    )
    loaded = load_bundle(bundle)
    loaded.self_test()
    assert [part.placement for part in loaded.manifest.partitions] == ["device", "edge", "cloud"]
    result = Pipeline(loaded).run(Digits(image_size=8).sample_batch("test", 4)["images"])
    assert result.payload_bytes == [round(metrics["test/payload_bytes"])] * 4
