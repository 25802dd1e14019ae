import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cleave.deployment import ImageError, ImageInput, open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(width, height, mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    image = Image.frombytes(mode, (width, height), generator.integers(0, 256, shape, np.uint8).tobytes())
    if mode == "P":
        image.putpalette(generator.integers(0, 256, 768, np.uint8).tobytes())
    return image


def grey(mode="L", height=32, width=32, **settings):
    count = 3 if mode == "RGB" else 1
    return ImageInput(height=height, width=width, color_mode=mode, mean=MEAN[:count], std=STD[:count], **settings)


def reference(image, spec):
    """The same by torchvision alone, on Pillow images, as an image folder and pretrained weights use it."""
    size = (spec.height, spec.width) if spec.resize is None else spec.resize
    transform = v2.Compose(
        [
            v2.Resize(size, InterpolationMode(spec.interpolation)),
            v2.CenterCrop((spec.height, spec.width)),
            v2.PILToTensor(),
        ]
    )
    return transform(image.convert(spec.color_mode))


@pytest.mark.parametrize("size", [(64, 48), (33, 91), (256, 256), (7, 5), (500, 31), (32, 32), (36, 39), (101, 100)])
@pytest.mark.parametrize("resize", [None, 32, 36, 37])
@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_pixels_equal_torchvision_at_any_size(size, resize, interpolation):
    image = picture(*size)
    for height, width in ((32, 32), (31, 24)):
        spec = grey("RGB", height, width, resize=resize, interpolation=interpolation)
        assert torch.equal(spec(image), reference(image, spec))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_pixels_equal_torchvision_in_any_mode(mode, target):
    image = picture(50, 40, mode)
    spec = grey(target, resize=36)
    assert torch.equal(spec(image), reference(image, spec))
    assert spec(image).dtype == torch.uint8
    assert spec(image).shape == spec.shape


@pytest.mark.parametrize("seed", range(20))
def test_pixels_equal_torchvision_at_random_sizes(seed):
    generator = np.random.default_rng(seed)
    width, height, resize = (int(n) for n in generator.integers([1, 1, 24], [400, 400, 90]))
    image, spec = picture(width, height, seed=seed), grey("RGB", 24, 17, resize=resize)
    assert torch.equal(spec(image), reference(image, spec))


@pytest.mark.parametrize("mode", ["LAB", "La", "RGBa", "RGBX", "PA"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_rare_modes_are_converted(mode, target):
    image = Image.new(mode, (40, 40))
    assert grey(target)(image).shape == grey(target).shape


@pytest.mark.parametrize("target", ["L", "RGB"])
def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(target):
    opaque, image = picture(40, 40, "P"), picture(40, 40, "P")
    image.info["transparency"] = bytes(range(256))
    assert torch.equal(grey(target)(image), grey(target)(opaque.convert("RGB") if target == "RGB" else opaque))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
@pytest.mark.parametrize("target", ["L", "RGB"])
def test_16_bit_grey_keeps_its_upper_bits(mode, target):
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    order = ">u2" if mode.endswith("B") else "<u2"
    found = grey(target)(Image.frombytes(mode, (32, 32), values.astype(order).tobytes()))
    assert torch.equal(found, torch.from_numpy((values >> 8).astype(np.uint8)).expand_as(found))


def test_a_16_bit_png_is_read_by_its_upper_bits(tmp_path):
    values = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(grey()(open_image(tmp_path / "deep.png"))[0].numpy(), values >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_grey_is_refused(mode):
    with pytest.raises(ImageError, match=f"mode '{mode}'"):
        grey()(Image.new(mode, (40, 40)))


def test_the_exif_orientation_is_not_applied(tmp_path):
    image = picture(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    read = open_image(tmp_path / "turned.png")
    assert ImageOps.exif_transpose(read).size == (24, 40)
    assert torch.equal(grey("RGB")(read), grey("RGB")(image))


def test_normalize_equals_torchvision():
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    spec = grey("RGB", 9, 9)
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(spec.normalize(images), expected)


def test_round_trip_through_json():
    spec = grey("RGB", 20, 30, resize=40, interpolation="bicubic")
    assert ImageInput.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height must be 1 to 16384"),
        ({"width": 2.0}, "width must be"),
        ({"height": "32"}, "height must be"),
        ({"width": True}, "width must be"),
        ({"height": 20_000}, "height must be"),
        ({"resize": 31}, "resize=31 is smaller"),
        ({"resize": 0}, "resize must be"),
        ({"color_mode": "BGR"}, "color_mode must be one of"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"mean": (0.5,)}, "need 3 values"),
        ({"std": (0.5, 0.5)}, "need 3 values"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be positive"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be finite"),
        ({"mean": 0.5}, "mean must be a list"),
        ({"std": ("a", "b", "c")}, "std must be a list"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(grey("RGB"), **change)


@pytest.mark.parametrize(
    ("values", "message"), [({"height": 3}, "lacks"), ({"height": 3, "width": 3, "size": 3}, r"unknown .*size")]
)
def test_bad_keys_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ImageInput.from_dict(values)


def test_a_picture_too_narrow_to_resize_is_refused():
    with pytest.raises(ImageError, match=r"1x20000 pixels, .* more than"):
        grey("RGB", 200, 200, resize=224)(Image.new("RGB", (1, 20_000)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_open_image_reads_files(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    picture(20, 10).save(path)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(open_image(path).convert("RGB")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(60)]
)
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"cannot read .*broken\.jpg as an image"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_image_is_named(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    picture(60, 60).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ImageError, match=rf"cannot read .*cut\.{suffix} as an image"):
        open_image(path)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(ImageError, match=str(path)):
            open_image(path)


def test_the_number_of_pixels_is_bounded(tmp_path, monkeypatch):
    picture(60, 50).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="60x50 pixels are more than 2999"):
        open_image(tmp_path / "large.png", max_pixels=2999)
    assert open_image(tmp_path / "large.png", max_pixels=3000).size == (60, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ImageError, match=r"large\.png"):
        open_image(tmp_path / "large.png")
