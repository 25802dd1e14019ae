"""Every planner against brute force, and against the simulator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re

import numpy as np
import pytest

from cleave.planning import (
    PLANNERS,
    Link,
    PlanOptions,
    Power,
    TooManySetsError,
    dads_heavy,
    dads_light,
    every_plan,
    johnson_order,
    jps,
    local,
    makespan,
    neurosurgeon,
    optima,
    optimum,
    pareto,
    plan_work,
    server,
    simulate,
    write_plan,
)
from cleave.planning.planners.problem import Problem
from cleave.planning.simulation.work import Task

from .planning_graphs import by_hand, random_case

CLOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.mark.parametrize("seeds", [128, pytest.param(500, marks=pytest.mark.slow)])
def test_the_optimum_is_that_of_brute_force_and_so_is_the_light_cut_of_dads(seeds):
    for seed in range(seeds):
        case = random_case(seed, bits=1 + seed % 32)
        divisions = list(by_hand(case))
        best = optima(*case)
        least = min(each.latency for each in divisions)
        assert best["latency"].latency == pytest.approx(least, **CLOSE)
        assert best["throughput"].bottleneck == pytest.approx(min(max(each.stages) for each in divisions), **CLOSE)
        assert best["energy"].energy == pytest.approx(min(each.energy for each in divisions), **CLOSE)
        assert best["bytes"].bytes == 0
        assert all(plan.exact for plan in best.values())
        light = dads_light(*case)
        assert light.latency == pytest.approx(least, **CLOSE)
        assert light.exact


def test_what_a_plan_says_of_its_division_is_what_it_costs_by_hand():
    for seed in range(60):
        case = random_case(seed, bits=5)
        costs = {each.held: each for each in by_hand(case)}
        for plan in [*every_plan(*case).values(), *pareto(*case)]:
            for one in plan.schedule or (plan,):
                wanted = costs[frozenset(one.device_nodes)]
                assert tuple(one.stages) == pytest.approx(wanted.stages, **CLOSE)
                assert (one.latency, one.energy) == pytest.approx((wanted.latency, wanted.energy), **CLOSE)
                assert one.bytes == wanted.bytes
                assert set(one.device_nodes).isdisjoint(one.server_nodes)


def test_neurosurgeon_is_the_best_cut_that_one_tensor_crosses():
    for seed in range(200):
        for objective in ("latency", "energy"):
            case = random_case(seed, several=False, objective=objective)
            plan, problem = neurosurgeon(*case), Problem(*case)
            sets = case.graph.closed_sets()
            single = sets[:, problem.costs(sets).tensors <= 1]
            best = problem.costs(single).of(objective).min()
            assert getattr(plan, objective) == pytest.approx(best, **CLOSE)
            assert plan.tensors <= 1


def test_the_front_is_that_of_all_divisions():
    for seed in range(100):
        case = random_case(seed)
        divisions = [(each.latency, max(each.stages)) for each in by_hand(case)]
        beaten = lambda a: any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in divisions)  # noqa: E731, B023
        wanted = sorted({each for each in divisions if not beaten(each)})
        front = [(plan.latency, plan.bottleneck) for plan in pareto(*case)]
        assert front == [pytest.approx(each, **CLOSE) for each in wanted]


def test_local_and_server_are_the_two_ends():
    case = random_case(7)
    ends = local(*case), server(*case)
    assert (ends[0].server_nodes, ends[1].device_nodes) == ((), ())
    assert (ends[0].bytes, ends[0].stages[1:]) == (0, (0, 0, 0))
    assert [each.name for each in ends[1].sent] == ["input"]
    assert ends[1].bytes == case.graph.images.count
    floats = dataclasses.replace(case.options, image="float32", bits=4)
    assert server(*case[:4], floats).bytes == 4 * case.graph.images.count  # bits are those of features alone
    assert server(*case[:4], PlanOptions(image="jpeg_imagenet")).bytes == 44_770
    assert server(*case[:4], PlanOptions(image=999.5)).bytes == 1000


def test_johnsons_rule_equals_all_permutations():
    draw = random.Random(1)
    for _ in range(300):
        jobs = [(draw.uniform(0, 5), draw.choice([draw.uniform(0, 5), 2.0])) for _ in range(draw.randint(1, 6))]
        least = min(makespan(order) for order in itertools.permutations(jobs))
        assert makespan([jobs[i] for i in johnson_order(jobs)]) == pytest.approx(least, rel=1e-12)


def test_jps_takes_the_best_share_of_two_adjacent_cuts():
    for seed in range(40):
        case = random_case(seed, jobs=6)
        plan = jps(*case)
        assert len(plan.schedule) == 6
        cuts = {tuple(one.device_nodes): one.stages[:2] for one in plan.schedule}
        assert len(cuts) <= 2
        pairs = sorted(cuts.values())
        shares = [pairs[:1] * n + pairs[-1:] * (6 - n) for n in range(7)]
        least = min(makespan(order) for share in shares for order in itertools.permutations(share))
        assert makespan([one.stages[:2] for one in plan.schedule]) == pytest.approx(least, **CLOSE)
        assert plan.throughput == pytest.approx(6 / plan.makespan)
        work = [plan_work(case.graph, one, case.device, case.server).in_stages() for one in plan.schedule]
        simulated = simulate([Task(0.0, each) for each in work], case.link)
        # The stages of a flow shop in one order; the simulator may let a later job pass an idle station.
        assert max(simulated.done) <= plan.makespan + 1e-9


def test_stage_times_of_every_planner_are_the_simulators():
    for seed in range(40):
        case = random_case(seed, bits=7)
        for plan in [*every_plan(*case).values(), *pareto(*case)]:
            for one in plan.schedule or (plan,):
                work = plan_work(case.graph, one, case.device, case.server)
                apart, together = (simulate([Task(0.0, each)], case.link) for each in (work.in_stages(), work))
                assert apart.busy == pytest.approx(tuple(one.stages), abs=1e-9)
                assert together.busy == pytest.approx(tuple(one.stages), abs=1e-9)
                assert apart.latencies[0] == pytest.approx(one.latency, abs=1e-9)
                assert together.latencies[0] <= one.latency + 1e-9  # stages overlap within a task
                assert together.up == one.bytes


def test_beyond_the_limit_sums_stay_exact_and_the_longest_stage_says_that_it_is_a_guess():
    case = random_case(11, least=9, limit=2)
    wanted = optima(*case[:4], PlanOptions())
    assert case.graph.closed_sets().shape[1] > 2
    for objective in ("latency", "energy", "bytes", "throughput"):
        plan = optimum(*case[:4], dataclasses.replace(case.options, objective=objective))
        assert plan.exact == (objective != "throughput")
        assert ("may not be optimal" in plan.why) == (objective == "throughput")
        if plan.exact:
            assert getattr(plan, objective) == pytest.approx(getattr(wanted[objective], objective), **CLOSE)
        assert plan.bottleneck >= wanted["throughput"].bottleneck * (1 - 1e-9)
        with pytest.raises(TooManySetsError, match="exact=true asks for every one, but there are more than limit=2"):
            optimum(*case[:4], dataclasses.replace(case.options, objective=objective, exact=True))
    front = pareto(*case)
    assert not any(plan.exact for plan in front)
    with pytest.raises(TooManySetsError, match="exact=true"):
        pareto(*case[:4], dataclasses.replace(case.options, exact=True))
    heavy = dads_heavy(*case)
    told = float(re.search(r"here at most ([\d.]+) times it", heavy.why)[1])
    assert heavy.bottleneck / wanted["throughput"].bottleneck <= told <= 4


def test_bits_change_what_is_sent_and_nothing_else():
    case = random_case(5)
    few, many = (Problem(*case[:4], PlanOptions(bits=bits)) for bits in (4, 32))
    sets = case.graph.closed_sets()
    assert np.array_equal(few.costs(sets).stages[[0, 2, 3]], many.costs(sets).stages[[0, 2, 3]])
    inner = few.costs(sets).tensors > 0
    assert (few.costs(sets).bytes[inner] <= many.costs(sets).bytes[inner]).all()
    assert few.options.value_bytes(3) == 2  # packed, and rounded up to whole bytes


def test_an_answer_can_be_left_out_or_have_a_size_of_its_own():
    case = random_case(5)
    for answer, wanted in ((0, 0.0), (100, 8e-6 * 100 / case.link.down)):
        plan = server(*case[:4], PlanOptions(answer=answer))
        assert plan.stages.downlink == pytest.approx(wanted)
        assert bool(plan.returned) == bool(answer)


def test_a_plan_is_written_with_what_follows_from_it(tmp_path):
    case = random_case(2)
    for plan in every_plan(*case).values():
        write_plan(tmp_path / "plan.json", plan)
        values = json.loads((tmp_path / "plan.json").read_text())
        assert values["latency"] == plan.latency
        assert values["stages"]["device"] == plan.stages.device
        assert [each["name"] for each in values["sent"]] == [each.name for each in plan.sent]


def test_bubbles_and_bottleneck_are_those_of_the_stages():
    plan = dataclasses.replace(local(*random_case(0)), stages=(1.0, 4.0, 1.0, 0.0))
    assert (plan.bottleneck, plan.bottleneck_stage, plan.throughput, plan.bubbles) == (4.0, "uplink", 0.25, 6.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 0}, "bits must be a whole number of at least 1"),
        ({"bits": 33}, "bits must be a whole number of 1 to 32"),
        ({"objective": "latencey"}, "Did you mean 'latency'"),
        ({"image": "jpeg_imagnet"}, "Did you mean 'jpeg_imagenet'"),
        ({"image": 0}, "image must be above 0"),
        ({"answer": -1}, "answer must be a whole number of at least 0"),
        ({"jobs": 0}, "jobs must be"),
        ({"limit": 0}, "limit must be"),
        ({"exact": "maybe"}, "exact must be true or false; got 'maybe'"),
        ({"exact": 1}, "exact must be true or false"),
        ({"image": True}, "image must be above 0"),
        ({"image": math.nan}, "image must be above 0"),
        ({"bits": True}, "bits must be a whole number"),
        ({"bits": 8.0}, "bits must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        PlanOptions(**options)


def test_profiles_of_another_network_are_refused_by_every_planner():
    case, other = random_case(1), random_case(2)
    for planner in [*PLANNERS.values(), optimum, pareto]:
        for chosen in ((other.device, case.server), (case.device, other.server)):
            with pytest.raises(ValueError, match="another network or input size"):
                planner(case.graph, chosen[0], case.link, chosen[1], case.options)


def test_energy_needs_a_power():
    case = random_case(1, objective="energy")
    device = dataclasses.replace(case.device, power=None)
    for planner in (neurosurgeon, optimum):
        with pytest.raises(ValueError, match="set its power"):
            planner(case.graph, device, case.link, case.server, case.options)
    assert local(case.graph, device, case.link, case.server, case.options).energy is None
    assert "energy" not in optima(case.graph, device, case.link, case.server, case.options)


def test_a_network_of_one_layer_has_two_ends_and_every_planner_takes_one():
    case = random_case(0, least=1, most=1)
    assert case.graph.closed_sets().shape == (1, 2)
    for plan in [*every_plan(*case).values(), *pareto(*case)]:
        for one in plan.schedule or (plan,):
            assert {len(one.device_nodes), len(one.server_nodes)} == {0, 1}
            assert [each.name for each in one.sent] == ([] if one.device_nodes else ["input"])


def test_where_nothing_costs_anything_there_is_a_plan_and_it_can_be_written(tmp_path):
    case = random_case(11, least=9, limit=2, objective="energy", answer=0)
    free = dict.fromkeys(case.device.seconds, 0.0)
    device = dataclasses.replace(case.device, seconds=free, power=Power(0, 0, 0))
    taken = case.graph, device, case.link, dataclasses.replace(case.server, seconds=free), case.options
    assert optimum(*taken).energy == 0
    for plan in every_plan(*taken).values():
        write_plan(tmp_path / "plan.json", plan)
    write_plan(tmp_path / "plan.json", local(*taken))
    assert json.loads((tmp_path / "plan.json").read_text())["throughput"] is None


def test_a_graph_beyond_the_limit_is_refused_before_any_planner_runs(monkeypatch):
    case = random_case(11, least=9, limit=2, exact=True)
    monkeypatch.setitem(PLANNERS, "local", lambda *_: pytest.fail("a planner ran"))
    with pytest.raises(TooManySetsError, match="exact=true"):
        every_plan(*case)


def test_a_round_trip_counts_where_something_is_sent():
    case = random_case(1)
    link = Link(up=10, round_trip=0.5)
    ends = local(case.graph, case.device, link, case.server, case.options), server(*case[:2], link, *case[3:])
    assert [plan.delay for plan in ends] == [0, 0.5]
