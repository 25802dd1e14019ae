"""The blocks of docs/library.md run as they stand; and what loads a checkpoint says what a file is."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cleave.architectures import create_backbone
from cleave.architectures.backbones.weights import WeightsError
from cleave.datamodules import ImageFolder
from cleave.deployment import Pipeline, load_bundle, open_image
from cleave.lightning_modules import load_checkpoint
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.train import train

from .test_docs import fences
from .training_helpers import PLAIN, bundle_outputs, load, small

NETWORK = [each.replace("training_helpers", "tests.training_helpers") for each in small("PlainNet")]
BLOCKS = fences("docs/library.md", "python")


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, teacher_file):
    shutil.copy(teacher_file, tmp_path / "best.ckpt")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 6
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCKS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice about loggers and workers
            exec(compile(block, f"docs/library.md, block {number}", "exec"), names)
    assert names["answers"]
    assert names["result"].payload_bytes == [pytest.approx(44, abs=20)]  # type: ignore[attr-defined]


def test_the_blocks_import_no_script():
    assert not [block for block in BLOCKS if "cleave.scripts" in block]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_to_the_network_that_the_scripts_rebuild(teacher_file):
    loaded, restored = load_checkpoint(teacher_file), restore(teacher_file)
    images = torch.rand(4, *loaded.image_input.shape)
    assert torch.equal(loaded.network(images), restored.network(images))
    assert (loaded.image_input, loaded.class_names) == (restored.image_input, restored.class_names)
    assert loaded.sha256 == restored.sha256
    assert not loaded.network.training


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of each kind, hardly trained."""
    found = {}
    kinds = {
        "an unsplit": [],
        "an early-exit": ["method=exits_joint", "exits.at=[stem]"],
        "a split": ["method=cross_entropy", "split.at=stem", "split.form=insert", "'+codec.at.stem={bits: 3}'"],
        "a split early-exit": ["method=exits_joint", "exits.at=[stem]", "split.at=stem", "channel=packet_loss"],
    }
    for number, (kind, overrides) in enumerate(kinds.items()):
        folder = tmp_path_factory.mktemp(f"kind{number}")
        run = [*PLAIN, *NETWORK, "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "test=false"]
        train(compose_config("train", [*run, *(each.strip("'") for each in overrides)], folder))
        found[kind] = folder / "checkpoints/last.ckpt"
    return found


def test_every_kind_of_checkpoint_loads(trained):
    for kind, file in trained.items():
        with pytest.raises(ValueError, match="trust"):
            load_checkpoint(file)
        network = load_checkpoint(file, trusted=True).network
        assert (bool(network.bottlenecks), bool(network.exits)) == ("split" in kind.split(), "early" in kind)
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        again = restore(file, trusted=True).network.state_dict()
        assert all(torch.equal(value, again[name]) for name, value in network.state_dict().items())
    split = load_checkpoint(trained["a split"], trusted=True).network
    assert [bottleneck.bits for bottleneck in split.bottlenecks.values()] == [3]


@pytest.mark.parametrize("kind", ["an early-exit", "a split", "a split early-exit"])
def test_a_run_is_not_resumed_from_a_checkpoint_of_another_kind(kind, trained, tmp_path):
    checkpoint = load(trained[kind])
    checkpoint["cleave"]["config"]["method"]["_target_"] = "cleave.lightning_modules.Classification"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    run = [*PLAIN, *NETWORK, "test=false", f"ckpt_path={tmp_path}/other.ckpt"]
    with pytest.raises(ValueError, match=f"is {kind} checkpoint, but the network of this run is an unsplit one"):
        train(compose_config("train", run, tmp_path / "run"))


def test_a_checkpoint_given_as_weights_is_called_what_it_is(trained):
    with pytest.raises(WeightsError, match=r"an early-exit checkpoint of Cleave.*base\.ckpt_path=FILE"):
        create_backbone("cifar", "resnet20", num_classes=10, weights=trained["an early-exit"])


def test_other_files_are_refused_as_what_they_are(tmp_path, teacher_file):
    loaded = load_checkpoint(teacher_file)
    bundle_outputs(loaded.network, ImageInputOnly(loaded), tmp_path / "bundle")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "policy.json").write_text(json.dumps({"kind": "confidence"}))
    part = next(path for path in (tmp_path / "bundle").iterdir() if path.suffix == ".pt")
    for file, words in {
        tmp_path / "bundle": "is a bundle",
        tmp_path / "weights.safetensors": r"weights alone.*backbone\.weights=FILE",
        tmp_path / "policy.json": r"text file.*exits\.policy_file=FILE",
        part: "is a TorchScript file, as bundles hold them",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_checkpoint(file)


class ImageInputOnly:
    """What a bundle's helper asks of a data module."""

    def __init__(self, loaded) -> None:
        self.input, self.class_names = loaded.image_input, loaded.class_names

    def sample_batch(self, split, count):
        return {"images": torch.randint(256, (count, *self.input.shape), dtype=torch.uint8)}


# --- EXIF orientation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_exif_orientation_is_treated_alike_in_training_and_on_the_device(
    orientation, tmp_path, caplog, teacher_file
):
    loaded = load_checkpoint(teacher_file)
    tags = Image.Exif()
    tags[0x0112] = orientation
    for name in ("a", "b"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for number in range(3):
            noise = Image.effect_noise((12, 8), 90 + number)
            noise.save(tmp_path / f"data/train/{name}/{number}.png", exif=tags)
    caplog.set_level(logging.INFO)
    data = ImageFolder(tmp_path / "data", augment="none", batch_size=1)
    data.configure_input(loaded.image_input)
    data.setup("fit")
    source = data.split("train")
    assert source.shape(0)[:2] == (8, 12)
    trained_on = data.dataset("train").batch([0])["images"]
    bundle_outputs(loaded.network, ImageInputOnly(loaded), tmp_path / "bundle")
    on_device = Pipeline(load_bundle(tmp_path / "bundle")).preprocess(source.name(0))
    assert torch.equal(trained_on[0], on_device)
    assert torch.equal(trained_on[0], loaded.image_input(open_image(source.name(0))))
    told = [record.message for record in caplog.records if "EXIF" in record.message and record.message[:5] == "train"]
    assert len(told) == (orientation != 1)
    assert not told or told[0].startswith(f"train: {len(source)} of {len(source)} images")
