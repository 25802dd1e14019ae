"""Data sets of Hugging Face; those that need its library are skipped where it is not installed."""

import io
import sys

import pytest
import torch
from PIL import Image

from cleave.datamodules import HuggingFaceImages


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def rows(datasets, count: int, labels: list, feature, start: int = 0):
    """A data set of pictures of one grey each; its fingerprint is given, as hashing one needs pickles of pyarrow's."""
    features = datasets.Features({"img": datasets.Image(), "fine": feature})
    pictures = []
    for value in range(start, start + count):
        file = io.BytesIO()
        Image.new("RGB", (8, 6), (value, value, value)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    columns = {"img": pictures, "fine": [labels[number % len(labels)] for number in range(count)]}
    table = pytest.importorskip("pyarrow").Table.from_pydict(columns, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=f"{start}-{count}")


def module(folder, **settings):
    data = HuggingFaceImages(folder, image_column="img", label_column="fine", augment="none", batch_size=4, **settings)
    data.configure_input(data.native_input)
    return data


def test_its_splits_pictures_and_class_names_are_used(datasets, tmp_path):
    feature = datasets.ClassLabel(names=["cat", "big dog", "ü"])
    splits = {"train": rows(datasets, 12, [0, 1, 2], feature), "validation": rows(datasets, 6, [0, 1, 2], feature, 50)}
    splits["unsupervised"] = rows(datasets, 3, [0], feature)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = module(tmp_path / "set")
    assert data.class_names == ["cat", "big dog", "ü"]
    assert data.native_input.shape == (3, 6, 8)
    data.setup(None)
    batch = data.dataset("train").batch([0, 4])
    assert batch["labels"].tolist() == [0, 1]
    assert torch.equal(batch["images"][1], torch.full((3, 6, 8), 4, dtype=torch.uint8))
    assert len(data.split("val")) == 6
    assert data.split("test") is not None
    assert len(module(tmp_path / "set", classes=["cat", "ü"]).split("train")) == 8


@pytest.mark.parametrize("labels", [["b", "a"], [7, 3]])
def test_a_data_set_without_splits_or_class_names_is_divided(datasets, labels, tmp_path):
    feature = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    rows(datasets, 40, labels, feature).save_to_disk(tmp_path / "set")
    data = module(tmp_path / "set")
    assert data.class_names == [str(label) for label in sorted(labels)]
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 40
    assert data.dataset("train").batch([0])["labels"].item() in (0, 1)


def test_a_column_that_is_not_there_is_named(datasets, tmp_path):
    rows(datasets, 4, [0, 1], datasets.ClassLabel(names=["a", "b"])).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"has no column 'image' but \['img', 'fine'\]; give image_column="):
        HuggingFaceImages(tmp_path / "set", label_column="fine").class_names  # noqa: B018


def test_a_data_set_that_is_not_there_is_named(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nowhere.* cannot be read"):
        HuggingFaceImages(tmp_path / "nowhere").class_names  # noqa: B018


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"install the extra: pip install 'cleave\[hf\]'"):
        HuggingFaceImages("uoft-cs/cifar10").class_names  # noqa: B018
