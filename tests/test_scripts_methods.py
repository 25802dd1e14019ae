"""Every method and every way to code, from training to the bytes of an exported bundle, on digits."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cleave.architectures import StagedNetwork
from cleave.architectures.described import GROUPS
from cleave.deployment import (
    ENVELOPE_BYTES,
    Bundle,
    Codec,
    CodecError,
    EntropyCodec,
    ParityError,
    Pipeline,
    Result,
    load_bundle,
)
from cleave.deployment.codecs.tiled_image import TiledImageCodec
from cleave.lightning_modules.checkpoints.trust import check_targets
from cleave.reports.rates.collect import collect
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.infer import infer
from cleave.scripts.train import train

from .training_helpers import numbers

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false"]
SPLIT = ["backbone.name=resnet20", "backbone.in_channels=1", "data.image_size=8", "split.at=layer2"]
SPLIT += ["bottleneck.channels=4", "bottleneck.width=8", "logger=none", "callbacks.progress=null", *QUIET]
# One short epoch, and all of the test images.
SHORT = ["debug=limit", "trainer.detect_anomaly=false", "trainer.max_epochs=1", "trainer.limit_test_batches=1.0"]
LAYERS = "method.loss.weights={layer2: 1.0, layer3: 0.5}"
ENTROPIC = ["method=entropic", "codec=entropy", LAYERS, "method.beta=1.0", "training.optimizer.lr=1e-2"]
ENTROPIC += ["trainer.limit_train_batches=8"]  # until codes differ
HND = ["method=head_distillation", "codec.bits=4"]
# What is trained, how it is coded, and the bytes it then sends; ``None`` where they vary from image to image.
CASES: dict[str, tuple[list[str], float | None]] = {
    "cross_entropy": (["method=cross_entropy"], 64),
    "knowledge_distillation": (["method=knowledge_distillation", "codec.range=learned"], 64),
    "reconstruction": (["method=reconstruction", "split.form=insert", "codec.bits=3"], 24),
    "head_distillation": ([*HND, "codec.range=sample"], 8 + 32),
    "generalized_head_distillation": (["method=generalized_head_distillation", LAYERS, "codec.bits=32"], 256),
    "information_bottleneck": (["experiment=vib"], 64),
    "information_bottleneck_log_uniform": (["experiment=shao_vfe", "codec.coding=packed_zstd"], None),
    "entropic": (ENTROPIC, None),
    "entropic_inserted": ([*ENTROPIC, "split.form=insert"], None),
    "sparse": ([*HND, "codec.coding=sparse"], None),
    "tiled_png": ([*HND, "codec.coding=tiled_png"], None),
    "tiled_jpeg": ([*HND, "codec.coding=tiled_jpeg", "codec.quality=90"], None),
}


class Ran(NamedTuple):
    """What a run left: its checkpoint, whose teacher is gone, what it measured, and its bundle."""

    checkpoint: Path
    metrics: dict[str, float]
    bundle: Path
    payload_bytes: float | None


# What other tests train as well, or other cases much alike.
ALIKE = ("cross_entropy", "entropic_inserted", "generalized_head_distillation", "head_distillation")
ALIKE += ("information_bottleneck", "reconstruction", "tiled_jpeg")


@pytest.fixture(
    scope="module", params=[pytest.param(case, marks=[pytest.mark.slow] * (case in ALIKE)) for case in CASES]
)
def ran(request, tmp_path_factory, teacher_file) -> Ran:
    quiet()
    folder = tmp_path_factory.mktemp(request.param)
    overrides, payload_bytes = CASES[request.param]
    shutil.copy(teacher_file, folder / "teacher.ckpt")
    given = [*SPLIT, *SHORT, *overrides, f"base.ckpt_path={folder}/teacher.ckpt"]
    metrics = train(compose_config("train", given, folder))
    (folder / "teacher.ckpt").unlink()
    checkpoint = folder / "checkpoints/best.ckpt"
    bundle = export(compose_config("export", [f"ckpt_path={checkpoint}", f"bundle={folder}/bundle", *QUIET], folder))
    return Ran(checkpoint, metrics, bundle, payload_bytes)


def of_the_test(metrics: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert found
    return found


def through(bundle: Bundle, checkpoint: Path, bits: int | None = None) -> tuple[list[tuple[Tensor, Result]], float]:
    """Run a bundle over the test images of a checkpoint: images and result of each batch, and the accuracy."""
    data = restore_data(restore(checkpoint), OmegaConf.create({}))
    data.setup("test")
    pipeline, found, right, count = Pipeline(bundle, bits=bits), [], 0, 0
    for batch in data.test_dataloader():
        result = pipeline.run(batch["images"])
        right += int((result.logits.argmax(1) == batch["labels"]).sum())
        count += len(batch["labels"])
        found.append((batch["images"], result))
    return found, right / count


def test_the_checkpoint_alone_gives_the_same_numbers(ran, tmp_path):
    again = evaluate(compose_config("evaluate", [f"ckpt_path={ran.checkpoint}", *QUIET], tmp_path))
    assert again == pytest.approx(of_the_test(ran.metrics), abs=1e-6)
    assert again["test/payload_bytes"] > 0
    if ran.payload_bytes is not None:
        assert again["test/payload_bytes"] == ENVELOPE_BYTES + ran.payload_bytes


def test_the_bundle_gives_each_image_the_modules_logits_through_the_modules_bytes(ran):
    bundle, restored = load_bundle(ran.bundle), restore(ran.checkpoint)
    assert numbers(bundle.manifest.metrics) == pytest.approx(of_the_test(ran.metrics), abs=1e-6)
    assert bundle.manifest.parity["max_difference"] <= 1e-5
    bundle.self_test()
    network, lengths, sent = restored.network, [], []

    def link(cut: str, codec: Codec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sent.append((cut, codec.encode(tensors)))
        return codec.decode(sent[-1][1])

    batches, accuracy = through(bundle, ran.checkpoint)
    with torch.no_grad():
        for images, result in batches:
            logits = network.outputs(restored.image_input.normalize(images), ["logits"], link=link)["logits"]
            ((cut, payloads),) = result.payloads.items()
            assert (cut, [payload[ENVELOPE_BYTES:] for payload in payloads]) == sent.pop()
            torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=1e-5)
            lengths += result.payload_bytes
    assert not sent
    assert accuracy == pytest.approx(ran.metrics["test/acc"], abs=1e-6)
    assert sum(lengths) / len(lengths) == pytest.approx(ran.metrics["test/payload_bytes"], rel=1e-5)
    assert (len(set(lengths)) == 1) == (ran.payload_bytes is not None)


def codec_of(bundle: Bundle) -> Codec:
    (codec,) = bundle.manifest.route.codecs.values()
    return codec


def test_a_payload_that_is_cut_short_or_altered_is_refused(ran, monkeypatch):
    bundle = load_bundle(ran.bundle)
    pipeline, codec, images = Pipeline(bundle), codec_of(bundle), bundle.samples["device"]["images"]
    encode = type(codec).encode
    damages = [lambda payload: payload[:-1], lambda payload: payload[: len(payload) // 2], lambda payload: b""]
    if isinstance(codec, EntropyCodec):
        damages += [lambda p, i=i: p[:i] + bytes([p[i] ^ 1]) + p[i + 1 :] for i in (0, -2, -1)]
        damages += [lambda p: p + b"\0", lambda p: b"\0" + p]
    pipeline.run(images)
    for damage in damages:
        monkeypatch.setattr(type(codec), "encode", lambda *given, damage=damage: [damage(p) for p in encode(*given)])
        with pytest.raises(CodecError):
            pipeline.run(images)


@pytest.fixture(scope="module")
def switchable(tmp_path_factory, teacher_file) -> Ran:
    """A network of three widths that was trained until they differ."""
    quiet()
    folder = tmp_path_factory.mktemp("switchable")
    given = ["method=cross_entropy", "codec.widths=[2,4,8]", "codec.bits=4", *SPLIT, "trainer.max_epochs=4"]
    given += [f"base.ckpt_path={teacher_file}", "training.optimizer.lr=1e-2", "export=true"]
    metrics = train(compose_config("train", given, folder))
    assert metrics["test/acc"] == metrics["test/bits4/acc"] > 0.4
    assert len({metrics[f"test/bits{bits}/acc"] for bits in (2, 4, 8)}) == 3
    return Ran(folder / "checkpoints/best.ckpt", metrics, folder / "bundle", 32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_width_runs_with_its_own_batchnorm_at_the_accuracy_in_the_manifest(switchable, bits):
    bundle, metrics = load_bundle(switchable.bundle), switchable.metrics
    accuracy = through(bundle, switchable.checkpoint, bits)[1]
    assert accuracy == pytest.approx(metrics[f"test/bits{bits}/acc"], abs=1e-6)
    assert accuracy == pytest.approx(bundle.manifest.metrics[f"test/bits{bits}/acc"], abs=1e-6)
    assert metrics[f"test/bits{bits}/payload_bytes"] == ENVELOPE_BYTES + 8 * bits
    codec = codec_of(bundle).with_bits(bits)
    images = {"images": bundle.samples["device"]["images"]}
    outputs = bundle.partitions["device"](images | codec.settings_of("layer2"))
    received = codec.decode(codec.encode({name.removeprefix("layer2."): sent for name, sent in outputs.items()}))
    delivered = {f"layer2.{name}": tensor for name, tensor in received.items()}
    logits = bundle.partitions["server"](delivered | codec.settings_of("layer2"))["logits"]
    network = restore(switchable.checkpoint, bits=bits).network
    given = {"layer2/received": network.bottlenecks["layer2"].receive(received)}
    with torch.no_grad():
        torch.testing.assert_close(logits, answers(network, given), atol=1e-5, rtol=1e-5)
        network.set_bits(8 if bits == 2 else 2)  # the same codes, normalised by the statistics of another width
        assert not torch.allclose(logits, answers(network, given), atol=1e-2)


def answers(network: StagedNetwork, given: dict[str, Tensor]) -> Tensor:
    return network.outputs(None, ["logits"], given=given)["logits"]


def test_a_width_between_those_trained_takes_the_nearest_ones_batchnorm_and_leaves_it_alone(switchable, tmp_path):
    overrides = [f"ckpt_path={switchable.checkpoint}", "codec.bits=3", *QUIET]
    again = evaluate(compose_config("evaluate", overrides, tmp_path))
    assert again["test/payload_bytes"] == ENVELOPE_BYTES + 24
    assert [(p.bits, p.payload_bytes - ENVELOPE_BYTES) for p in collect([tmp_path])] == [
        (2, 16),
        (4, 32),
        (8, 64),
        (3, 24),
    ]
    for bits in (2, 4, 8):
        assert again[f"test/bits{bits}/acc"] == pytest.approx(switchable.metrics[f"test/bits{bits}/acc"], abs=1e-6)
    found = through(load_bundle(switchable.bundle), switchable.checkpoint, 3)
    assert found[1] == pytest.approx(again["test/acc"], abs=1e-6)
    with pytest.raises(ValueError, match=r"codec\.bits=32.*widths=\[2, 4, 8\]"):
        evaluate(compose_config("evaluate", [*overrides, "codec.bits=32"], tmp_path))


def test_features_are_sent_without_a_bottleneck_and_without_training(tmp_path, teacher_file):
    quiet()
    given = ["method=cross_entropy", "split.form=none", "codec.range=sample", "train=false"]
    given += SPLIT
    metrics = train(compose_config("train", [*given, "export=true", f"base.ckpt_path={teacher_file}"], tmp_path))
    unsplit = evaluate(compose_config("evaluate", [f"ckpt_path={teacher_file}", *QUIET], tmp_path / "teacher"))
    assert metrics["test/payload_bytes"] == ENVELOPE_BYTES + 32 * 4 * 4 + 8
    assert metrics["test/acc"] == pytest.approx(unsplit["test/acc"], abs=0.03)
    bundle = load_bundle(tmp_path / "bundle")
    bundle.self_test()
    assert through(bundle, teacher_file)[1] == pytest.approx(metrics["test/acc"], abs=1e-6)


def test_infer_says_how_long_payloads_of_any_length_are(ran, tmp_path, capsys):
    capsys.readouterr()
    predicted = infer(compose_config("infer", [f"bundle={ran.bundle}", "input=digits", "limit=8"], tmp_path))
    printed = capsys.readouterr().out
    lengths = Pipeline(load_bundle(ran.bundle)).run(digits(8)).payload_bytes
    assert len(predicted) == 8
    if len(set(lengths)) == 1:
        assert f"Payload: {lengths[0]} bytes an image." in printed
    else:
        mean = f"{sum(lengths) / 8:,.1f} bytes an image on average, {min(lengths)} to {max(lengths)}."
        assert f"Payload: {mean}" in printed
    assert ("There is no other width." in printed) == (not codec_of(load_bundle(ran.bundle)).levels)


def digits(count: int) -> Tensor:
    from cleave.datamodules import Digits

    data = Digits()
    data.setup("test")
    return data.sample_batch("test", count)["images"]


def test_a_codec_without_widths_refuses_bits(ran):
    bundle = load_bundle(ran.bundle)
    if codec_of(bundle).levels:
        assert len(Pipeline(bundle, bits=5).run(bundle.samples["device"]["images"]).logits) == 16
    else:
        with pytest.raises(CodecError, match="bits"):
            Pipeline(bundle, bits=5)


@pytest.mark.parametrize("ran", ["entropic"], indirect=True)
def test_an_entropy_coders_tables_are_in_the_manifest(ran):
    codec = codec_of(load_bundle(ran.bundle))
    prior = restore(ran.checkpoint).network.bottlenecks["layer2"].quantizer
    assert isinstance(codec, EntropyCodec)
    assert dataclasses.asdict(codec) == dataclasses.asdict(prior.codec(codec.shape))
    assert all(sum(table) == 65536 for table in codec.frequencies)


@pytest.mark.parametrize(("ran", "lossless"), [("tiled_png", True), ("tiled_jpeg", False)], indirect=["ran"])
def test_another_version_of_a_lossy_codec_is_no_fault_of_the_partitions(ran, lossless, monkeypatch):
    bundle = load_bundle(ran.bundle)
    codec = codec_of(bundle)
    decoded = TiledImageCodec.unpack
    monkeypatch.setattr(TiledImageCodec, "unpack", lambda *arguments: codec.levels - 1 - decoded(*arguments))
    if not lossless:
        bundle.self_test()
        bundle.samples["server"]["layer2.codes"].zero_()
    with pytest.raises(ParityError, match="the bytes of partition device" if lossless else "partition server"):
        bundle.self_test()


def test_what_a_method_names_runs_without_trust(ran):
    config = torch.load(ran.checkpoint, weights_only=True)["cleave"]["config"]
    check_targets({key: config[key] for key in (*GROUPS, "data", "method", "training")}, "x.ckpt", trusted=False)
