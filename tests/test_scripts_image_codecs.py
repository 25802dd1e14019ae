"""image_codecs as a person runs it."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES
from cleave.deployment.codecs.image_codecs import JPEGCodec
from cleave.reports.rates.results import Point, read_results
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.image_codecs import image_codecs
from cleave.scripts.train import train

from .training_helpers import run_script

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false"]


def run(teacher_file, folder, *overrides):
    return image_codecs(compose_config("image_codecs", [f"ckpt_path={teacher_file}", *overrides], folder))


@pytest.fixture(scope="module")
def points(teacher_file, tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("codecs")
    found = run(teacher_file, folder, "qualities=[5,50]")
    return folder, {(point.method, point.label): point for point in found}


@pytest.fixture(scope="module")
def digits(teacher_file):
    data = Digits()
    data.configure_input(restore(teacher_file).image_input)
    batch = data.sample_batch("test", 10**6)
    return data, batch["images"], batch["labels"]


def test_lossless_ways_score_as_the_checkpoint_does(points, teacher_file, tmp_path):
    _, points = points
    expected = evaluate(compose_config("evaluate", [f"ckpt_path={teacher_file}", *QUIET], tmp_path))["test/acc"]
    for way in (("uint8 input", "raw"), ("png input", "lossless"), ("webp input", "lossless")):
        assert points[way].accuracy == pytest.approx(expected, abs=1e-6)
    assert points["uint8 input", "raw"].payload_bytes == 64


def test_a_lossy_way_scores_as_pillows_own_pictures_do(points, digits, teacher_file):
    _, points = points
    data, images, labels = digits
    network = restore(teacher_file).network
    for quality in (5, 50):
        scans, arrived = [], []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(buffer, "JPEG", quality=quality, subsampling=0)
            scans.append(len(buffer.getvalue()) - len(JPEGCodec((1, 8, 8), quality).header) - 2)
            arrived.append(torch.from_numpy(np.array(Image.open(buffer))[None]))
        with torch.no_grad():
            correct = network(data.input.normalize(torch.stack(arrived))).argmax(1) == labels
        point = points["jpeg input", f"q{quality}"]
        assert point.payload_bytes == pytest.approx(ENVELOPE_BYTES + np.mean(scans))
        assert point.accuracy == pytest.approx(correct.double().mean().item(), abs=2.1 / len(labels))


def test_fewer_bytes_go_with_a_lower_quality(points):
    _, points = points
    for method in ("jpeg input", "webp input"):
        assert points[method, "q5"].payload_bytes < points[method, "q50"].payload_bytes
    assert set(points) == {
        ("uint8 input", "raw"),
        *((f"{codec} input", f"q{quality}") for codec in ("jpeg", "webp") for quality in (5, 50)),
        ("webp input", "lossless"),
        ("png input", "lossless"),
    }


def test_the_results_are_written_as_points_of_a_baseline(points):
    folder, points = points
    values = json.loads((folder / "results.json").read_text())
    assert (values["schema"], values["kind"], len(values["points"])) == (1, "baseline", 7)
    read = [Point.from_dict(found, where) for where, found in read_results(folder / "results.json")]
    assert read == list(points.values())
    for point in read:
        assert (point.encoder_macs, point.encoder_params, point.epochs, point.train_seconds) == (0, 0, None, None)
        assert 0 <= point.accuracy <= 1
        assert point.kind == "baseline"


def test_one_codec_and_one_quality_need_no_list_and_val_can_be_asked_for(teacher_file, tmp_path):
    found = run(teacher_file, tmp_path, "codecs=jpeg", "qualities=50", "split=val")
    assert [(point.method, point.label) for point in found] == [("uint8 input", "raw"), ("jpeg input", "q50")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codecs=[jpg]", "codecs must be some of jpeg, webp, webp_lossless, png, got 'jpg'. Did you mean 'jpeg'"),
        ("qualities=[0]", "quality must be a whole number, 1 to 100, got 0"),
        ("split=train", "split must be val or test, got 'train'"),
        ("data.root=somewhere", r"data\.root=.*somewhere has no meaning"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, message, teacher_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(teacher_file, tmp_path, override)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("experiment", ["digits_hnd", pytest.param("digits_exits", marks=pytest.mark.slow)])
def test_a_split_network_is_refused_with_exits_or_without(experiment, teacher_file, tmp_path):
    overrides = [f"experiment={experiment}", f"base.ckpt_path={teacher_file}", "test=false", "trainer.max_epochs=1"]
    overrides += ["+trainer.limit_train_batches=1", "callbacks.progress=null", *QUIET]
    train(compose_config("train", overrides, tmp_path / "student"))
    with pytest.raises(ValueError, match="holds a split network.*give the checkpoint of its base"):
        run(tmp_path / "student/checkpoints/best.ckpt", tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_network_with_exits_alone_is_a_baseline_by_its_last_answer(teacher_file, tmp_path):
    overrides = ["experiment=digits_exits", f"base.ckpt_path={teacher_file}", "split.at=null", "trainer.max_epochs=1"]
    overrides += ["+trainer.limit_train_batches=1", "callbacks.progress=null", *QUIET]
    metrics = train(compose_config("train", overrides, tmp_path / "student"))
    (point,) = run(tmp_path / "student/checkpoints/best.ckpt", tmp_path, "codecs=[]")
    assert point.accuracy == pytest.approx(metrics["test/acc"], abs=1e-6)


def test_the_script_prints_a_table_and_what_comes_next(teacher_file, tmp_path):
    told = run_script(
        "image_codecs", f"ckpt_path={teacher_file}", "codecs=[jpeg]", "qualities=[50]", folder=tmp_path / "o"
    )
    assert "jpeg input, q50" in told
    assert "payload bytes" in told
    assert "as a file" in told
    assert f"scripts/compare.py 'inputs=[{tmp_path}/o/results.json,RUNS]'" in told
    assert "ckpt_path has no value" in run_script("image_codecs", folder=tmp_path / "p", code=1)
