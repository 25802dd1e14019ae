"""cut_points, evaluate, export and infer as a person runs them."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules.command_line import in_hydra
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.infer import infer
from cleave.scripts.train import train

from .training_helpers import script

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
        "+trainer.limit_train_batches=8",
        *QUIET,
    ]
    train(compose_config("train", [*overrides, "trainer.max_epochs=2", "callbacks.progress=null"], folder))
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return export(compose_config("export", [f"ckpt_path={student}", f"bundle={folder}/bundle", *QUIET], folder))


def test_the_table_of_cut_points_marks_what_is_smaller_than_the_image():
    result = script("cut_points", "backbone.name=resnet20", "num_classes=10", cwd=ROOT, COLUMNS="160")
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
    assert "Payload: 52 bytes an image" in printed  # the envelope, 8 bytes of range and 64 codes of 4 bits
    assert "pack after device" in printed
    infer(compose_config("infer", [*run, "input=digits", "bits=8"], tmp_path / "out"))
    assert "Payload: 84 bytes an image" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Digits as files by class: more than the table shows, in folders with names that no table is wide enough for."""
    from cleave.datamodules import Digits

    root = tmp_path_factory.mktemp("tree") / "some [very] bold folder"
    batch = Digits().sample_batch("test", 40)
    for i, (pixels, label) in enumerate(zip(batch["images"], batch["labels"].tolist(), strict=True)):
        folder = root / str(label) / "taken in a place that has a long name" / "and on a day that has another one"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(folder / f"{i}.png")
    return root


def inferred(bundle: Path, folder: Path, *overrides: str) -> list[str]:
    return infer(compose_config("infer", [f"bundle={bundle}", *overrides], folder))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "CSV"])
def test_class_folders_give_an_accuracy_and_a_file(bundle, tree, tmp_path, capsys, ending):
    file = tmp_path / "new" / f"answers.{ending}"
    predicted = inferred(bundle, tmp_path, f"input={in_hydra(tree)}", "limit=null", f"output={file}")
    printed = capsys.readouterr().out
    if ending == "jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["prediction"] for row in rows] == predicted
    assert all(Path(row["image"]).parts[0] == row["label"] for row in rows)
    assert all((tree / row["image"]).stat().st_size == int(row["file_bytes"]) for row in rows)
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert sum(str(row["correct"]) == "True" for row in rows) == right
    assert f"Accuracy: {right / 40:.2%}, {right} of 40 images with a label" in printed
    assert f"Written: {file}" in printed


def test_the_table_is_cut_to_what_fits(bundle, tree, tmp_path, capsys):
    inferred(bundle, tmp_path, f"input={in_hydra(tree)}", "limit=null")
    table = capsys.readouterr().out.partition("Accuracy")[0].splitlines()
    assert "… and 8 more; output=FILE.csv or output=FILE.jsonl writes all of them" in table
    assert f"40 images through {bundle}" in table
    assert sum(line.rstrip().endswith("│") for line in table) == 32
    assert len({len(line) for line in table if line.startswith(("│", "┃"))}) == 1
    assert all(len(line) <= 120 for line in table if line.startswith("│"))
    assert sum(bool(re.search(r"…\S.*another one/\d+\.png", line)) for line in table) == 32


def test_an_accuracy_over_the_first_images_alone_says_so(bundle, tree, tmp_path, capsys):
    inferred(bundle, tmp_path, f"input={in_hydra(tree)}", "limit=5")
    assert "These are the first 5 of 40 images, by their names; limit=null runs all" in capsys.readouterr().out
    inferred(bundle, tmp_path, f"input={in_hydra(tree)}", "limit=40")
    assert "These are the first" not in capsys.readouterr().out
    for limit in ("0", "-1", "many"):
        with pytest.raises(ValueError, match=f"limit must be .* got {limit}"):
            inferred(bundle, tmp_path, "input=digits", f"limit={limit}")


def test_images_without_a_class_have_no_accuracy(bundle, tree, tmp_path, capsys):
    picture = next(tree.rglob("*.png"))
    shutil.copy(picture, tmp_path / "alone.png")
    inferred(bundle, tmp_path, f"input={tmp_path}/alone.png")
    assert "Accuracy" not in capsys.readouterr().out
    (tmp_path / "7").mkdir()
    shutil.copy(picture, tmp_path / "7")
    inferred(bundle, tmp_path, f"input={tmp_path}/7")
    assert "of 1 images with a label" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["answers.txt", "answers", "."])
def test_a_file_of_no_known_format_is_refused_before_anything_runs(tmp_path, output):
    with pytest.raises(ValueError, match=r"output=.* must be a file that ends in \.csv or \.jsonl"):
        inferred(tmp_path / "nowhere", tmp_path, "input=digits", f"output={output}")


@pytest.mark.parametrize("bits", [2, 16])
def test_a_width_nobody_measured_is_warned_of_with_the_way_to_one(bundle, tmp_path, capsys, bits):
    inferred(bundle, tmp_path, "input=digits", f"bits={bits}")
    printed = capsys.readouterr().out
    assert f"Warning: bits={bits} was never measured. This bundle was made for 4 bits" in printed
    assert f"of best.ckpt: python scripts/export.py ckpt_path=FILE codec.bits={bits}\n" in printed


def test_the_width_of_the_bundle_is_no_reason_to_warn(bundle, tmp_path, capsys):
    for more in ([], ["bits=4"]):
        inferred(bundle, tmp_path, "input=digits", *more)
        printed = capsys.readouterr().out
        assert "Warning" not in printed
        assert "add bits=" not in printed


def test_a_payload_larger_than_the_file_is_pointed_out(bundle, tree, tmp_path, capsys):
    inferred(bundle, tmp_path, f"input={in_hydra(tree)}")
    assert "larger than" not in capsys.readouterr().out
    inferred(bundle, tmp_path, f"input={in_hydra(tree)}", "bits=16", "limit=5")
    assert re.search(
        r"larger than the image's own file for 5 of 5 images \(on average 148\.0 bytes", capsys.readouterr().out
    )


def test_infer_says_what_it_cannot_read(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in"):
        infer(compose_config("infer", [f"bundle={bundle}", f"input={tmp_path}/empty"], tmp_path / "out"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        infer(compose_config("infer", [f"bundle={bundle}", f"input={tmp_path}/bad.png"], tmp_path / "out"))
    with pytest.raises(ValueError, match="bits"):
        infer(compose_config("infer", [f"bundle={bundle}", "input=digits", "bits=1"], tmp_path / "out"))
