"""Algorithm 1 as printed and corrected, random and exhaustive search, on tables of accuracies."""

import importlib.util
import sys
from pathlib import Path as FilePath

import numpy as np
import pytest

from cleave.architectures.linking.path import Path
from cleave.planning import (
    GaussianProcess,
    PathCost,
    PathLoad,
    PathProblem,
    SearchSettings,
    candidate_paths,
    cost_value,
    exhaustive_search,
    path_problem,
    printed_algorithm,
    random_search,
    search_paths,
)
from cleave.reports.csv_file import write_csv
from cleave.reports.paths.tables import path_rows, read_path_table

from .path_tables import BLOCKS, pair

spec = importlib.util.spec_from_file_location(
    "path_search", FilePath(__file__).resolve().parent.parent / "benchmarks/path_search.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


class Counted:
    """A table of accuracies that counts what was trained, in order."""

    def __init__(self, accuracies):
        self.accuracies, self.asked = accuracies, []

    def __call__(self, path):
        self.asked.append(path)
        return self.accuracies[path]


def line(values, original=0.5, accuracy=0.1):
    """A problem whose paths are worth their accuracies, in order; all are fast, and the local network worth its own."""
    paths = candidate_paths(len(values) + 1, 1, lout=[0], skips=False)
    loads = {path: PathLoad(0.25, 0.25) for path in paths}
    problem = path_problem(PathLoad(1.0), accuracy, loads, lambda option, value: value)
    return problem, dict(zip(paths, values, strict=True))


def knows(accuracies):
    """A predictor that is always right."""
    return lambda paths, seen, others: (np.array([accuracies[path] for path in others]), np.zeros(len(others)))


# --- the printed algorithm and what is wrong with it ------------------------------------------------------------------


def test_a_trained_path_is_never_chosen_again_where_the_printed_algorithm_gets_stuck():
    problem, accuracies = line([0.2, 0.9, 0.8, 0.85, 0.3])
    first = [path for path, value in accuracies.items() if value == 0.2]
    settings = next(s for s in map(seeded, range(50)) if drawn(problem, s) == first)
    printed, corrected = Counted(accuracies), Counted(accuracies)
    printed_algorithm(problem, printed, knows(accuracies), settings)
    assert [accuracies[path] for path in printed.asked] == [0.2, 0.9]
    found = search_paths(problem, corrected, knows(accuracies), settings)
    assert [accuracies[path] for path in corrected.asked] == [0.2, 0.9, 0.85, 0.8, 0.3]
    assert found.accuracy == 0.9
    assert [one.stage for one in found.trained] == [0, 1, 2, 3, 4]


def seeded(seed, **more):
    return SearchSettings(start=1, seed=seed, **more)


def drawn(problem, settings):
    """The first set that some settings draw."""
    counted = Counted(dict.fromkeys(problem.paths, 0.5))
    random_search(problem, counted, settings.start, settings.seed)
    return counted.asked


def test_the_best_measured_path_is_returned_and_not_the_last():
    """Predictions that are upside down: each stage trains the worst one left."""
    problem, accuracies = line([0.9, 0.4, 0.3, 0.2, 0.15])
    best = max(accuracies, key=accuracies.get)
    settings = next(s for s in map(seeded, range(50)) if drawn(problem, s) == [best])
    wrong = knows({path: 1 - value for path, value in accuracies.items()})
    found = search_paths(problem, accuracies.__getitem__, wrong, settings)
    assert (found.path, found.accuracy) == (best, 0.9)
    printed = printed_algorithm(problem, accuracies.__getitem__, wrong, settings)
    assert printed.accuracy == 0.15


def test_the_local_network_is_kept_where_no_path_is_worth_more():
    problem, accuracies = line([0.3, 0.4, 0.35], accuracy=0.6)
    for found in (
        search_paths(problem, accuracies.__getitem__, knows(accuracies), SearchSettings(start=1)),
        random_search(problem, accuracies.__getitem__, 2),
        exhaustive_search(problem, accuracies.__getitem__),
    ):
        assert found.path is None
        assert (found.option, found.accuracy, found.value) == (problem.original, 0.6, 0.6)
        assert found.reason.endswith("none is worth more than the local network, which is kept as it is")
    assert printed_algorithm(problem, accuracies.__getitem__, knows(accuracies), SearchSettings(start=1)).accuracy < 0.6


def test_a_bad_stage_does_not_make_the_next_one_a_gain():
    """Up and down by turns below the best: no gain, though each second stage is better than the one before."""
    values = [0.9, 0.5, 0.7, 0.5, 0.7, 0.5, 0.7, 0.5]
    problem, accuracies = line(values)
    order = list(accuracies)
    settings = next(s for s in (seeded(i) for i in range(200)) if drawn(problem, s) == [order[0]])

    def in_order(paths, seen, others):
        return np.array([-order.index(path) / 10 + 1 for path in others]), np.zeros(len(others))

    found = search_paths(problem, accuracies.__getitem__, in_order, settings)
    assert [one.accuracy for one in found.trained] == [0.9, 0.5, 0.7, 0.5]
    assert found.reason == "none of the last 3 stages gained 0.01 or more"


def test_the_printed_algorithm_trains_what_the_corrected_one_does_until_it_repeats_itself():
    problem, accuracies = pair(3)
    process = GaussianProcess(BLOCKS, BLOCKS)
    for seed in range(2):
        printed, corrected = Counted(accuracies), Counted(accuracies)
        printed_algorithm(problem, printed, process, SearchSettings(seed=seed))
        search_paths(problem, corrected, process, SearchSettings(seed=seed, stop_after=8))
        assert len(set(printed.asked)) == len(printed.asked)
        assert corrected.asked[: len(printed.asked)] == printed.asked


# --- how it stops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trained", "reason"),
    [
        ({"start": 2, "stop_after": 1}, 3, "none of the last 1 stages gained 0.01 or more"),
        ({"start": 2, "stop_after": 3}, 5, "none of the last 3 stages gained 0.01 or more"),
        ({"start": 2, "stop_after": 2, "each": 2}, 6, "none of the last 2 stages gained 0.01 or more"),
        ({"start": 2, "stop_after": 9, "most": 4}, 4, "4 paths were trained, as many as allowed"),
        ({"start": 2, "stop_after": 9, "most": 5, "each": 2}, 5, "5 paths were trained, as many as allowed"),
        ({"start": 5, "stop_after": 9, "most": 3}, 3, "3 paths were trained, as many as allowed"),
        ({"start": 2, "stop_after": 9}, 8, "every path to choose from was trained"),
        ({"start": 20, "stop_after": 9}, 8, "every path to choose from was trained"),
        ({"start": 2, "stop_after": 9, "most": 8}, 8, "every path to choose from was trained"),
        ({"start": 2, "stop_after": 3, "least_gain": 0.0}, 8, "every path to choose from was trained"),
    ],
)
def test_how_a_search_stops(settings, trained, reason):
    problem, accuracies = line([0.6] * 8)
    counted = Counted(accuracies)
    found = search_paths(problem, counted, knows(accuracies), SearchSettings(**settings))
    assert len(counted.asked) == len(set(counted.asked)) == len(found.trained) == trained
    assert found.reason == reason


