"""A checkpoint evaluated and exported otherwise than it was trained: calibrated codes, another width, another link."""

from pathlib import Path

import pytest
import torch

from cleave.deployment import ENVELOPE_BYTES, Pipeline, load_bundle
from cleave.reports.rates.collect import collect
from cleave.reports.rates.results import RESULTS, Point
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.train import train

from .quick_cases import some_quick
from .training_helpers import numbers

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false"]
SPLIT = ["method=cross_entropy", "backbone.name=resnet20", "backbone.in_channels=1", "data.image_size=8"]
SPLIT += ["split.at=layer2", "bottleneck.channels=4", "bottleneck.width=8", "trainer.max_epochs=4"]
SPLIT += ["training.optimizer.lr=1e-2", "logger=none", "callbacks.progress=null", *QUIET]
LOSSY = ["channel=packet_loss", "channel.packet_bytes=4"]
Trained = tuple[Path, dict[str, float]]


def trained(folder: Path, teacher_file: Path, *overrides: str) -> Trained:
    quiet()
    given = [*SPLIT, f"base.ckpt_path={teacher_file}", *overrides]
    metrics = train(compose_config("train", given, folder))
    return folder / "checkpoints/best.ckpt", metrics


@pytest.fixture(scope="module")
def in_float(tmp_path_factory, teacher_file) -> Trained:
    """A network that learned without a quantiser."""
    checkpoint, metrics = trained(tmp_path_factory.mktemp("float"), teacher_file, "codec.bits=32")
    assert metrics["test/acc"] > 0.6
    assert metrics["test/payload_bytes"] == ENVELOPE_BYTES + 4 * 64
    return checkpoint, metrics


@pytest.fixture(scope="module")
def over_a_lossy_link(tmp_path_factory, teacher_file) -> Trained:
    """A network whose representation lost packets in training, and does so in evaluation."""
    given = ["codec.bits=4", *LOSSY, "channel.rate=0.3", "export=true"]
    return trained(tmp_path_factory.mktemp("lossy"), teacher_file, *given)


def measure(checkpoint: Path, folder: Path, *overrides: str) -> dict[str, float]:
    return evaluate(compose_config("evaluate", [f"ckpt_path={checkpoint}", *QUIET, *overrides], folder))


def write(checkpoint: Path, folder: Path, *overrides: str) -> Path:
    given = [f"ckpt_path={checkpoint}", f"bundle={folder}/bundle", *QUIET, *overrides]
    return export(compose_config("export", given, folder))


def accuracy(bundle: Path) -> float:
    """Of a bundle over the test images, image by image through bytes."""
    from cleave.datamodules import Digits

    data = Digits()
    data.setup("test")
    batch = data.sample_batch("test", 10**6)
    result = Pipeline(load_bundle(bundle)).run(batch["images"])
    return float((result.logits.argmax(1) == batch["labels"]).float().mean())


# --- codes for a network that learned in float -------------------------------------------------------------------


# Of the other two there are tests below.
@pytest.mark.parametrize("method", some_quick(["mse", "minmax", "percentile"], lambda method: method == "mse"))
def test_calibrated_codes_of_8_bits_are_nearly_as_good_as_float(in_float, tmp_path, capsys, method):
    checkpoint, metrics = in_float
    found = measure(checkpoint, tmp_path, "codec.bits=8", f"recalibrate.range={method}", "recalibrate.batches=8")
    assert found["test/payload_bytes"] == ENVELOPE_BYTES + 64
    assert found["test/acc"] == pytest.approx(metrics["test/acc"], abs=0.03)
    assert f"by {method}" in capsys.readouterr().out
    (point,) = collect([tmp_path])
    assert point == Point(
        method=f"Cross entropy, calibrated by {method}",
        label="layer2, 4 channels, 8 bits",
        accuracy=found["test/acc"],
        payload_bytes=ENVELOPE_BYTES + 64.0,
        payload_zstd_bytes=found["test/payload_zstd_bytes"],
        encoder_macs=14_976,
        encoder_params=972,
        bits=8,
        seed=0,
        backbone="resnet20",
        checkpoint=str(checkpoint),
    )


def test_few_bits_are_better_with_the_range_of_least_error(in_float, tmp_path):
    checkpoint, _ = in_float
    losses = {
        method: measure(checkpoint, tmp_path, "codec.bits=2", f"recalibrate.range={method}")["test/loss"]
        for method in ("mse", "minmax")
    }
    assert losses["mse"] < losses["minmax"]


