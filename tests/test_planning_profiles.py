"""Machines, links and profiles: what they say, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from cleave.architectures import trace_graph
from cleave.planning import (
    Link,
    Machine,
    Power,
    RateTrace,
    layer_graph,
    read_arrivals,
    read_profile,
    read_trace,
    roofline,
    write_profile,
)


@pytest.fixture(scope="module")
def graph():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return trace_graph(network, torch.zeros(1, 3, 8, 8))


MACHINE = Machine("toy", rate=1e9, efficiency=0.5, bandwidth=1e8, launch=1e-5, power=Power(1, 2, 3))


def test_a_roofline_is_the_larger_of_arithmetic_and_memory_and_the_launch(graph):
    profile = roofline(graph, MACHINE)
    arithmetic = 2 * (4 * 36 * 27) / 5e8
    memory = 4 * (3 * 64 + 144 + 4 * 27 + 4) / 1e8
    assert profile.seconds["0"] == pytest.approx(max(arithmetic, memory) + 1e-5)
    assert profile.seconds["1"] == pytest.approx(4 * 288 / 1e8 + 1e-5)
    fast = roofline(graph, dataclasses.replace(MACHINE, bandwidth=1e15))
    assert fast.seconds["0"] == pytest.approx(arithmetic + 1e-5)
    assert profile.how == "roofline"
    assert profile.total == pytest.approx(sum(profile.seconds.values()))
    assert profile.check(layer_graph(graph)) is profile


def test_a_profile_is_written_and_read_again(graph, tmp_path):
    for profile in (roofline(graph, MACHINE), dataclasses.replace(roofline(graph, MACHINE), power=None, threads=2)):
        write_profile(tmp_path / "profile.json", profile)
        assert read_profile(tmp_path / "profile.json") == profile


def test_a_profile_of_another_network_or_input_size_is_refused(graph):
    profile = roofline(graph, MACHINE)
    network, longer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(*(nn.ReLU() for _ in range(5)))
    for other, words in (
        (trace_graph(network, torch.zeros(1, 3, 8, 10)), "other sizes, as for another image size"),
        (trace_graph(longer, torch.zeros(1, 3, 8, 8)), "no '4'"),
    ):
        with pytest.raises(ValueError, match=f"toy is of another network or input size.*{words}"):
            profile.check(other)
    short = dataclasses.replace(profile, seconds={"0": 1.0})
    with pytest.raises(ValueError, match="misses the seconds of '1'"):
        short.check(graph)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 9}, "no profile of schema 1"),
        ({"extra": 1}, "no profile of schema 1"),
        ({"seconds": {"0": -1}}, "must be at least 0"),
        ({"seconds": [1]}, "seconds must be an object"),
        ({"power": {"idle": -1, "compute": 1, "send": 1}}, "power.idle must be at least 0"),
        ({"power": {"idle": 1}}, "power must be an object of idle, compute and send"),
        ({"threads": -3}, "threads must be a whole number"),
        ({"batch": True}, "batch must be a whole number"),
        ({"whole": -1.0}, "whole of toy must be at least 0"),
        ({"machine": None}, "machine must be a text"),
        ({"digest": 5}, "digest of toy must be the SHA-256"),
        ({"how": "guessed"}, "how must be"),
    ],
)
def test_a_damaged_profile_is_refused_with_its_file(graph, tmp_path, change, words):
    file = tmp_path / "profile.json"
    write_profile(file, roofline(graph, MACHINE))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"profile.json.*{words}"):
        read_profile(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_profile(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": 0}, "rate of toy must be above 0"),
        ({"rate": -1.0}, "rate of toy must be above 0"),
        ({"rate": "fast"}, "rate of toy must be above 0"),
        ({"bandwidth": 0}, "bandwidth of toy must be above 0"),
        ({"efficiency": 1.5}, "at most 1"),
        ({"efficiency": None}, "efficiency of toy is missing"),
        ({"launch": -1e-6}, "launch of toy must be at least 0"),
        ({"launch": float("inf")}, "launch of toy must be at least 0"),
        ({"rate": True}, "rate of toy must be above 0"),
        ({"power": {"idle": 1}}, "power of toy must be a Power"),
        ({"name": None}, "name must be a text"),
    ],
)
def test_a_machine_out_of_range_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(MACHINE, **change)


@pytest.mark.parametrize("name", ["rate", "bandwidth"])
def test_a_machine_without_a_rate_has_no_roofline(graph, name):
    with pytest.raises(ValueError, match=f"the machine toy has no {name}; set its {name}.*or give a measured profile"):
        roofline(graph, dataclasses.replace(MACHINE, **{name: None}))


@pytest.mark.parametrize("name", ["idle", "compute", "send"])
def test_a_negative_power_is_refused(name):
    with pytest.raises(ValueError, match=f"power.{name} must be at least 0, watts; got -1"):
        Power(**({"idle": 1, "compute": 1, "send": 1} | {name: -1}))
    assert Power(1, 2, 3).energy(1.0, 2.0, 4.0) == 2 + 6 + 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "up of the link is missing; give Mbit/s"),
        ({"up": 0}, "up of the link must be above 0, Mbit/s; got 0"),
        ({"up": -3.0}, "up of the link must be above 0"),
        ({"up": float("nan")}, "up of the link must be above 0"),
        ({"up": 3.0, "down": 0}, "down of the link must be above 0"),
        ({"up": 3.0, "round_trip": -1}, "round_trip of the link must be at least 0"),
        ({"up": float("inf")}, "up of the link must be above 0"),
        ({"up": "fast"}, "up of the link must be above 0"),
        ({"up": True}, "up of the link must be above 0"),
        ({"up": 3.0, "trace": RateTrace((0, 1), (1,))}, "both say the rate up"),
        ({"up": 3.0, "trace": [(0, 1)]}, "trace of the link must be a RateTrace, the path of a CSV file, or None"),
    ],
)
def test_a_link_without_a_rate_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Link(**given)


def test_traces_are_read_and_what_is_none_is_refused(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("time,rate\n0,8\n1.5,16\n4,0\n")
    assert read_trace(file) == RateTrace((0, 1.5, 4), (8, 16)) == Link(trace=file).trace
    for text, words in {
        "0,8\n": "a rate from each time to the next",
        "": "a rate from each time to the next",
        "1,8\n2,8\n": "begin at 0 and ascend",
        "0,8\n0,8\n": "begin at 0 and ascend",
        "0,-8\n1,8\n": "must be at least 0",
        "0,0\n1,8\n": "every rate of the trace is 0",
        "0,8\n1\n": "row 2",
        "0,8\n1,fast\n": "row 2",
        "0,8\n\n1,2,3\n": "row 3",
        "nan,8\n0,8\n5,8\n": "row 1",
        "O,8\n0,8\n5,8\n": "row 1",
        "-1,8\n0,8\n5,8\n": "begin at 0 and ascend",
        "0,nan\n5,8\n": "row 1",
        "time,rate\n": "a rate from each time to the next",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=f"trace.csv.*{words}"):
            read_trace(file)
    file.write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(ValueError, match=r"trace\.csv is no CSV file in UTF-8"):
        read_trace(file)
    file.write_bytes("\ufeff0,8\n4,0\n".encode())  # as a spreadsheet writes it
    assert read_trace(file) == RateTrace((0, 4), (8,))
    with pytest.raises(FileNotFoundError):
        Link(trace=tmp_path / "none.csv")


def test_a_trace_says_which_of_its_numbers_is_none():
    for times, words in (((0, float("inf")), "times of a trace must be finite"), ((0, float("nan")), "ascend")):
        with pytest.raises(ValueError, match=words):
            RateTrace(times, (8,))
    assert RateTrace((0, 1, 2, 3), (8, 0, 8)).finish(0.5, 1_000_000) == 2.5  # an outage in the middle
    assert RateTrace((0, 1, 2), (0, 8)).finish(0.5, 0) == 0.5  # nothing to send waits for nothing


def test_a_link_with_a_trace_can_be_copied():
    link = Link(trace=RateTrace((0, 1), (8,)))
    assert dataclasses.replace(link, round_trip=0.5) == Link(trace=link.trace, round_trip=0.5)


def test_a_profile_is_scaled_by_a_factor_above_0(graph):
    profile = roofline(graph, MACHINE)
    assert profile.scaled(2.0).total == pytest.approx(2 * profile.total)
    for factor in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="factor must be above 0"):
            profile.scaled(factor)


def test_a_linear_link_fits_the_two_points_of_the_placement_survey():
    """Faster R-CNN sent whole, table 3 of the placement survey; bytes and compute are our fit to its two times."""
    slow, fast = 34.56e-3, 22.96e-3
    seconds = np.array([[8e-6 / 82.8, 1], [8e-6 / 276, 1]])
    size, compute = np.linalg.solve(seconds, [slow, fast])
    assert size == pytest.approx(171.5e3, rel=1e-3)
    assert compute == pytest.approx(18.0e-3, rel=2e-3)
    for rate, wanted in ((82.8, slow), (276, fast)):
        assert Link(up=rate).up_seconds(size) + compute == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("read", "told"),
    [(read_trace, "of times and rates"), (read_arrivals, "of times of arrival"), (read_profile, "of a profile")],
)
def test_a_file_that_is_not_there_is_named_with_what_it_should_hold(read, told, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no file .*none.csv {told}"):
        read(tmp_path / "none.csv")
