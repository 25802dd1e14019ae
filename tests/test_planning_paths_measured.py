"""Algorithm 1 on tables of two pairs of networks all of whose paths were trained, by benchmarks/code_links.py."""

import importlib.util
from pathlib import Path

import pytest

from cleave.planning import Logistic, PathReward, path_problem, reward_value
from cleave.reports.paths.tables import read_path_table

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LEAST_ACCURACY = 0.65  # the paths were trained so shortly that with 0.86 the local network is worth more than any
PAIRS = ("resnet20_alexnet", "resnet20_resnet20")
spec = importlib.util.spec_from_file_location("path_search", BENCHMARKS / "path_search.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_tables_are_of_all_paths_that_a_search_may_train(pair):
    known = read_path_table(BENCHMARKS / f"path_tables/{pair}.csv")
    value = reward_value(PathReward(Logistic(8.0, LEAST_ACCURACY)), known.accuracy)
    candidates = path_problem(known.original, known.accuracy, known.loads, value).candidates()
    assert sorted(candidates) == [(0, 1, hout, lin) for hout in range(1, 6) for lin in range(2, 6)]
    assert set(candidates) == set(known.accuracies)


@pytest.mark.parametrize("pair", PAIRS)
def test_algorithm_1_finds_the_best_path_of_measured_pairs_more_often_than_random_search(pair):
    known = read_path_table(BENCHMARKS / f"path_tables/{pair}.csv")
    found = benchmark.compare(known, 6, 6, least_accuracy=LEAST_ACCURACY)
    assert found.candidates == 20
    assert found.most <= 20 // 3
    assert found.hits == 10
    assert found.hits > found.random


def test_a_table_whose_best_is_the_local_network_says_nothing_of_a_search():
    known = read_path_table(BENCHMARKS / "path_tables/resnet20_alexnet.csv")
    with pytest.raises(ValueError, match=r"A_min=0.86 no path is worth more than the local network"):
        benchmark.compare(known, 6, 6)
