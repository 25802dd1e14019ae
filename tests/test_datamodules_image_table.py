"""Tables of images and data sets of torchvision as data modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from cleave.datamodules import CorruptImageError, ImageTable, TorchvisionImages


def table(folder: Path, text: str, name: str = "list.csv") -> Path:
    for number in range(12):
        path = folder / f"images/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def rows(*splits: str) -> str:
    lines = [
        f"images/{number}.png,{'naïve cat' if number % 2 else 'dog'}" + (f",{splits[number // 4]}" if splits else "")
        for number in range(12)
    ]
    return "\n".join(["path,label" + (",split" if splits else ""), *lines])


def test_a_table_with_splits_is_taken_as_it_is(tmp_path: Path) -> None:
    data = ImageTable(table(tmp_path, rows("train", "val", "test")), augment="none", batch_size=4)
    data.setup()
    assert data.class_names == ["dog", "naïve cat"]
    for number, split in enumerate(("train", "val", "test")):
        assert data.split(split).labels.tolist() == [0, 1, 0, 1]
        assert [Path(data.split(split).name(i)).stem for i in range(4)] == [str(4 * number + i) for i in range(4)]
    assert next(iter(data.train_dataloader()))["images"].shape == (4, 3, 8, 8)


def test_a_table_without_splits_is_divided_and_classes_are_picked(tmp_path: Path) -> None:
    text = rows() + "\nimages/0.png,fish\nimages/1.png,fish\nimages/2.png,fish"
    path = table(tmp_path, "﻿" + text.replace("path,label", "file,kind"))
    data = ImageTable(path, path_column="file", label_column="kind", classes=["dog", "fish"], val_fraction=0.3)
    found = {split: len(data.split(split)) for split in ("train", "val", "test")}
    assert sum(found.values()) == 9
    assert all(count >= 2 for count in found.values())
    assert data.class_names == ["dog", "fish"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x", r"has no column 'path' but \['file', 'label'\]; give path_column="),
        ("path,labels\na.png,x", "give label_column=labels"),
        ("path,label\na.png,x\n,y", "line 3 of .* lacks a path or a label"),
        ("path,label,split\na.png,x,train\na.png,y,dev", "line 3 of .* has the split 'dev'; known are"),
        ("path,label,split\na.png,x,whole", "line 2 of .* has the split 'whole'"),
        ("path,label\nimages/1.png,x\nimages/2.png,x", r"has the labels \['x'\] alone"),
        ("path,label\nimages/1.png,x\ngone.png,y", "lists 1 image.s. that .* lacks, the first is 'gone.png'"),
        (rows("train", "val", "test").replace("dog,test", "naïve cat,test"), r"has no test image of \['dog'\]"),
        ("", "has no column 'path' but"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = ImageTable(table(tmp_path, text)).class_names


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the table"):
        _ = ImageTable(tmp_path / "gone.csv").class_names
    (tmp_path / "bytes.csv").write_bytes(b"path,label\n\xff\xfe,x")
    with pytest.raises(ValueError, match="cannot read the table"):
        _ = ImageTable(tmp_path / "bytes.csv").class_names


class Splits:
    """A data set with an argument ``split``."""

    classes = ("a", "b", "c")

    def __init__(self, split: str = "train", size: int = 30) -> None:
        if split not in ("train", "valid"):
            raise ValueError(f"unknown split {split}")
        self.labels = [i % 3 for i in range(size if split == "train" else 9)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((3, 6, 8), index, dtype=np.uint8), self.labels[index]


class Trains(Splits):
    """A data set with an argument ``train``."""

    def __init__(self, train: bool = True) -> None:
        self.labels = [i % 3 for i in range(30 if train else 12)]


class Floats(Trains):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 6, 8), self.labels[index]


def test_the_splits_of_a_data_set_are_found() -> None:
    data = TorchvisionImages({"_target_": f"{__name__}.Splits", "size": 12}, augment="none", batch_size=3)
    assert data.class_names == ["a", "b", "c"]
    assert {split: len(data.split(split)) for split in ("train", "val", "test")} == {"train": 12, "val": 9, "test": 9}
    assert data.native_input.shape == (3, 6, 8)
    data.setup("fit")
    assert torch.equal(data.sample_batch("val", 9)["images"][4], torch.full((3, 6, 8), 4, dtype=torch.uint8))
    by_flag = TorchvisionImages({"_target_": f"{__name__}.Trains"}, val_from="test")
    assert {split: len(by_flag.split(split)) for split in ("train", "val", "test")} == {
        "train": 30,
        "val": 6,
        "test": 6,
    }
    picked = TorchvisionImages({"_target_": f"{__name__}.Trains"}, classes=["c", "a"])
    assert picked.class_names == ["a", "c"]
    assert picked.split("test").labels.tolist() == [0, 1] * 4


def test_a_data_set_of_torchvision_trains() -> None:
    fake = {"_target_": "torchvision.datasets.FakeData", "size": 60, "image_size": (3, 8, 8), "num_classes": 2}
    data = TorchvisionImages(fake, batch_size=8, augment="none")
    data.setup()
    assert data.class_names == ["0", "1"]
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 60
    expected = np.asarray(FakeData(60, (3, 8, 8), 2)[int(data.split("test").indices[0])][0])
    assert np.array_equal(data.sample_batch("test", 1)["images"][0].permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"root": "x"}, "dataset names a class by _target_"),
        ({"_target_": "torchvision.datasets.Gone"}, "dataset._target_='torchvision.datasets.Gone' cannot be imported"),
        ({"_target_": "torchvision.datasets.FakeData", "sizes": 3}, "cannot be built with {'sizes': 3}"),
    ],
)
def test_a_data_set_that_cannot_be_built_is_refused(dataset: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = TorchvisionImages(dataset).class_names


def test_items_that_are_no_pictures_are_refused() -> None:
    with pytest.raises(CorruptImageError, match=r"is no picture but Tensor of float32 \(6, 8, 3\); leave"):
        TorchvisionImages({"_target_": f"{__name__}.Floats"}).setup("fit")