def test_gains_below_the_least_gain_count_as_none_and_others_start_the_count_anew():
    values = [0.5, 0.505, 0.509, 0.6, 0.605, 0.609, 0.612, 0.9]
    problem, accuracies = line(values)
    order = list(accuracies)
    settings = next(s for s in (seeded(i) for i in range(200)) if drawn(problem, s) == [order[0]])
    in_order = knows({path: 1 - i / 10 for i, path in enumerate(order)})
    found = search_paths(problem, accuracies.__getitem__, in_order, settings)
    assert [one.accuracy for one in found.trained] == values[:7]


def test_exploration_prefers_what_is_uncertain():
    problem, accuracies = line([0.5, 0.5, 0.5, 0.5])
    sure = list(accuracies)[-1]
    settings = next(s for s in map(seeded, range(50)) if sure not in drawn(problem, s))

    def predict(paths, seen, others):
        return np.array([0.6 if p == sure else 0.5 for p in others]), np.array(
            [0 if p == sure else 0.2 for p in others]
        )

    for exploration, first in ((0.0, True), (1.0, False)):
        settings = SearchSettings(start=1, seed=settings.seed, exploration=exploration)
        found = search_paths(problem, accuracies.__getitem__, predict, settings)
        assert (found.trained[1].path == sure) == first
        assert found.trained[1].predicted == (0.6 if first else 0.5)


