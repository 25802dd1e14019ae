"""Throughput against a simulation of both sides, event by event, and the paper's numbers by hand."""

import heapq
from collections import deque

import pytest

from cleave.architectures.linking.path import Path
from cleave.planning import PathLoad, original_throughput, path_problem, path_throughput

ENDLESS = 64  # images under way at most: enough that the host never waits for the local side's longest job


class Simulated:
    """A local server that always has images, and a host that gives guests a share of its time.

    An image of the path takes the local front, the host and the local back; the others take the whole local network.
    The local server works on one thing at a time. It begins what the path asks for first, as long as the path has had
    no more than its share of the time and not too many images are under way.
    """

    def __init__(self, original, front, back, host, local_share, host_share):
        self.original, self.front, self.back = original, front, back
        self.host = host / host_share if host else 0.0
        self.local_share = local_share
        self.events, self.number = [], 0
        self.at_host, self.to_finish = deque(), deque()
        self.host_busy, self.local_busy = False, False
        self.under_way, self.spent = 0, 0.0
        self.alone, self.by_path = 0, 0

    def at(self, time, what):
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what))

    def run(self, until):
        self.start_local(0.0)
        while self.events and self.events[0][0] <= until:
            time, _, what = heapq.heappop(self.events)
            getattr(self, what)(time)
            self.start_local(time)
            self.start_host(time)
        return self.alone / until, self.by_path / until

    def start_local(self, time):
        if self.local_busy:
            return
        self.local_busy = True
        if self.to_finish:
            self.to_finish.popleft()
            self.spent += self.back
            self.at(time + self.back, "back_done")
        elif self.under_way < ENDLESS and self.spent <= self.local_share * time:
            self.under_way += 1
            self.spent += self.front
            self.at(time + self.front, "front_done")
        else:
            self.at(time + self.original, "alone_done")

    def start_host(self, time):
        if self.at_host and not self.host_busy:
            self.at_host.popleft()
            self.host_busy = True
            self.at(time + self.host, "host_done")

    def front_done(self, time):
        self.local_busy = False
        self.at_host.append(time)

    def host_done(self, time):
        self.host_busy = False
        self.to_finish.append(time)

    def back_done(self, time):
        self.local_busy = False
        self.under_way -= 1
        self.by_path += 1

    def alone_done(self, time):
        self.local_busy = False
        self.alone += 1


@pytest.mark.parametrize(
    ("front", "back", "host", "local_share", "host_share"),
    [
        (0.3, 0.203, 1.242, 1, 1),  # the paper's winner: the host is the slower side
        (0.3, 0.203, 1.242, 1, 0.4),
        (0.3, 0.203, 0.2, 1, 1),  # the local side is: nothing is left for others
        (0.3, 0.203, 0.2, 0.6, 1),
        (0.1, 0.05, 3.0, 0.3, 1),
        (0.9, 0.6, 0.7, 1, 1),  # a path that is dearer than the network itself
        (0.2, 0.3, 0.0, 0.5, 1),  # a skip-connection
        (0.2, 0.3, 0.0, 1, 1),
    ],
)
def test_throughput_is_that_of_a_simulation(front, back, host, local_share, host_share):
    alone, by_path = Simulated(1.0, front, back, host, local_share, host_share).run(20_000)
    found = path_throughput(1.0, front + back, host, local_share=local_share, host_share=host_share)
    assert found.path == pytest.approx(by_path, rel=0.005)
    assert found.local == pytest.approx(alone, rel=0.005, abs=0.001)
    assert found.total == pytest.approx(alone + by_path, rel=0.005)


def test_the_simulation_of_a_network_without_path_is_the_original():
    alone, by_path = Simulated(0.25, 1, 1, 1, 0, 1).run(1000)
    assert (alone, by_path) == pytest.approx((4, 0), abs=0.01)  # at time 0 a share of nothing lets one image through
    found = original_throughput(0.25)
    assert (found.original, found.local, found.path, found.total, found.ratio) == (4, 4, 0, 4, 1)
    assert not found.gains


def test_the_papers_winner_by_hand():
    """A_av = 84.4 % at 1.4 Th_0 of accuracies of 86.7 and 82.7 %: Th_l = 0.595, Th_h = 0.805, τ_l = 0.503 τ_0."""
    tau = 0.004
    found = path_throughput(tau, 0.503 * tau, tau / 0.805)
    assert found.path * tau == pytest.approx(0.805)
    assert found.local * tau == pytest.approx(1 - 0.805 * 0.503)
    assert found.local * tau == pytest.approx(0.595, abs=5e-4)
    assert found.ratio == pytest.approx(1.4, abs=5e-4)
    assert found.average_accuracy(0.867, 0.827) == pytest.approx((0.595 * 0.867 + 0.805 * 0.827) / 1.4, abs=1e-5)
    assert found.average_accuracy(0.867, 0.827) == pytest.approx(0.844, abs=5e-4)


def test_shares_limit_each_side():
    assert path_throughput(1, 0.5, 0.25, local_share=0.5).path == 1.0
    assert path_throughput(1, 0.5, 0.25, host_share=0.125).path == 0.5
    none = path_throughput(1, 0.5, 0.25, local_share=0)
    assert (none.path, none.local, none.ratio) == (0, 1, 1)
    assert none.average_accuracy(0.9, 0.1) == 0.9


def test_a_skip_takes_all_that_it_may_and_leaves_the_rest():
    found = path_throughput(1.0, 0.5, 0.0)
    assert (found.path, found.local, found.total) == (2, 0, 2)
    assert found.average_accuracy(0.9, 0.7) == 0.7
    assert path_throughput(1.0, 0.5, 0.0, local_share=0.5).local == 0.5


def test_rounding_is_no_gain():
    """A path that costs the local side what its own network does is as fast, whatever sums were rounded."""
    assert not path_throughput(0.3, 0.1 + 0.2, 1e-6).gains
    assert not path_throughput(0.1 + 0.2, 0.3, 1e-6).gains
    assert path_throughput(0.3, 0.299, 1e-6).gains
    loads = {Path(0, 0, 0, 1): PathLoad(0.1 + 0.2, 1e-6), Path(0, 0, 0, 2): PathLoad(0.299, 1e-6)}
    problem = path_problem(PathLoad(0.3), 0.8, loads, lambda option, accuracy: accuracy)
    assert problem.candidates() == [Path(0, 0, 0, 2)]


def test_a_throughput_never_falls_below_nothing():
    assert path_throughput(1.0, 0.1, 0.0999999999999).local >= 0
    assert path_throughput(1.0, 3.0, 0.0).local == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1, 0.1), "the local network's time must be a number of seconds above 0, got 0.0"),
        ((float("inf"), 0.1, 0.1), "the local network's time must be"),
        ((1.0, -0.1, 0.1), "local_seconds must be a number of at least 0, got -0.1"),
        ((1.0, 0.1, float("nan")), "host_seconds must be a number of at least 0, got nan"),
        ((1.0, 0.0, 0.0), "are both 0"),
    ],
)
def test_times_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        path_throughput(*arguments)


@pytest.mark.parametrize("name", ["local_share", "host_share"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_refused(name, share):
    with pytest.raises(ValueError, match=f"{name} must be a share of 0 to 1"):
        path_throughput(1.0, 0.5, 0.5, **{name: share})
