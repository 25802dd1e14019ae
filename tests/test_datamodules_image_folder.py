from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.datamodules import CorruptImageError, ImageFolder
from cleave.datamodules.sources import FileSource
from cleave.deployment import ImageInput


def write(path: Path, mode: str = "RGB", size: tuple[int, int] = (10, 8), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, mode=None).save(path)
    return path


def tree(root: Path, splits: tuple[str, ...] = ("train", "val", "test"), count: int = 10) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(("cat", "dog")):
            for number in range(count):
                write(root / split / name / f"{number}.png", value=1000 * s + 100 * c + number)
    return root


def sizes(module: ImageFolder) -> dict[str, int]:
    return {name: len(module.split(name)) for name in ("train", "val", "test")}


def names(module: ImageFolder, split: str) -> set[str]:
    source = module.split(split)
    return {source.name(index) for index in range(len(source))}


def test_reads_a_whole_tree(tmp_path: Path) -> None:
    module = ImageFolder(tree(tmp_path), augment="none")
    module.setup()
    assert module.class_names == ["cat", "dog"]
    assert sizes(module) == {"train": 20, "val": 20, "test": 20}
    assert module.split("val").labels.tolist() == [0] * 10 + [1] * 10
    batch = next(iter(module.val_dataloader()))
    images, labels = batch["images"], batch["labels"]
    for index in (0, 13):
        with Image.open(module.split("val").name(index)) as picture:
            assert torch.equal(images[index], module.input(picture))
    assert labels[13] == 1


def test_hidden_and_foreign_files_are_ignored_and_folders_searched(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    write(root / "train/cat/.hidden.png")
    write(root / "train/.cache/a.png")
    write(root / "train/cat/.thumbs/a.png")
    (root / "train/cat/readme.txt").write_text("no image")
    write(root / "train/cat/deeper/UPPER.PNG")
    module = ImageFolder(root)
    assert module.class_names == ["cat", "dog"]
    assert [Path(name).name for name in sorted(names(module, "train"))] == [
        "0.png",
        "1.png",
        "UPPER.PNG",
        "0.png",
        "1.png",
    ]


def test_a_missing_val_is_split_off_train_reproducibly_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tree(tmp_path / "a", ("train", "test"))
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        module = ImageFolder(root, val_fraction=0.2)
        assert sizes(module) == {"train": 16, "val": 4, "test": 20}
    assert caplog.messages == [f"{root} has no val/: 4 images of train/ are split off for validation"]
    assert np.bincount(module.split("val").labels).tolist() == [2, 2]
    assert not names(module, "train") & names(module, "val")
    elsewhere = ImageFolder(tree(tmp_path / "b", ("train", "test")), val_fraction=0.2, seed=7)
    assert {Path(name).relative_to(root / "train") for name in names(module, "val")} == {
        Path(name).relative_to(tmp_path / "b/train") for name in names(elsewhere, "val")
    }


def test_adding_an_image_moves_few_others(tmp_path: Path) -> None:
    root = tree(tmp_path, ("train", "test"))
    before = names(ImageFolder(root, val_fraction=0.3), "val")
    write(root / "train/cat/new.png")
    assert len(before & names(ImageFolder(root, val_fraction=0.3), "val")) >= 5


def test_one_half_of_test_validates_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tree(tmp_path)
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        module = ImageFolder(root, val_from="test")
        assert sizes(module) == {"train": 20, "val": 10, "test": 10}
    assert "one fixed half of test/ validates (10 images)" in caplog.text
    assert not names(module, "val") & names(module, "test")
    assert all(Path(name).is_relative_to(root / "test") for name in names(module, "val") | names(module, "test"))


def test_without_test_the_validation_images_are_tested_on_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = ImageFolder(tree(tmp_path, ("train", "val")))
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        assert names(module, "test") == names(module, "val")
    assert "has no test/" in caplog.text


def test_val_from_a_missing_test_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val_from='test' takes one half of .*test, which does not exist"):
        ImageFolder(tree(tmp_path, ("train", "val")), val_from="test").setup()


def test_a_class_too_small_to_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the class 'cat' has 1 image\(s\)"):
        ImageFolder(tree(tmp_path, ("train",), count=1)).setup()


@pytest.mark.parametrize("access", ["class_names", "input", "setup"])
def test_bad_input_missing_folder(tmp_path: Path, access: str) -> None:
    module = ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"root='.*nowhere' is no folder"):
        module.setup() if access == "setup" else getattr(module, access)


