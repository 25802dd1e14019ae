"""Choices, table and plot of a privacy frontier, of points that are known beforehand."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from cleave.reports.attacks.metrics import Interval
from cleave.reports.frontier.plots import frontier_plot
from cleave.reports.frontier.points import FrontierPoint, Place, on_front, reaching, weakest_reaching
from cleave.reports.frontier.tables import as_report, frontier_rows, print_frontier, print_wanted

MEAN = 0.06


def point(strength, accuracy, mse, bits=4, validation=None, ssim=True):
    explained = 1 - mse / MEAN
    return FrontierPoint(
        place=Place("layer2", bits, 8, strength),
        validation=accuracy if validation is None else validation,
        accuracy=accuracy,
        payload_bytes=44.0,
        device_macs=170_496,
        device_params=100,
        attack="payload, conv, large",
        mse=Interval(mse, mse - 0.001, mse + 0.001),
        explained=Interval(explained, explained - 0.02, explained + 0.02),
        ssim=Interval(0.5, 0.4, 0.6) if ssim else None,
    )


# A stronger λ hides more and answers worse; λ = 2 is beaten by λ = 3.
POINTS = [point(0, 0.90, 0.01), point(1, 0.88, 0.02), point(2, 0.84, 0.025), point(3, 0.85, 0.03), point(9, 0.6, 0.05)]


def test_the_front_has_those_that_no_other_beats_in_both():
    assert on_front(POINTS) == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("wanted", "strength"), [(0.005, 0), (0.011, 1), (0.02, 1), (0.021, 3), (0.04, 9), (0.06, None)]
)
def test_the_most_accurate_point_that_reaches_the_wanted_mse_is_found(wanted, strength):
    found = reaching(POINTS, wanted)
    assert (None if found is None else found.place.strength) == strength


def test_validation_images_choose_not_test_images():
    lucky = [point(1, 0.9, 0.02, validation=0.7), point(2, 0.8, 0.02, validation=0.75)]
    assert reaching(lucky, 0.02).place.strength == 2


@pytest.mark.parametrize(("smaller", "strength"), [(False, 1), (True, 9)])
def test_the_weakest_that_reaches_is_the_smallest_or_the_largest_whatever_the_order(smaller, strength):
    points = [*reversed(POINTS), point(0, 0.9, 0.001, bits=2)]
    found = weakest_reaching(points, 0.02, smaller)
    assert {split: one and one.place.strength for split, one in found.items()} == {
        "layer2, 4 bits, 8 channels": strength,
        "layer2, 2 bits, 8 channels": None,
    }


def test_a_record_reads_back_as_it_was():
    for one in (*POINTS, point(None, 0.5, 0.03, bits=None, ssim=False)):
        assert FrontierPoint.from_values(one.as_values()) == one


def test_the_rows_hold_every_figure():
    row = frontier_rows(POINTS)[1]
    assert (row["strength"], row["mse"], row["mse_low"], row["front"]) == (1, 0.02, 0.019, True)
    assert (row["payload_bytes"], row["device_macs"], row["attack"]) == (44, 170_496, "payload, conv, large")


def test_what_is_wanted_is_said(capsys):
    print_frontier(POINTS, "weight")
    weakest = weakest_reaching(POINTS, 0.02, False)
    print_wanted(POINTS, 0.02, reaching(POINTS, 0.02), weakest, "weight")
    print_wanted(POINTS, 0.2, None, weakest_reaching(POINTS, 0.2, False), "weight")
    told = capsys.readouterr().out
    assert "Wanted MSE of 0.02: best is layer2, 4 bits, 8 channels, weight 1 with 0.02 at 88.00 %" in told
    assert "layer2, 4 bits, 8 channels: weight 1 is the weakest to reach it" in told
    assert "None of 5 points reaches the wanted MSE of 0.2: the highest lowest MSE is 0.05, of layer2, 4 bits" in told
    assert told.count(" * ") == 4
    report = as_report(POINTS, "a.weight", 0.02, reaching(POINTS, 0.02), weakest)
    assert (report["best"]["strength"], report["weakest"]) == (1, {"layer2, 4 bits, 8 channels": 1})


@pytest.mark.parametrize("points", [POINTS, [point(None, 0.5, 0.03, ssim=False)], [point(1, 0.5, 0.07)]])
def test_the_plot_is_drawn_of_any_points(points):
    drawn = frontier_plot(points, None if points[0].place.strength is None else "weight", 0.02)
    with Image.open(io.BytesIO(drawn)) as picture:
        assert picture.format == "PNG"
    assert frontier_plot(points, "weight", None) != drawn


def test_nothing_cannot_be_drawn():
    with pytest.raises(ValueError, match="there is nothing to draw"):
        frontier_plot([], None, None)
