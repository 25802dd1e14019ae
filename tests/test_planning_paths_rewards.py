"""Eq. 1 of 2023 and the reward of 2024, by hand."""

import math

import pytest

from cleave.planning import Logistic, PathCost, PathLoad, PathReward, original_throughput, path_throughput

TAU_LOCAL, TAU_HOST = 0.503, 1 / 0.805  # of [0, 1, 4, 5], in units of the local network's time
ACCURACIES = {2: 0.802, 3: 0.816, 4: 0.827, 5: 0.824}  # by hout, the papers'; that of 3, not given, lies between


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_the_papers_reward_of_0450_against_0257():
    average = (0.595 * 0.867 + 0.805 * 0.827) / 1.4
    by_hand = sigma(8 * (average - 0.86)) * sigma(8 * 0.4)
    found = PathReward()(path_throughput(1.0, TAU_LOCAL, TAU_HOST), 0.867, 0.827)
    assert found == pytest.approx(by_hand, abs=2e-4)
    assert found == pytest.approx(0.450, abs=5e-4)
    original = PathReward()(original_throughput(1.0), 0.867, 0.867)
    assert original == pytest.approx(sigma(8 * 0.007) * 0.5)
    assert original == pytest.approx(0.257, abs=5e-4)


def rewards(reward):
    """Rewards by hout with host times even by block: 1 to hout of as many blocks."""
    found = {h: path_throughput(1.0, TAU_LOCAL, TAU_HOST * h / 4) for h in ACCURACIES}
    return {h: reward(found[h], 0.867, accuracy) for h, accuracy in ACCURACIES.items()}


def leader(reward):
    found = rewards(reward) | {None: reward(original_throughput(1.0), 0.867, 0.867)}
    return max(found, key=found.get)


def test_with_these_functions_the_papers_winner_leads_and_with_others_it_does_not():
    assert leader(PathReward()) == 4
    assert leader(PathReward(throughput=lambda ratio: ratio)) != 4
    per_point = PathReward(accuracy=Logistic(800, 0.86))
    assert leader(per_point) is None


def test_the_logistic_by_hand_and_far_out():
    assert Logistic(8, 0.86)(0.9) == pytest.approx(sigma(0.32))
    assert Logistic(8, 0.86)(0.8) == pytest.approx(sigma(-0.48))
    assert (Logistic(1e6, 0)(-10), Logistic(1e6, 0)(10)) == (0, 1)
    for arguments, message in (((0, 1), "slope"), ((-1, 1), "slope"), ((8, float("nan")), "middle")):
        with pytest.raises(ValueError, match=f"{message} must be a number"):
            Logistic(*arguments)


def test_functions_of_ones_own_are_used():
    reward = PathReward(accuracy=lambda a: a * a, throughput=lambda t: t / 2)
    found = path_throughput(1.0, 0.5, 1.0)
    assert found.ratio == 1.5
    assert reward(found, 0.9, 0.6) == pytest.approx(((0.5 * 0.9 + 1.0 * 0.6) / 1.5) ** 2 * 0.75)


def test_equation_1_by_hand():
    load = PathLoad(
        local_seconds=800e-6, host_seconds=2500e-6, communication_seconds=300e-6, local_params=620_000,
        host_params=1_500_000,
    )  # fmt: skip
    by_hand = math.exp(40 * (0.85 - 0.833)) + 1e-6 * 300 + 1e-6 * 800 + 2e-5 * 2500 + 10 * 0.62 + 10 * 1.5
    assert PathCost(least_accuracy=0.85)(load, 0.833) == pytest.approx(by_hand)
    own = PathCost(0.9, 2, 3e-3, 4e-3, 5e-3, 6, 7)
    by_hand = math.exp(2 * (0.9 - 0.8)) + 3e-3 * 300 + 4e-3 * 800 + 5e-3 * 2500 + 6 * 0.62 + 7 * 1.5
    assert own(load, 0.8) == pytest.approx(by_hand)


def test_a_steep_cost_stays_finite():
    assert 1e300 < PathCost(1.0, accuracy_weight=1e6)(PathLoad(1.0), 0.0) < math.inf


def test_each_weight_of_equation_1_has_its_own_term():
    load = PathLoad(1.0, 2.0, 4.0, 8, 16)
    weights = ["communication", "local_time", "host_time", "local_params", "host_params"]
    units = {"communication": 4e6, "local_time": 1e6, "host_time": 2e6, "local_params": 8e-6, "host_params": 16e-6}
    for name in weights:
        only = {f"{other}_weight": float(other == name) for other in weights}
        assert PathCost(0.5, accuracy_weight=0, **only)(load, 0.5) == pytest.approx(1 + units[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PathCost(86.7), "least_accuracy must be an accuracy of 0 to 1, got 86.7; divide per cent by 100"),
        (lambda: PathCost(0.8, host_time_weight=-1), "host_time_weight must be a number of at least 0, got -1"),
        (lambda: PathCost(0.8, accuracy_weight=float("nan")), "accuracy_weight must be a number of at least 0"),
        (lambda: PathLoad(-1.0), "local_seconds must be a number of at least 0, got -1.0"),
        (lambda: PathLoad(1.0, host_params=-5), "host_params must be a number of at least 0, got -5"),
    ],
)
def test_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