def test_predictions_outside_0_to_1_are_taken_to_its_ends():
    problem, accuracies = line([0.5, 0.5, 0.5])
    predict = lambda paths, seen, others: (np.array([-0.5, 1.5, 0.5][: len(others)]), np.zeros(len(others)))  # noqa: E731
    found = search_paths(problem, accuracies.__getitem__, predict, SearchSettings(start=1))
    assert {one.predicted for one in found.trained} <= {None, 0.0, 0.5, 1.0}


# --- what may be chosen -----------------------------------------------------------------------------------------------


def slow():
    """A problem with one path above the local network's throughput, one as fast, and one that is slower."""
    paths = [Path(0, 0, 0, 1), Path(0, 0, 0, 2), Path(0, 0, 0, 3)]
    loads = {paths[0]: PathLoad(1.5, 0.1), paths[1]: PathLoad(1.0, 0.1), paths[2]: PathLoad(0.5, 0.1)}
    return path_problem(PathLoad(1.0), 0.8, loads, lambda option, accuracy: option.throughput.ratio), paths


def test_only_paths_above_the_local_networks_throughput_are_trained():
    problem, paths = slow()
    assert problem.candidates() == [paths[2]]
    counted = Counted(dict.fromkeys(paths, 0.5))
    for search in (
        lambda train: search_paths(problem, train, knows(counted.accuracies)),
        lambda train: printed_algorithm(problem, train, knows(counted.accuracies)),
        lambda train: random_search(problem, train, 3),
        lambda train: exhaustive_search(problem, train),
    ):
        counted.asked.clear()
        assert search(counted).path == paths[2]
        assert counted.asked == [paths[2]]


def test_all_paths_may_be_trained_where_throughput_is_not_the_question():
    problem, paths = slow()
    everything = PathProblem(problem.original, 0.8, problem.paths, problem.value, above_original=False)
    assert everything.candidates() == paths
    assert len(exhaustive_search(everything, lambda path: 0.5).trained) == 3


@pytest.mark.parametrize("share", [{"local_share": 0.0}, {"host_share": 0.0}, {}])
def test_where_no_path_is_faster_the_local_network_is_kept_and_the_result_says_so(share):
    loads = {Path(0, 0, 0, 2): PathLoad(0.5, 0.1) if share else PathLoad(1.0, 0.1)}
    problem = path_problem(PathLoad(1.0), 0.8, loads, lambda option, accuracy: accuracy, **share)

    def never(path):
        raise AssertionError("nothing is to be trained")

    for found in (
        search_paths(problem, never, knows({})),
        printed_algorithm(problem, never, knows({})),
        random_search(problem, never, 3),
        exhaustive_search(problem, never),
    ):
        assert (found.path, found.option, found.accuracy, found.trained) == (None, problem.original, 0.8, ())
        assert found.reason.startswith("no path is above the local network's 1 images per second; it is kept as it is")


def test_without_paths_the_local_network_is_kept():
    problem = path_problem(PathLoad(1.0), 0.8, {}, lambda option, accuracy: accuracy, above_original=False)
    assert exhaustive_search(problem, lambda path: 0.5).reason.startswith("there is no path to choose from")


def test_the_cost_of_2023_is_made_small():
    loads = {Path(0, 0, 0, 2): PathLoad(0.5, 0.5, host_params=2_000_000), Path(0, 0, 0, 3): PathLoad(0.5, 0.5)}
    cost = PathCost(least_accuracy=0.8)
    own = PathLoad(1.0, local_params=3_000_000)
    problem = path_problem(own, 0.85, loads, cost_value(cost), above_original=False)
    found = exhaustive_search(problem, lambda path: 0.8)
    assert found.path == Path(0, 0, 0, 3)
    assert found.value == -cost(loads[found.path], 0.8)
    assert problem.original_value == -cost(own, 0.85)


