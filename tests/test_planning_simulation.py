"""The pipeline of device, uplink, server and downlink: by hand, by closed forms, and against simpy."""

from __future__ import annotations

import dataclasses
import heapq
import math
import random

import pytest
import simpy

from cleave.planning import (
    Link,
    Operation,
    RateTrace,
    Task,
    Work,
    completions,
    every,
    plan_work,
    poisson,
    read_arrivals,
    server,
    simulate,
    stage_work,
)
from cleave.planning.planners.problem import Problem

from .planning_graphs import random_case

LINK = Link(up=8.0, down=8.0)  # a megabyte a second
FIGURE = {  # stages: latency of a task, longest stage, when four tasks are done, idle seconds of the three stations
    (1, 4, 1): (6, 4, (6, 10, 14, 18), (14, 2, 14)),
    (2, 3, 2): (7, 3, (7, 10, 13, 16), (8, 4, 8)),
    (2, 2, 2): (6, 2, (6, 8, 10, 12), (4, 4, 4)),
}


@pytest.mark.parametrize("stages", FIGURE)
def test_figure_2_of_coach_by_hand(stages):
    latency, longest, done, idle = FIGURE[stages]
    tasks = [Task(time, stage_work(stages)) for time in every(2.0, 4)]
    found = simulate(tasks, LINK)
    assert found.done == done
    assert found.latencies[0] == latency == sum(stages)
    assert longest == max(stages)
    assert found.busy[:3] == tuple(4 * stage for stage in stages)
    assert found.idle[:3] == idle
    assert completions([stages] * 4)[0] == latency


def test_constant_stages_have_the_closed_form():
    for stages in ((0.5, 1.25, 0.75, 0.25), (2.0, 0.5, 1.0, 0.0), (0.0, 1.0, 3.0, 0.5)):
        count = 50
        found = simulate([Task(0.0, stage_work(stages))] * count, LINK)
        assert found.done[0] == pytest.approx(sum(stages), abs=1e-12)
        gaps = [b - a for a, b in zip(found.done, found.done[1:], strict=False)]
        assert gaps == [pytest.approx(max(stages), abs=1e-9)] * (count - 1)
        assert found.done[-1] == pytest.approx(sum(stages) + (count - 1) * max(stages), abs=1e-9)
        assert found.throughput == pytest.approx(count / found.done[-1])


def test_a_tensor_is_sent_once_it_is_made_and_a_node_runs_once_its_inputs_are_there():
    work = Work(
        (
            Operation("a", 0, 1.0),
            Operation("b", 0, 2.0, needs=(0,)),
            Operation("a", 1, None, 2_000_000, (0,)),
            Operation("b", 1, None, 1_000_000, (1,)),
            Operation("c", 2, 3.0, needs=(2,)),
            Operation("d", 2, 1.0, needs=(3, 4)),
        )
    )
    found = simulate([Task(0.0, work)], LINK)
    assert [(span.name, span.start, span.end) for span in found.spans] == [
        *(("a", 0, 1), ("b", 1, 3), ("a", 1, 3), ("b", 3, 4), ("c", 3, 6), ("d", 6, 7)),
    ]
    assert found.latencies == [7]
    assert simulate([Task(0.0, work.in_stages())], LINK).latencies == [3 + 3 + 4]
    assert (found.up, found.down) == (3_000_000, 0)


def test_a_way_delays_and_keeps_nobody_busy():
    far = dataclasses.replace(LINK, round_trip=1.0)
    found = simulate([Task(0.0, stage_work((1, 2, 1, 1)))] * 3, far)
    assert found.done == (6, 8, 10)
    assert found.busy == (3, 6, 3, 3)


# --- simpy ------------------------------------------------------------------------------------------------------------


