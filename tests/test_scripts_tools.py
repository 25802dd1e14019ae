"""cut_points, evaluate, export and infer as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cleave.deployment import ENVELOPE_BYTES
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.infer import infer
from cleave.scripts.train import train

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher_file) -> Path:
    quiet()
    folder = tmp_path_factory.mktemp("student")
    overrides = [
        "experiment=digits_hnd",
        f"base.ckpt_path={teacher_file}",
        "codec.range=sample",
        "test=false",
        *QUIET,
    ]
    train(compose_config("train", [*overrides, "trainer.max_epochs=2", "callbacks.progress=null"], folder))
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return export(compose_config("export", [f"ckpt_path={student}", f"bundle={folder}/bundle", *QUIET], folder))


def test_the_table_of_cut_points_marks_what_is_smaller_than_the_image():
    command = [sys.executable, str(ROOT / "scripts/cut_points.py"), "backbone.name=resnet20", "num_classes=10"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "COLUMNS": "160"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert "64×8×8" in rows["layer3"]
    assert "16,384" in rows["layer3"]
    assert "NCHW" in rows["layer3"]
    assert "4,096" in rows["layer3"]
    assert "<" not in rows["layer3"]  # 4,096 codes against 3,072 pixels
    assert list(rows).index("layer1") < list(rows).index("layer2") < list(rows).index("layer3")


def test_another_width_changes_bytes_and_measures_batchnorm_again(student, tmp_path, capsys):
    metrics = {
        bits: evaluate(compose_config("evaluate", [f"ckpt_path={student}", f"codec.bits={bits}", *QUIET], tmp_path))
        for bits in (2, 4, 8)
    }
    assert [m["test/payload_bytes"] for m in metrics.values()] == [ENVELOPE_BYTES + 8 + n for n in (16, 32, 64)]
    assert "BatchNorm layers of the decoder measured again at 2 bits" in capsys.readouterr().out
    assert len({m["test/loss"] for m in metrics.values()}) == 3


def test_validation_images_can_be_asked_for(student, tmp_path):
    metrics = evaluate(compose_config("evaluate", [f"ckpt_path={student}", "split=val", *QUIET], tmp_path))
    assert "val/acc" in metrics
    with pytest.raises(ValueError, match="val or test"):
        evaluate(compose_config("evaluate", [f"ckpt_path={student}", "split=train", *QUIET], tmp_path))


def test_an_override_the_data_lack_is_refused(student, tmp_path):
    with pytest.raises(ValueError, match=r"data\.root=.*no meaning.*Digits"):
        evaluate(compose_config("evaluate", [f"ckpt_path={student}", "data.root=somewhere", *QUIET], tmp_path))


def test_infer_reads_digits_a_folder_and_one_image_alike(bundle, tmp_path, capsys):
    from cleave.datamodules import Digits

    data = Digits()
    for i, pixels in enumerate(data.sample_batch("test", 5)["images"]):
        picture = Image.fromarray(pixels[0].numpy())
        (picture.convert("RGBA") if i == 1 else picture).save(tmp_path / f"{i}.png")
    run = [f"bundle={bundle}", "limit=5", "batch_size=2"]
    from_digits = infer(compose_config("infer", [*run, "input=digits"], tmp_path / "out"))
    from_folder = infer(compose_config("infer", [*run, f"input={tmp_path}"], tmp_path / "out"))
    from_file = infer(compose_config("infer", [*run, f"input={tmp_path}/3.png"], tmp_path / "out"))
    assert from_digits == from_folder
    assert from_file == from_folder[3:4]
    printed = capsys.readouterr().out
    assert "52" in printed  # an envelope of 12 bytes, 8 of range and 64 codes of 4 bits
    assert "pack after device" in printed
    infer(compose_config("infer", [*run, "input=digits", "bits=8"], tmp_path / "out"))
    assert "84" in capsys.readouterr().out


def test_infer_says_what_it_cannot_read(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in"):
        infer(compose_config("infer", [f"bundle={bundle}", f"input={tmp_path}/empty"], tmp_path / "out"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        infer(compose_config("infer", [f"bundle={bundle}", f"input={tmp_path}/bad.png"], tmp_path / "out"))
    with pytest.raises(ValueError, match="bits"):
        infer(compose_config("infer", [f"bundle={bundle}", "input=digits", "bits=1"], tmp_path / "out"))