# --- random and exhaustive --------------------------------------------------------------------------------------------


def test_exhaustive_search_trains_each_once_and_returns_the_best():
    problem, accuracies = pair(0)
    counted = Counted(accuracies)
    found = exhaustive_search(problem, counted)
    assert counted.asked == problem.candidates()
    assert found.value == max(problem.worth(path, accuracies[path]) for path in problem.candidates())
    assert found.path in problem.candidates()
    assert found.option is problem.paths[found.path]


def test_random_draws_are_a_seeds_own_without_repeats_and_all_paths_come_up():
    problem, accuracies = pair(0)
    draws = []
    for seed in range(40):
        counted = Counted(accuracies)
        random_search(problem, counted, 5, seed=seed)
        again = Counted(accuracies)
        random_search(problem, again, 8, seed=seed)
        assert again.asked[:5] == counted.asked
        assert len(set(counted.asked)) == 5
        draws.append(tuple(counted.asked))
    assert len(set(draws)) == 40
    assert {path for drawn in draws for path in drawn} == set(problem.candidates())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0}, "start must be a whole number of at least 1, got 0"),
        ({"each": 0}, "each must be a whole number of at least 1"),
        ({"stop_after": 1.5}, "stop_after must be a whole number of at least 1, got 1.5"),
        ({"most": 0}, "most must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"least_gain": -0.01}, "least_gain must be a number of at least 0"),
        ({"least_gain": float("nan")}, "least_gain must be a number of at least 0"),
        ({"exploration": -1}, "exploration must be a number of at least 0"),
    ],
)
def test_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**arguments)


@pytest.mark.parametrize("more", [{"each": 2}, {"exploration": 1.0}, {"most": 3}])
def test_the_printed_algorithm_has_no_settings_of_ours(more):
    problem, accuracies = line([0.6, 0.7])
    with pytest.raises(ValueError, match="the printed algorithm has each=1, exploration=0 and most=None"):
        printed_algorithm(problem, accuracies.__getitem__, knows(accuracies), SearchSettings(**more))


@pytest.mark.parametrize("accuracy", [82.7, -0.1, float("nan"), None, True])
def test_training_must_give_an_accuracy(accuracy):
    problem, _ = line([0.6])
    with pytest.raises(ValueError, match=r"what training the path \[0, 0, 0, 1\] gave must be an accuracy of 0 to 1"):
        exhaustive_search(problem, lambda path: accuracy)
    with pytest.raises(ValueError, match="the local network's accuracy must be an accuracy of 0 to 1"):
        path_problem(PathLoad(1.0), accuracy, {}, lambda option, value: value)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        random_search(problem, lambda path: 0.5, 0)


@pytest.mark.parametrize("worth", [float("nan"), float("inf")])
def test_a_worth_that_is_no_number_is_refused(worth):
    problem, accuracies = line([0.6, 0.7])
    broken = PathProblem(problem.original, 0.1, problem.paths, lambda option, accuracy: worth)
    for search in (search_paths, printed_algorithm):
        with pytest.raises(ValueError, match=r"the path \[0, 0, 0, .\] with an accuracy of 0\.. is worth (nan|inf)"):
            search(broken, accuracies.__getitem__, knows(accuracies))


# --- the Gaussian process ---------------------------------------------------------------------------------------------


def test_predictions_pass_near_what_was_seen_and_are_surest_there():
    paths = candidate_paths(6, 6, lout=[0], hin=[1], skips=False)
    accuracies = [0.6 + 0.04 * path.lin - 0.01 * (path.hout - 3) ** 2 for path in paths]
    process = GaussianProcess(6, 6, noises=(1e-6,))
    seen = list(range(0, len(paths), 2))
    mean, deviation = process([paths[i] for i in seen], [accuracies[i] for i in seen], paths)
    np.testing.assert_allclose(mean[seen], [accuracies[i] for i in seen], atol=2e-4)
    np.testing.assert_allclose(mean, accuracies, atol=0.02)
    unseen = [i for i in range(len(paths)) if i not in seen]
    assert deviation[unseen].min() > deviation[seen].max()