def test_bad_input_no_train_folder(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(ValueError, match=r"has no train/ folder \(it holds \['training'\]\)"):
        _ = ImageFolder(tmp_path).class_names


def test_bad_input_empty_image_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write(tmp_path / "train/loose.png")
    with pytest.raises(ValueError, match="train is empty of class folders"):
        _ = ImageFolder(tmp_path).class_names


def test_bad_input_one_class_image_folder(tmp_path: Path) -> None:
    write(tmp_path / "train/cat/0.png")
    with pytest.raises(ValueError, match="has one class alone, 'cat'"):
        _ = ImageFolder(tmp_path).class_names


def test_bad_input_class_without_images(tmp_path: Path) -> None:
    write(tmp_path / "train/cat/0.png")
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/0.txt").touch()
    with pytest.raises(ValueError, match=r"train/dog has no images \(known are .bmp, .gif"):
        _ = ImageFolder(tmp_path).class_names


def test_bad_input_classes_that_differ_between_splits(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    write(root / "test/bird/0.png")
    with pytest.raises(ValueError, match=r"only one of them has \['bird'\]"):
        ImageFolder(root).setup()


@pytest.mark.parametrize("content", [b"no image at all", "truncated"])
def test_bad_input_corrupt_image_is_found_while_caching(tmp_path: Path, content: bytes | str) -> None:
    root = tree(tmp_path)
    victim = root / "train/dog/3.png"
    victim.write_bytes(victim.read_bytes()[:-80] if isinstance(content, str) else content)
    with pytest.raises(CorruptImageError, match=r"cannot decode the image .*train/dog/3\.png"):
        ImageFolder(root, image_size=8).setup("fit")


@pytest.fixture(autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("augment", ["none", "imagenet"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("cache", ["auto", True, False])
def test_every_picture_is_looked_at_before_training(
    tmp_path: Path, split: str, cache: bool | str, augment: str
) -> None:
    root = tree(tmp_path, count=4)
    (root / split / "dog/3.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=rf"cannot decode the image .*{split}/dog/3\.png"):
        ImageFolder(root, cache=cache, augment=augment, image_size=8).setup("fit")


def test_all_that_is_corrupt_is_named_at_once(tmp_path: Path) -> None:
    root = tree(tmp_path)
    for number in range(7):
        (root / f"test/cat/{number}.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"^7 images of test cannot be used: .*cat/4\.png.*; and 2 more\. "):
        ImageFolder(root).setup("fit")


@pytest.mark.parametrize("cache", [True, False])
def test_what_decodes_but_cannot_be_resized_is_found_at_the_same_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: bool
) -> None:
    root = tree(tmp_path, count=4)
    for split in ("train", "test"):
        Image.new("RGB", (1, 3000)).save(root / split / "cat/thin.png")
    options = {"augment": "none", "cache": cache, "batch_size": 1}
    with pytest.raises(CorruptImageError, match=r"cannot preprocess the image .*cat/thin\.png"):
        ImageFolder(root, **options).setup("fit")
    module = ImageFolder(root, skip_corrupt=True, **options)
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        module.setup("fit")
    assert len(caplog.messages) == 2
    assert sizes(module) == {"train": 8, "val": 8, "test": 8}
    assert len(list(module.train_dataloader())) == 8
    assert len(list(module.test_dataloader())) == 8


def test_what_was_looked_at_is_remembered_until_it_changes(
    tmp_path: Path, own_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, count=4)
    read = []
    original = FileSource.picture
    monkeypatch.setattr(FileSource, "picture", lambda self, i: read.append(self.name(i)) or original(self, i))
    ImageFolder(root, cache=False, image_size=8).setup("fit")
    assert len(read) == len(set(read)) == 24
    assert len(list(own_memory.rglob("*.npy"))) == 3
    read.clear()
    ImageFolder(root, cache=False, image_size=8).setup("fit")
    assert read == []
    write(root / "val/dog/3.png", value=7)
    ImageFolder(root, cache=False, image_size=8).setup("fit")
    assert read == [str(root / "val/dog/3.png")]
    ImageFolder(root, cache=False, image_size=9).setup("fit")  # for evaluation pictures are resized
    assert len(read) == 1 + 16


def test_a_memory_that_cannot_be_read_or_written_is_done_without(tmp_path: Path, own_memory: Path) -> None:
    root = tree(tmp_path, count=4)
    ImageFolder(root, cache=False).setup("fit")
    for file in own_memory.rglob("*.npy"):
        file.write_bytes(b"damaged")
    ImageFolder(root, cache=False).setup("fit")
    assert all(np.load(file).size for file in own_memory.rglob("*.npy"))  # written anew
    shutil.rmtree(own_memory)
    own_memory.write_text("no folder")
    module = ImageFolder(root, cache=False)
    module.setup("fit")
    assert sizes(module) == {"train": 8, "val": 8, "test": 8}


def test_a_picture_larger_than_a_device_takes_is_refused_in_training(tmp_path: Path) -> None:
    root = tree(tmp_path, count=4)
    Image.new("1", (10_000, 9_000)).save(root / "train/cat/huge.png")
    with pytest.raises(CorruptImageError, match=r"huge\.png: .*pixels.* 89478485"):
        ImageFolder(root).setup("fit")


@pytest.mark.parametrize("target", ["..", "../..", "../../train", "../../.."])
def test_a_link_to_a_folder_above_is_refused(tmp_path: Path, target: str) -> None:
    root = tree(tmp_path / "data", count=2)
    (root / "train/cat/loop").symlink_to(target, target_is_directory=True)
    with pytest.raises(ValueError, match=r"the link .*cat/loop leads to .*; remove it"):
        ImageFolder(root).setup("fit")


def test_a_link_to_another_class_is_refused_and_one_to_elsewhere_followed(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", count=2)
    write(tmp_path / "elsewhere/a.png")
    (root / "train/cat/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert sizes(ImageFolder(root))["train"] == 5
    (root / "train/dog/again").symlink_to(root / "train/cat", target_is_directory=True)
    with pytest.raises(ValueError, match="are the same folder, .*would count twice"):
        ImageFolder(root).setup("fit")


@pytest.mark.parametrize("place", [b"caf\xe9.png", b"deep\xff/0.png"])
def test_a_name_that_is_not_utf8_is_named(tmp_path: Path, place: bytes) -> None:
    root = tree(tmp_path, count=2)
    path = os.fsencode(root / "train/cat") + b"/" + place
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 bytes
    with open(path, "wb") as file:  # noqa: PTH123
        file.write((root / "train/cat/0.png").read_bytes())
    with pytest.raises(
        ValueError, match=r"the name of .*train/(caf\\xe9|cat/caf\\xe9|cat/deep\\xff).* is not UTF-8; rename"
    ):
        ImageFolder(root).setup("fit")


def test_a_flat_tree_is_split_the_same_way_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        for number in range(20):
            write(tmp_path / name / f"{number}.png", value=number)
    module = ImageFolder(tmp_path, val_fraction=0.2)
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        module.setup()
    assert caplog.messages[0] == f"{tmp_path} has no splits: 8 of its images are split off for the test"
    assert sizes(module) == {"train": 26, "val": 6, "test": 8}
    found = [names(module, split) for split in ("train", "val", "test")]
    assert len(set.union(*found)) == 40
    assert found == [names(ImageFolder(tmp_path, val_fraction=0.2), split) for split in ("train", "val", "test")]
    assert all(set(module.split(split).labels.tolist()) == {0, 1} for split in ("train", "val", "test"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_tree_without_train_can_be_evaluated_alone(tmp_path: Path, split: str) -> None:
    module = ImageFolder(tree(tmp_path, (split,), count=3), image_size=8)
    assert module.class_names == ["cat", "dog"]
    assert module.native_input.shape == (3, 8, 10)
    module.setup("test")
    assert sum(len(batch["labels"]) for batch in module.test_dataloader()) == 6
    with pytest.raises(ValueError, match="there are no train images: test, val alone were found"):
        module.setup("fit")


@pytest.mark.parametrize("wrong", ["validation", "Train", "testing"])
def test_splits_of_other_names_are_no_classes(tmp_path: Path, wrong: str) -> None:
    for name in (wrong, "other"):
        write(tmp_path / name / "cat/0.png")
    with pytest.raises(ValueError, match=rf"has no train/ folder \(it holds .*'{wrong}'"):
        ImageFolder(tmp_path).setup()


def test_some_classes_can_be_taken(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    for split in ("train", "val", "test"):
        write(root / split / "ant/0.png")
    module = ImageFolder(root, classes=["dog", "ant"])
    assert module.class_names == ["ant", "dog"]
    assert module.split("test").labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"classes names 'dogs', which .*train lacks; it has 'dog'"):
        _ = ImageFolder(root, classes=["dogs", "ant"]).class_names
    for wrong in ("dog", ["dog"], ["dog", "dog"]):
        with pytest.raises(ValueError, match="classes must be a list of at least two different names"):
            ImageFolder(root, classes=wrong)


@pytest.mark.parametrize("cache", [True, False])
def test_corrupt_images_are_skipped_if_asked_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: bool
) -> None:
    root = tree(tmp_path)
    for number in (0, 3):
        (root / f"train/dog/{number}.png").write_bytes(b"no image")
    module = ImageFolder(root, cache=cache, skip_corrupt=True, batch_size=1)
    with caplog.at_level(logging.INFO, "cleave.datamodules"):
        module.setup("fit")
    assert caplog.messages == [f"train: left out 2 corrupt image(s), the first is {root / 'train/dog/0.png'}"]
    assert sizes(module)["train"] == len(list(module.train_dataloader())) == 18
    assert np.bincount(module.split("train").labels).tolist() == [10, 8]


def test_a_class_of_corrupt_images_alone_is_refused_even_when_skipping(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    for number in (0, 1):
        (root / f"train/dog/{number}.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"no image of \['dog'\] in train can be decoded"):
        ImageFolder(root, skip_corrupt=True).setup("fit")


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "P-transparent", "1"])
def test_bad_input_grey_and_rgba_images_are_converted(tmp_path: Path, mode: str) -> None:
    root = tree(tmp_path, count=2)
    odd = root / "test/cat/0.png"
    picture = Image.effect_noise((10, 8), 90)
    options = {}
    if mode.startswith("P"):
        picture = picture.quantize(16)
        options = {"transparency": bytes(range(16))} if mode == "P-transparent" else {}
    else:
        picture = picture.convert(mode)
    picture.save(odd, **options)
    with Image.open(odd) as stored:
        expected = stored.convert("RGBA").convert("RGB")
    images = next(iter(ImageFolder(root, augment="none").test_dataloader()))["images"]
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_sixteen_bit_images_keep_their_upper_bits(tmp_path: Path, augment: str) -> None:
    root = tree(tmp_path, count=1)
    for name in ("cat", "dog"):
        Image.fromarray(np.full((8, 10), 40_000, dtype=np.uint16)).save(root / f"train/{name}/0.png")
    module = ImageFolder(root, augment=augment, batch_size=2)
    images = next(iter(module.train_dataloader()))["images"]
    assert module.input.color_mode == "L"
    assert set(images.unique().tolist()) == {40_000 >> 8}


def test_bad_input_thirty_two_bit_grey_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    Image.fromarray(np.full((8, 10), 40_000, dtype=np.int32)).save(root / "test/cat/0.tif")
    with pytest.raises(CorruptImageError, match=r"test/cat/0\.tif is 32-bit grey"):
        ImageFolder(root).setup("test")
    module = ImageFolder(root, skip_corrupt=True)
    assert sizes(module)["test"] == 4


def test_a_picture_too_narrow_to_resize_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, count=2)
    write(root / "test/cat/line.png", size=(1, 3000))
    module = ImageFolder(root)
    module.configure_input(ImageInput(height=224, width=224, resize=256))
    with pytest.raises(CorruptImageError, match=r"cannot preprocess the image .*line\.png: .*more than"):
        module.setup("test")


def test_native_input_is_the_images_own_size(tmp_path: Path) -> None:
    spec = ImageFolder(tree(tmp_path)).native_input
    assert (spec.height, spec.width, spec.resize, spec.color_mode) == (8, 10, None, "RGB")


def test_native_input_of_mixed_sizes_is_a_224_pixel_crop(tmp_path: Path) -> None:
    root = tree(tmp_path)
    write(root / "train/cat/wide.png", size=(40, 9))
    spec = ImageFolder(root).native_input
    assert (spec.height, spec.width, spec.resize) == (224, 224, 256)


def test_native_input_of_grey_images_is_grey(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            write(tmp_path / f"train/{name}/{number}.png", mode="L")
    assert ImageFolder(tmp_path).native_input.color_mode == "L"


def test_bytes_of_the_originals(tmp_path: Path) -> None:
    root = tree(tmp_path)
    write(root / "test/cat/0.png", mode="L", size=(30, 20))
    module = ImageFolder(root)
    on_disk = [path.stat().st_size for path in (root / "test").rglob("*.png")]
    assert module.image_file_bytes("test") == pytest.approx(np.mean(on_disk))
    assert module.raw_image_bytes("test") == pytest.approx((19 * 240 + 600) / 20)