def test_a_calibrated_network_is_exported_as_it_was_evaluated(in_float, tmp_path, capsys):
    checkpoint, _ = in_float
    settings = ["codec.bits=4", "recalibrate.batches=8", "recalibrate.range=percentile"]
    found = measure(checkpoint, tmp_path / "evaluate", *settings)
    assert f"Next: python scripts/export.py ckpt_path={checkpoint} codec.bits=4" in capsys.readouterr().out
    manifest = load_bundle(write(checkpoint, tmp_path, *settings)).manifest
    assert numbers(manifest.metrics) == pytest.approx(found, abs=1e-6)
    (point,) = collect([tmp_path / "bundle"])
    assert (point.accuracy, point.payload_bytes, point.bits) == (found["test/acc"], ENVELOPE_BYTES + 32, 4)
    assert accuracy(tmp_path / "bundle") == pytest.approx(found["test/acc"], abs=1e-6)
    assert manifest.route.codecs["layer2"].bits == 4
    assert manifest.config["codec"]["bits"] == 4
    assert manifest.config["recalibrate"] == {"batches": 8, "range": "percentile"}


@pytest.mark.slow
def test_a_network_of_codes_is_recalibrated_at_another_width(over_a_lossy_link, tmp_path):
    checkpoint, _ = over_a_lossy_link
    loss = {count: measure(checkpoint, tmp_path, "codec.bits=2", f"recalibrate.batches={count}") for count in (0, 20)}
    assert loss[20]["test/loss"] < loss[0]["test/loss"]
    assert [point.method for point in collect([tmp_path])] == ["Cross entropy, recalibrated"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["codec.bits=4", "recalibrate.batches=0"], r"codec\.bits=4: .*trained in float.*recalibrate\.batches"),
        (["recalibrate.batches=-1"], r"recalibrate\.batches must be a whole number of at least 0, got -1"),
        pytest.param(
            ["recalibrate.batches=2.5"],
            r"recalibrate\.batches must be a whole number of at least 0, got 2\.5",
            marks=pytest.mark.slow,
        ),
        (["recalibrate.range=minimax"], r"recalibrate\.range must be one of .*'minimax'\. Did you mean 'minmax'"),
        (["codec.bits=1"], r"bits must be 2 to 16, or 32 for float, got 1"),
        pytest.param(["codec.bits=17"], r"bits must be 2 to 16, or 32 for float, got 17", marks=pytest.mark.slow),
        (["channel=bit_errors"], r"bit errors flip .* 32 bits send float32.*choose bits"),
        ([*LOSSY, "channel.rate=1.5"], r"channel\.rate"),
        (["split=train"], "val or test"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(in_float, tmp_path, overrides, told):
    with pytest.raises(ValueError, match=told):
        measure(in_float[0], tmp_path, *overrides)
    assert not (tmp_path / RESULTS).exists()


def test_an_unsplit_network_has_neither_codes_nor_a_link(teacher_file, tmp_path):
    for overrides, told in (
        (["codec.bits=4"], "codec.bits=4 .*not split"),
        (LOSSY, "channel has no meaning: .*not split"),
    ):
        with pytest.raises(ValueError, match=told):
            measure(teacher_file, tmp_path, *overrides)
    assert "test/payload_bytes" not in measure(teacher_file, tmp_path)
    assert not (tmp_path / RESULTS).exists()


# --- the link ----------------------------------------------------------------------------------------------------


def test_packets_are_lost_as_asked_for_and_alike_under_one_seed(in_float, tmp_path):
    checkpoint, metrics = in_float
    lossy = [*LOSSY, "channel.rate=0.5"]
    lost, again = (measure(checkpoint, tmp_path / name, *lossy) for name in ("lost", "again"))
    assert lost == again
    assert lost["test/acc"] < metrics["test/acc"] - 0.05
    assert lost["test/payload_bytes"] == metrics["test/payload_bytes"]
    assert measure(checkpoint, tmp_path, *lossy, "seed=1")["test/loss"] != lost["test/loss"]
    (point,) = collect([tmp_path / "lost"])
    assert (point.method, point.accuracy) == ("Cross entropy, packet loss 0.5", lost["test/acc"])
    for overrides in (["channel=perfect"], [*LOSSY, "channel.rate=0.0"], [*lossy, "channel.when=train"]):
        assert measure(checkpoint, tmp_path, *overrides) == pytest.approx(metrics_of_the_test(metrics), abs=1e-6)


def metrics_of_the_test(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


def test_a_link_may_need_the_codes_that_calibration_gives(in_float, tmp_path):
    found = {
        rate: measure(in_float[0], tmp_path, "codec.bits=8", "channel=bit_errors", f"channel.rate={rate}")
        for rate in (0.0, 0.2)
    }
    assert found[0.2]["test/acc"] < found[0.0]["test/acc"]
    assert [point.method for point in collect([tmp_path])] == ["Cross entropy, calibrated by mse, bit errors 0.2"]


def test_a_bundle_is_measured_over_a_perfect_link(over_a_lossy_link, tmp_path):
    checkpoint, metrics = over_a_lossy_link
    assert measure(checkpoint, tmp_path) == pytest.approx(metrics_of_the_test(metrics), abs=1e-6)
    perfect = measure(checkpoint, tmp_path, "channel=perfect")
    assert [point.method for point in collect([tmp_path])] == ["Cross entropy, perfect link"]
    assert perfect["test/acc"] > metrics["test/acc"]
    assert numbers(load_bundle(write(checkpoint, tmp_path)).manifest.metrics) == pytest.approx(perfect, abs=1e-6)
    assert accuracy(tmp_path / "bundle") == pytest.approx(perfect["test/acc"], abs=1e-6)
    written_at_once = numbers(load_bundle(checkpoint.parents[1] / "bundle").manifest.metrics)
    assert written_at_once == pytest.approx(perfect, abs=1e-6)


@pytest.mark.slow
def test_a_link_of_training_alone_changes_the_weights_and_no_evaluation(tmp_path, teacher_file):
    short = ["debug=limit", "trainer.detect_anomaly=false", "trainer.max_epochs=1"]
    lossy = trained(tmp_path / "lossy", teacher_file, *short, *LOSSY, "channel.rate=0.5", "channel.when=train")
    whole = trained(tmp_path / "whole", teacher_file, *short)
    networks = [restore(checkpoint).network for checkpoint, _ in (lossy, whole)]
    weights = [network.bottlenecks["layer2"].decoder.state_dict() for network in networks]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    limited = "+trainer.limit_test_batches=2"
    for overrides in ([], ["channel=perfect"]):
        found = measure(lossy[0], tmp_path, limited, *overrides)
        assert found == pytest.approx(metrics_of_the_test(lossy[1]), abs=1e-6)


@pytest.mark.slow
def test_packets_of_an_entropy_coded_representation_are_counted_in_elements(tmp_path, teacher_file):
    entropic = [
        "method=entropic",
        "codec=entropy",
        "method.loss.weights={layer2: 1.0}",
        "method.beta=1.0",
        "debug=limit",
    ]
    entropic += ["trainer.detect_anomaly=false", "trainer.max_epochs=1"]
    checkpoint, metrics = trained(tmp_path, teacher_file, *entropic)
    with pytest.raises(ValueError, match=r"channel\.packet_bytes=32 .*give packet_elements and packet_bytes=null"):
        measure(checkpoint, tmp_path, "channel=packet_loss")
    elements = ["channel=packet_loss", "channel.packet_bytes=null", "channel.packet_elements=4", "channel.rate=0.5"]
    found = measure(checkpoint, tmp_path, *elements, "+trainer.limit_test_batches=2")
    assert found["test/loss"] != metrics["test/loss"]
    for script in (measure, write):
        with pytest.raises(ValueError, match=r"codec\.bits=4: a learned prior has no width of codes"):
            script(checkpoint, tmp_path, "codec.bits=4")


# --- the envelope ------------------------------------------------------------------------------------------------


def test_the_envelope_is_left_out_by_choice_and_counted_as_it_is_sent(in_float, tmp_path):
    checkpoint, _ = in_float
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    for chosen, length in (((), ENVELOPE_BYTES + 4 * 64), (("split.envelope=false",), 4 * 64)):
        folder = write(checkpoint, tmp_path / str(length), *chosen)
        bundle = load_bundle(folder)
        assert bundle.manifest.envelope == (not chosen)
        assert bundle.manifest.config["split"]["envelope"] == (not chosen)
        assert bundle.manifest.metrics["test/payload_bytes"] == length
        assert Pipeline(bundle).run(images).payload_bytes == [length] * 3
    with pytest.raises(ValueError, match=r"split\.envelope must be true or false, got 'maybe'"):
        write(checkpoint, tmp_path / "wrong", "split.envelope=maybe")
