import json

import pytest
import torch
from torch import nn

from cleave.architectures.linking.path import Path
from cleave.planning import (
    BlockTimes,
    candidate_paths,
    crossings,
    measure_chain,
    path_loads,
    read_block_times,
    write_block_times,
)

LOCAL, HOST = ["a", "b", "c", "d"], ["x", "y", "z"]
FILE = {
    "local": {"a": 1, "b": 2.0, "c": 4.0, "d": 8.0}, "output": 16.0, "host": {"x": 32.0, "y": 64.0, "z": 128.0},
    "links": 0.5,
}  # fmt: skip


def times(**changed):
    found = {**FILE, **changed}
    return BlockTimes(found["local"], found["output"], found["host"], found["links"])


def test_a_paths_times_by_hand():
    found = times()
    assert found.original == 31
    assert found.path(Path(0, 1, 2, 3)) == (1 + 8 + 16, 64 + 128 + 1)
    assert found.path(Path(1, 0, 0, 2)) == (31, 32 + 1)
    assert found.path(Path(0, None, None, 3)) == (1 + 8 + 16 + 0.5, 0)


def test_links_have_times_of_their_own():
    links = {"local/a -> host/y": 0.25, "host/z -> local/d": 0.125, "local/a -> local/d": 2.0}
    found = times(links=links)
    assert found.path(Path(0, 1, 2, 3)) == (25, 192 + 0.375)
    assert found.path(Path(0, None, None, 3)) == (27, 0)
    with pytest.raises(ValueError, match=r"miss the link 'local/b -> host/y'.* Did you mean 'local/a -> host/y'"):
        found.path(Path(1, 1, 2, 3))


def test_every_path_is_the_sum_of_what_runs():
    """Powers of two: a sum says which blocks are in it."""
    found = times(links=0.0)
    for path, load in path_loads(found, candidate_paths(4, 3)).items():
        local = {*range(path.lout + 1), *range(path.lin, 4)}
        assert load.local_seconds == 16 + sum(2**block for block in local)
        host = set() if path.skips else set(range(path.hin, path.hout + 1))
        assert load.host_seconds == sum(32 * 2**block for block in host)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Path(0, 1, 3, 3), "path has hout=3, which is no host block"),
        (Path(0, 1, 2, 4), "path has lin=4, which is no local block"),
        (Path(-1, 0, 0, 1), "path has lout=-1, which is no local block"),
        (Path(2, 0, 0, 2), "lin=2, which must come behind lout=2"),
        (Path(3, 0, 0, 1), "lin=1, which must come behind lout=3"),
        (Path(0, 2, 1, 3), "hin=2 behind hout=1"),
        (Path(0, None, None, 1), "skips nothing"),
        (Path(0, 1, None, 2), "hin and hout both, or neither"),
    ],
)
def test_a_path_that_leads_nowhere_has_neither_times_nor_features(path, message):
    for ask in (
        lambda: crossings(path, LOCAL, HOST),
        lambda: times().path(path),
        lambda: path_loads(times(), [path]),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_file_gives_back_what_was_written_in_the_order_of_the_blocks(tmp_path):
    file = tmp_path / "times.json"
    for links in (0.5, {"local/a -> host/y": 0.25}):
        write_block_times(file, times(links=links))
        assert read_block_times(file, LOCAL, HOST) == times(links=links)
    shuffled = {**FILE, "local": dict(reversed(FILE["local"].items()))}
    file.write_text(json.dumps(shuffled))
    assert list(read_block_times(file, LOCAL, HOST).local) == LOCAL


def without(values, part, name):
    return {**values, part: {key: value for key, value in values[part].items() if key != name}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without(FILE, "local", "c"), "the time of local/c is missing; give the seconds of a, b, c, d"),
        (without(FILE, "host", "x"), "the time of host/x is missing; give the seconds of x, y, z"),
        ({**FILE, "local": {}}, "the time of local/a is missing"),
        ({**FILE, "host": {**FILE["host"], "xx": 1}}, r"host/xx is no block; known are x, y, z"),
        ({**FILE, "host": {**FILE["host"], "y": -0.5}}, "the time of host/y is negative, -0.5"),
        ({**FILE, "local": {**FILE["local"], "a": -1}}, "the time of local/a is negative, -1"),
        ({**FILE, "output": -1e-9}, "the time of output is negative"),
        ({**FILE, "links": -1}, "the time of links is negative"),
        ({**FILE, "links": {"local/a -> host/y": -1}}, "the time of links/local/a -> host/y is negative"),
        ({**FILE, "links": None}, "the time of links must be a number of seconds, got None"),
        ({**FILE, "links": [1]}, "the time of links must be a number of seconds"),
        ({**FILE, "host": {**FILE["host"], "y": "1"}}, "the time of host/y must be a number of seconds, got '1'"),
        ({**FILE, "host": {**FILE["host"], "y": True}}, "the time of host/y must be a number of seconds, got True"),
        ({**FILE, "local": [1, 2]}, "local must be an object of seconds by block"),
        ({name: FILE[name] for name in ("local", "output", "host")}, "must be an object of local, output, host, links"),
        ({**FILE, "more": 1}, "must be an object of local, output, host, links, got .*more"),
        ([FILE], "must be an object of local, output, host, links, got list"),
        ({}, "got an empty one"),
        (
            {"local": dict.fromkeys(LOCAL, 0), "output": 0, "host": FILE["host"], "links": 0},
            "the times of the local blocks and its output are all 0",
        ),
    ],
)
def test_a_file_is_refused_by_its_name(tmp_path, values, message):
    file = tmp_path / "times.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"times\.json.*{message}"):
        read_block_times(file, LOCAL, HOST)


@pytest.mark.parametrize("text", ["", "{", '{"local": NaN}', '{"local": {}, "local": {}}', "\xff"])
def test_what_is_no_json_is_refused(tmp_path, text):
    file = tmp_path / "times.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"times\.json cannot be read"):
        read_block_times(file, LOCAL, HOST)


class Slow(nn.Module):
    """Adds 1 in place, and to a clock what it is said to take."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, iter(seconds)

    def forward(self, x):
        self.clock.now += next(self.seconds)
        return x.add_(1)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_measured_is_the_median_per_image_and_the_first_round_does_not_count():
    clock = Clock()
    chain = [Slow(clock, [100, 4, 8, 1000]), Slow(clock, [100, 2, 2, 2])]
    images = torch.zeros(4, 3)
    assert measure_chain(chain, images, rounds=3, clock=clock) == [2.0, 0.5]
    assert not images.any()


def test_modules_are_measured_without_gradients_on_what_the_one_before_makes():
    seen = []
    first, second = nn.Linear(3, 5), nn.Linear(5, 2)
    second.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.requires_grad)))
    found = measure_chain([first, second], torch.ones(2, 3), rounds=2)
    assert len(found) == 2
    assert min(found) >= 0
    assert seen == [((2, 5), False)] * 3
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, got 0"):
        measure_chain([first], torch.ones(2, 3), rounds=0)
