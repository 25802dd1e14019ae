"""How near rebuilt images come: figures against loops in float64, intervals, and the picture."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cleave.reports.attacks.metrics import intervals, per_image
from cleave.reports.attacks.pictures import grid
from cleave.reports.attacks.results import Attack, Interval, headlines, marked
from cleave.reports.attacks.tables import csv_rows


def pair(size=8, count=3, channels=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, size, size + 1, generator=generator)
    return (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1), images


def mirrored(place, size):
    place = abs(place)
    return 2 * (size - 1) - place if place >= size else place


def ssim_by_hand(one, other, radius):
    """Wang et al., 2004, eq. 13, window by window: a Gaussian of σ = 0.3 times its radius, edges mirrored."""
    weights = np.array([math.exp(-((d / (0.3 * radius)) ** 2) / 2) for d in range(-radius, radius + 1)])
    window = np.outer(weights, weights) / weights.sum() ** 2
    channels, rows, columns = one.shape
    total = 0.0
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                lines = [mirrored(i + d, rows) for d in range(-radius, radius + 1)]
                places = [mirrored(j + d, columns) for d in range(-radius, radius + 1)]
                x, y = (each[c][np.ix_(lines, places)] for each in (one, other))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                covariance = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                total += (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return total / (channels * rows * columns)


@pytest.mark.parametrize(("size", "radius"), [(12, 5), (8, 3), (4, 1)])
def test_figures_equal_loops_in_float64(size, radius):
    rebuilt, images = pair(size)
    found = per_image(rebuilt, images, lambda batch: batch[:, :1])
    for i, (one, other) in enumerate(zip(rebuilt.double().numpy(), images.double().numpy(), strict=True)):
        mse = float(((one - other) ** 2).mean())
        assert found["mse"][i].item() == pytest.approx(mse, rel=1e-12)
        assert found["psnr"][i].item() == pytest.approx(-10 * math.log10(mse), rel=1e-12)
        assert found["ssim"][i].item() == pytest.approx(ssim_by_hand(one, other, radius), abs=1e-9)
        cosine = (one[0] * other[0]).sum() / np.linalg.norm(one[0]) / np.linalg.norm(other[0])
        assert found["features"][i].item() == pytest.approx(1 - cosine, abs=1e-12)


def test_equal_images_and_images_too_small_for_a_window():
    images = pair(2)[1]
    found = per_image(images, images)
    assert set(found) == {"mse", "psnr"}
    assert found["psnr"].tolist() == [100.0] * 3
    assert per_image(*[pair()[1]] * 2)["ssim"].tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(ValueError, match=r"rebuilt is \(1, .*give images in pairs"):
        per_image(images[:1], images)


def test_explained_is_a_ratio_of_means_and_its_interval_is_the_bootstraps():
    generator = torch.Generator().manual_seed(1)
    mean_mse = 0.05 + 0.02 * torch.rand(400, generator=generator, dtype=torch.float64)
    mse = 0.3 * mean_mse + 0.004 * torch.randn(400, generator=generator, dtype=torch.float64)
    found = intervals({"mse": mse}, mean_mse, 4000)
    assert found["mse"].value == pytest.approx(mse.mean().item())
    assert found["explained"].value == pytest.approx(1 - mse.mean().item() / mean_mse.mean().item())
    half = 1.96 * mse.std().item() / 20
    assert found["mse"].low == pytest.approx(mse.mean().item() - half, abs=0.1 * half)
    assert found["mse"].high == pytest.approx(mse.mean().item() + half, abs=0.1 * half)
    # The delta method for a ratio of means of the same images.
    residual = (mse - mse.mean() / mean_mse.mean() * mean_mse) / mean_mse.mean()
    half = 1.96 * residual.std().item() / 20
    assert found["explained"].high - found["explained"].low == pytest.approx(2 * half, rel=0.1)
    assert intervals({"mse": mean_mse}, mean_mse, 100)["explained"] == Interval(0.0, 0.0, 0.0)
    assert intervals({"mse": 0 * mse}, mean_mse, 100)["explained"] == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("mean_mse", "resamples", "told"),
    [(torch.ones(3), 0, "resamples must be at least 1, got 0"), (torch.zeros(3), 5, "all are the mean image")],
)
def test_no_interval_of_nothing(mean_mse, resamples, told):
    with pytest.raises(ValueError, match=told):
        intervals({"mse": torch.ones(3)}, mean_mse, resamples)


def attack(mse, role="attacker", val_mse=None, releases=1, name="payload"):
    figures = {"mse": Interval(mse, mse, mse), "explained": Interval(1 - mse, 1 - mse, 1 - mse)}
    return Attack(name, role, figures, releases=releases, val_mse=val_mse)


def test_the_headline_is_the_lowest_error_of_an_attacker_and_controls_never_are():
    attacks = [attack(0.3, val_mse=0.1), attack(0.2, val_mse=0.2), attack(0.25, name="white box")]
    attacks += [attack(0.1, val_mse=0.3, releases=8), attack(0.01, "control", val_mse=0.01)]
    found = marked(attacks)
    assert [each.chosen for each in found] == [True, False, False, True, False]
    assert [(each["releases"], each["mse"]["value"]) for each in headlines(found)] == [(1, 0.2), (8, 0.1)]
    rows = csv_rows(found)
    assert (rows[3]["attack"], rows[3]["mse_low"], rows[0]["ssim"]) == ("payload, mean of 8 releases", 0.1, None)
    assert dataclasses.replace(found[0], family="conv", strength="large").title == "payload, conv, large"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_is_a_png_of_every_row(channels):
    rows = {"original": torch.rand(4, channels, 8, 8), "payload $x_1": torch.rand(4, channels, 8, 8)}
    with Image.open(io.BytesIO(grid(rows))) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert grid(rows) == grid(rows)