def test_the_length_scale_is_the_likeliest_by_the_formula():
    """The same choice by the log marginal likelihood written out with NumPy."""
    from cleave.planning import path_features

    paths = candidate_paths(6, 6, lout=[0], hin=[1], skips=False)
    for seed in range(3):
        wavy = np.random.default_rng(seed).random(len(paths))
        for values in (wavy, np.array([path.lin / 5 for path in paths])):
            process = GaussianProcess(6, 6)
            features = path_features(paths, 6, 6)
            y = (values - values.mean()) / values.std()
            distance = np.linalg.norm(features[:, None] - features[None], axis=2)
            best, chosen = -np.inf, None
            for length in process.length_scales:
                for noise in process.noises:
                    r = np.sqrt(5) * distance / length
                    kernel = (1 + r + r**2 / 3) * np.exp(-r)
                    noisy = kernel + noise * np.eye(len(y))
                    evidence = -0.5 * (y @ np.linalg.solve(noisy, y) + np.linalg.slogdet(noisy)[1])
                    if evidence > best:
                        best, chosen = evidence, kernel @ np.linalg.solve(noisy, y) * values.std() + values.mean()
            mean, _ = process(paths, values.tolist(), paths)
            np.testing.assert_allclose(mean, chosen, atol=1e-8)


def test_one_accuracy_and_equal_ones_are_predicted_everywhere():
    paths = candidate_paths(4, 4)
    for seen in (1, 3):
        mean, deviation = GaussianProcess(4, 4)(paths[:seen], [0.7] * seen, paths)
        np.testing.assert_allclose(mean, 0.7)
        assert np.isfinite(deviation).all()


def test_the_gaussian_process_refuses_and_names_the_missing_package(monkeypatch):
    paths = candidate_paths(3, 1)
    with pytest.raises(ValueError, match="an accuracy for each trained path, got 0 for 0"):
        GaussianProcess(3, 1)([], [], paths)
    with pytest.raises(ValueError, match="got 1 for 2"):
        GaussianProcess(3, 1)(paths[:2], [0.5], paths)
    for arguments in ({"length_scales": ()}, {"length_scales": (1.0, 0.0)}, {"noises": (-1.0,)}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be numbers above 0"):
            GaussianProcess(3, 1, **arguments)
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ImportError, match="needs scikit-learn.*pip install scikit-learn"):
        GaussianProcess(3, 1)(paths[:1], [0.5], paths)


# --- what it is good for ----------------------------------------------------------------------------------------------


def test_algorithm_1_finds_the_best_of_a_table_with_a_third_of_it(tmp_path):
    """Within ε of the best after training at most a third, more often than random search with as many."""
    compared = []
    for seed in range(4):
        problem, accuracies = pair(seed)
        file = tmp_path / f"{seed}.csv"
        everything = PathProblem(problem.original, problem.accuracy, problem.paths, problem.value, above_original=False)
        result = exhaustive_search(everything, accuracies.__getitem__)
        write_csv(file, path_rows(everything, result))
        compared.append(benchmark.compare(read_path_table(file), BLOCKS, BLOCKS))
    assert all(found.candidates >= 20 for found in compared)
    assert all(found.most <= found.candidates / 3 for found in compared)
    assert all(found.hits >= 9 for found in compared)
    assert all(found.hits >= max(found.random, found.printed) for found in compared)
    assert sum(found.hits for found in compared) >= sum(found.random for found in compared) + 8


def test_a_table_with_a_candidate_that_was_not_trained_is_no_table_to_compare_on(tmp_path):
    problem, accuracies = pair(0)
    write_csv(tmp_path / "paths.csv", path_rows(problem, random_search(problem, accuracies.__getitem__, 5)))
    with pytest.raises(ValueError, match="the table is not exhaustive"):
        benchmark.compare(read_path_table(tmp_path / "paths.csv"), BLOCKS, BLOCKS)
