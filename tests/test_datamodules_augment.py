from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from cleave.datamodules.augment import PRESETS, Augmentation, cpu_seed, mirror, padded_crop
from cleave.datamodules.drawing import draw, sample_seeds
from cleave.deployment import ImageInput

GREY = ImageInput(height=8, width=8, color_mode="L", mean=(0.5,), std=(0.5,))
COLOR = ImageInput(height=16, width=24)


def seeds(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return sample_seeds(seed, [(epoch, index) for index in range(count)])


def pixels(count: int, spec: ImageInput) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *spec.shape), dtype=np.uint8)


def given(augmentation: Augmentation, count: int, spec: ImageInput) -> np.ndarray | list[Image.Image]:
    if not augmentation.takes_pictures:
        return pixels(count, spec)
    shape = (20, 31) if spec.channels == 1 else (20, 31, 3)
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("spec", [GREY, COLOR], ids=["grey", "color"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_depends_on_the_seeds_alone(name: str, spec: ImageInput) -> None:
    augmentation = Augmentation(name, spec)
    images = given(augmentation, 12, spec)
    torch.manual_seed(1)
    first = augmentation(images.copy(), seeds(12))
    torch.manual_seed(2)
    again = augmentation(images.copy(), seeds(12))
    alone = torch.cat([augmentation(images[i : i + 1].copy(), seeds(12)[i : i + 1]) for i in range(12)])
    assert first.shape == (12, *spec.shape)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(first, alone)
    if name != "none":
        assert not torch.equal(first, augmentation(images.copy(), seeds(12, epoch=1)))


@pytest.mark.parametrize("name", ["randaugment", "imagenet_trivial"])
def test_the_global_generator_is_left_as_it_was(name: str) -> None:
    augmentation = Augmentation(name, COLOR)
    images = given(augmentation, 4, COLOR)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    augmentation(images, seeds(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), cpu_seed(5):
        torch.rand(-1)
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_have_the_distribution_of_random_crop_with_padding() -> None:
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 1, 8, 8)
    padded = v2.functional.pad(torch.from_numpy(image), [1, 1])
    possible = {v2.functional.crop(padded, top, left, 8, 8).numpy().tobytes() for top in range(3) for left in range(3)}
    crops = padded_crop(image.repeat(9000, axis=0), seeds(9000), 1, 1)
    found, counts = np.unique(crops.reshape(9000, -1), axis=0, return_counts=True)
    assert {row.tobytes() for row in found} == possible
    # Nine outcomes, 1000 each: chi-squared with 8 degrees of freedom exceeds 26.1 in one of 1000 draws.
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1


def test_half_of_the_images_are_mirrored_whatever_their_crop() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    mirrored = mirror(image.repeat(10_000, axis=0), seeds(10_000))
    flipped = (mirrored[:, 0, 0, 0] == 7).astype(float)
    assert set(np.unique(mirrored[:, 0, 0, 0])) == {0, 7}
    assert abs(flipped.mean() - 0.5) < 0.02
    white = np.full((10_000, 1, 8, 8), 255, dtype=np.uint8)
    shifted_down = padded_crop(white, seeds(10_000), 1, 1)[:, 0, 0, 4] == 0
    assert abs(np.corrcoef(flipped, shifted_down)[0, 1]) < 0.04


def test_digits_are_shifted_by_one_pixel_and_never_mirrored() -> None:
    augmentation = Augmentation("crop", GREY)
    assert augmentation.padding == (1, 1)
    assert not augmentation.flip
    assert Augmentation("crop_flip", ImageInput(height=32, width=32)).padding == (4, 4)


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos"])
def test_random_resized_crops_are_torchvisions_own(interpolation: str) -> None:
    spec = ImageInput(height=16, width=24, interpolation=interpolation)
    augmentation = Augmentation("imagenet", spec)
    pictures = given(augmentation, 8, spec)
    augmentation.flip = False
    images = augmentation(pictures, seeds(8))
    transform = v2.RandomResizedCrop((16, 24), interpolation=v2.InterpolationMode(interpolation))
    for picture, seed, image in zip(pictures, draw(seeds(8), 3), images, strict=True):
        with cpu_seed(int(seed)):
            assert torch.equal(spec.to_tensor(transform(picture)), image)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"augment='flip'; known are \['crop', 'crop_flip'"):
        Augmentation("flip", GREY)