def with_simpy(tasks: list[Task], link: Link) -> list[float]:
    """The same stations as processes of simpy, each of which waits for work by an event."""
    env = simpy.Environment()
    ready = [[] for _ in range(4)]
    wake = [env.event() for _ in range(4)]
    missing = [[len(each.needs) for each in task.work.operations] for task in tasks]
    left = [len(task.work.operations) for task in tasks]
    done = [math.nan] * len(tasks)

    def offer(task, number):
        station = tasks[task].work.operations[number].station
        heapq.heappush(ready[station], (task, number))
        if not wake[station].triggered:
            wake[station].succeed()

    def completed(task, number):
        for user, each in enumerate(tasks[task].work.operations):
            if number in each.needs:
                missing[task][user] -= 1
                if not missing[task][user]:
                    offer(task, user)
        left[task] -= 1
        if not left[task]:
            done[task] = env.now

    def arrive(task):
        yield env.timeout(tasks[task].arrival)
        for number, count in enumerate(list(missing[task])):
            if not count:
                offer(task, number)

    def later(task, number):
        yield env.timeout(link.round_trip / 2)
        completed(task, number)

    def station(which):
        while True:
            while not ready[which]:
                wake[which] = env.event()
                yield wake[which]
            task, number = heapq.heappop(ready[which])
            each = tasks[task].work.operations[number]
            rate = {1: link.up, 3: link.down}.get(which)
            yield env.timeout(each.seconds if each.seconds is not None else 8e-6 * each.bytes / rate)
            if which in (1, 3) and link.round_trip:
                env.process(later(task, number))
            else:
                completed(task, number)

    for task in range(len(tasks)):
        env.process(arrive(task))
    for which in range(4):
        env.process(station(which))
    env.run()
    return done


@pytest.mark.parametrize("round_trip", [0.0, 0.003])
def test_random_arrivals_and_mixed_plans_equal_an_independent_run_in_simpy(round_trip):
    for seed in range(12):
        case, draw = random_case(seed), random.Random(seed)
        link = dataclasses.replace(case.link, round_trip=round_trip)
        sets = case.graph.closed_sets()
        problem = Problem(case.graph, case.device, link, case.server, case.options)
        plans = [problem.plan(sets[:, draw.randrange(sets.shape[1])], "any", "", exact=False) for _ in range(4)]
        works = [plan_work(case.graph, plan, case.device, case.server) for plan in plans]
        works += [work.in_stages() for work in works]
        rate = 1 / max(plan.bottleneck for plan in plans)
        tasks = [Task(time, draw.choice(works)) for time in poisson(rate, 60, seed)]
        assert simulate(tasks, link).done == pytest.approx(with_simpy(tasks, link), abs=1e-9)


# --- queues, exits, traces --------------------------------------------------------------------------------------------


def test_a_full_queue_holds_up_the_station_before_and_turns_tasks_away_at_the_device():
    tasks = [Task(0.0, stage_work((1, 4, 1)))] * 4
    found = simulate(tasks, LINK, {"uplink": 1})
    # The third is done at 3, has no place before the second begins to be sent at 5, and holds the device until then.
    assert found.done == (6, 10, 14, 18)
    assert [span.start for span in found.spans if span.station == 0] == [0, 1, 2, 5]
    assert found.blocked[0] == (5 - 3) + (9 - 6)
    none = simulate(tasks, LINK, {"uplink": 0})
    assert [span.start for span in none.spans if span.station == 0] == [0, 1, 5, 9]
    lossy = simulate(tasks, LINK, {"device": 1})
    assert (lossy.lost, len(lossy.latencies)) == (2, 2)
    assert simulate(tasks, LINK, {"device": 0}).lost == 3
    free = simulate(tasks, LINK)
    assert (free.lost, free.blocked) == (0, (0, 0, 0, 0))


def test_bounded_queues_of_mixed_plans_come_to_an_end_and_lose_nothing_but_at_the_door():
    for seed in range(20):
        case, draw = random_case(seed), random.Random(seed)
        problem, sets = Problem(*case), case.graph.closed_sets()
        plans = [problem.plan(sets[:, draw.randrange(sets.shape[1])], "any", "", exact=False) for _ in range(4)]
        works = [plan_work(case.graph, plan, case.device, case.server) for plan in plans]
        tasks = [Task(0.0, draw.choice(works)) for _ in range(20)]
        bounds = {name: draw.choice([0, 1, 2]) for name in ("uplink", "server", "downlink")}
        starts_on_the_device = [task for task in tasks if task.work.operations[0].station == 0]
        found = simulate(starts_on_the_device or tasks, case.link, bounds)
        assert len(found.latencies) + found.lost == len(found.done)
        if all(each.needs or each.station == 0 for task in starts_on_the_device for each in task.work.operations):
            assert not found.lost


def test_a_task_leaves_at_an_exit_with_what_it_depends_on():
    case = random_case(3, several=False)
    graph = case.graph
    plan = server(*case)
    work = plan_work(graph, plan, case.device, case.server)
    name = graph.layers[1].name
    left = work.until(name, head=0.5)
    found = simulate([Task(0.0, left)], case.link)
    held = graph.closure([1])
    needed = [name for layer, here in zip(graph.layers, held, strict=True) if here for name in layer.nodes]
    assert found.busy[2] == pytest.approx(sum(case.server.seconds[name] for name in needed) + 0.5)
    assert found.busy[3] > 0  # its answer goes back
    with pytest.raises(ValueError, match="no operation is called 'n77'"):
        work.until("n77")


def test_a_rate_that_changes_is_followed_and_must_last():
    trace = RateTrace((0.0, 1.0, 2.0, 10.0), (8.0, 0.0, 16.0))
    link = Link(trace=trace, down=8.0)
    assert link.up == pytest.approx((8 + 0 + 8 * 16) / 10)
    work = Work((Operation("image", 1, None, 2_000_000), Operation("all", 2, 0.5, needs=(0,))))
    found = simulate([Task(0.0, work), Task(0.0, work)], link)
    assert found.done == (3.0, 4.0)  # one megabyte, an outage, two a second
    with pytest.raises(ValueError, match="the trace ends at 10 s, before the stream"):
        simulate([Task(9.5, work)], link)


def test_quantiles_and_arrivals():
    found = simulate([Task(time, stage_work((1, 1, 1))) for time in (0.0, 0.0, 0.0)], LINK)
    assert found.latency((0, 0.5, 0.75, 1)) == [3, 4, 4.5, 5]
    assert found.mean_latency == 4
    with pytest.raises(ValueError, match="quantiles"):
        found.latency((2,))
    times = poisson(10.0, 5000, seed=1)
    assert times == poisson(10.0, 5000, seed=1) == sorted(times)
    assert times[-1] / 5000 == pytest.approx(0.1, rel=0.05)


def test_recorded_arrivals_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("time\n0\n0.5\n2\n")
    assert read_arrivals(tmp_path / "a.csv") == [0, 0.5, 2]
    (tmp_path / "a.csv").write_text(".5\n\n2\n2\n")
    assert read_arrivals(tmp_path / "a.csv") == [0.5, 2, 2]
    wrong = ["time\n", "0\n-1\n", "1\n0.5\n", "0\nsoon\n", "-1\n0\n1\n", "1.5s\n2\n", "", "0,1\n2,3\n"]
    for text in [*wrong, "nan\n0\n", "0\nnan\n1\n", "0\ninf\n"]:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match="a.csv"):
            read_arrivals(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: simulate([], LINK), "tasks is empty"),
        (lambda: simulate([Task(1.0, stage_work((1,))), Task(0.0, stage_work((1,)))], LINK), "must come in order"),
        (lambda: simulate([Task(-1.0, stage_work((1,)))], LINK), "arrival of a task must be at least 0"),
        (lambda: simulate([Task(0.0, stage_work((1,)))], LINK, {"uplnk": 1}), "Did you mean 'uplink'"),
        (lambda: simulate([Task(0.0, stage_work((1,)))], LINK, {"uplink": -1}), "queues.uplink must be"),
        (lambda: simulate([Task(0.0, stage_work((1,)))], LINK, {"uplink": True}), "queues.uplink must be"),
        (lambda: simulate([Task(float("nan"), stage_work((1,)))], LINK), "arrival of a task must be at least 0"),
        (lambda: stage_work((1, -1)), "must be at least 0"),
        (lambda: stage_work((1, math.nan)), "must be at least 0"),
        (lambda: stage_work((1, 2, 3, 4, 5)), "at most 4 stages"),
        (lambda: Work((Operation("a", 4, 1.0),)), "has no station 4; 0 to 3 are device, uplink"),
        (lambda: Work((Operation("a", 2, None),)), "must say its seconds"),
        (lambda: Work((Operation("a", 1, None, -5),)), "the bytes of 'a' must be"),
        (lambda: Work((Operation("a", 0, 1.0, needs=(0,)),)), "must need earlier ones"),
        (lambda: every(-1.0, 3), "every must be at least 0"),
        (lambda: every(math.inf, 3), "every must be at least 0"),
        (lambda: poisson(0.0, 3, 0), "rate must be above 0"),
        (lambda: poisson(1.0, 3, None), "seed must be a whole number"),
    ],
)
def test_mistakes_are_told_before_anything_runs(call, words):
    with pytest.raises(ValueError, match=words):
        call()
