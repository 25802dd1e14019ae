"""The table of a search, written and read back, and the papers' plots."""

import io

import matplotlib.image
import numpy as np
import pytest

from cleave.architectures.linking.path import Path
from cleave.planning import (
    BlockTimes,
    GaussianProcess,
    PathLoad,
    PathReward,
    SearchSettings,
    candidate_paths,
    exhaustive_search,
    path_loads,
    path_problem,
    reward_value,
    search_paths,
)
from cleave.reports.csv_file import write_csv
from cleave.reports.paths.plots import iterations_plot, paths_plot
from cleave.reports.paths.report import print_search, write_search
from cleave.reports.paths.tables import path_rows, read_path_table

from .path_tables import BLOCKS, ORIGINAL, pair


@pytest.fixture(scope="module")
def searched():
    problem, accuracies = pair(0)
    settings = SearchSettings(most=6)
    return problem, search_paths(problem, accuracies.__getitem__, GaussianProcess(BLOCKS, BLOCKS), settings)


def test_a_row_for_the_local_network_and_for_each_path(searched):
    problem, result = searched
    original, *rows = path_rows(problem, result)
    assert (original["kind"], original["lout"], original["accuracy"]) == ("original", None, ORIGINAL)
    assert (original["throughput_ratio"], original["average_accuracy"]) == (1, pytest.approx(ORIGINAL))
    assert original["value"] == problem.original_value
    assert [Path(*(row[name] for name in Path._fields)) for row in rows] == list(problem.paths)
    trained = {one.path: one for one in result.trained}
    for row in rows:
        path = Path(*(row[name] for name in Path._fields))
        option, one = problem.paths[path], trained.get(path)
        assert row["candidate"] == (path in problem.candidates())
        assert row["host_seconds"] == option.load.host_seconds
        assert row["throughput"] == pytest.approx(row["throughput_local"] + row["throughput_path"])
        assert row["best"] == (path == result.path)
        if one is None:
            assert [row[name] for name in ("accuracy", "value", "stage", "average_accuracy")] == [None] * 4
        else:
            assert (row["accuracy"], row["value"], row["stage"]) == (one.accuracy, one.value, one.stage)
            assert row["average_accuracy"] == option.throughput.average_accuracy(ORIGINAL, one.accuracy)
            assert result.trained[row["order"]] is one
    assert sum(row["best"] for row in rows) == 1


def test_where_the_local_network_is_kept_its_row_is_the_best():
    problem = path_problem(PathLoad(1.0), 0.8, {Path(0, 0, 0, 1): PathLoad(1.0)}, lambda option, accuracy: accuracy)
    original, row = path_rows(problem, exhaustive_search(problem, lambda path: 0.9))
    assert (original["best"], row["best"], row["candidate"]) == (True, False, False)


def test_a_table_that_was_written_is_searched_again_to_the_same_end(searched, tmp_path):
    problem, result = searched
    write_csv(tmp_path / "paths.csv", path_rows(problem, result))
    table = read_path_table(tmp_path / "paths.csv")
    assert table.original == problem.original.load
    assert table.accuracy == ORIGINAL
    assert table.loads == {path: option.load for path, option in problem.paths.items()}
    assert table.accuracies == {one.path: one.accuracy for one in result.trained}
    again = path_problem(table.original, table.accuracy, table.loads, reward_value(PathReward(), table.accuracy))
    known = search_paths(again, table.accuracies.__getitem__, GaussianProcess(BLOCKS, BLOCKS), SearchSettings(most=6))
    assert known.trained == result.trained


HEAD = "lout,hin,hout,lin,local_seconds,host_seconds,accuracy\n"
OWN = ",,,,1.0,,0.9\n"


def test_a_table_needs_few_columns(tmp_path):
    file = tmp_path / "paths.csv"
    file.write_text(HEAD + OWN + "0,1,2,3,0.5,0.25,0.8\n0,,,4,0.5,,\n")
    table = read_path_table(file)
    assert table.loads == {Path(0, 1, 2, 3): PathLoad(0.5, 0.25), Path(0, None, None, 4): PathLoad(0.5)}
    assert table.accuracies == {Path(0, 1, 2, 3): 0.8}
    file.write_text("host_params," + HEAD + "," + OWN + "1500000,0,1,2,3,0.5,0.25,0.8\n")
    assert read_path_table(file).loads == {Path(0, 1, 2, 3): PathLoad(0.5, 0.25, host_params=1_500_000)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the columns lout, hin, hout, lin, local_seconds, host_seconds, accuracy"),
        (HEAD.replace(",accuracy", ""), "lacks the columns accuracy"),
        (HEAD, "no row of the local network with its accuracy"),
        (HEAD + ",,,,1.0,,\n", "no row of the local network with its accuracy"),
        (HEAD + OWN + OWN, "line 3: the local network appears twice"),
        (HEAD + OWN + "0,1,2,3,1,1,0.5\n" * 2, r"line 4: the path \[0, 1, 2, 3\] appears twice"),
        (HEAD + OWN + "3,1,2,3,1,1,0.5\n", r"line 3: \[3, 1, 2, 3\] is no path"),
        (HEAD + OWN + "0,2,1,3,1,1,0.5\n", r"\[0, 2, 1, 3\] is no path"),
        (HEAD + OWN + "0,,,1,1,1,0.5\n", r"\[0, -, -, 1\] is no path"),
        (HEAD + OWN + "0,1,,3,1,1,0.5\n", "both hin and hout or neither"),
        (HEAD + OWN + "0,-1,2,3,1,1,0.5\n", "hin must be the number of a block, or empty, got '-1'"),
        (HEAD + OWN + "0,1,2,3,x,1,0.5\n", "local_seconds must be a number, or empty, got 'x'"),
        (HEAD + OWN + "0,1,2,3,,1,0.5\n", "local_seconds is empty"),
        (HEAD + OWN + "0,1,2,3,1,nan,0.5\n", "host_seconds must be finite"),
        (HEAD + OWN + "0,1,2,3,1,-1,0.5\n", "host_seconds must be a number of at least 0, got -1.0"),
        ("local_params," + HEAD + "1.5," + OWN, "line 2: local_params must be a whole number, got 1.5"),
        (HEAD + OWN + "0,1,2,3,1,1,82.7\n", "accuracy must be of 0 to 1, got 82.7"),
    ],
)
def test_tables_are_refused_by_their_line(tmp_path, text, message):
    file = tmp_path / "paths.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"paths\.csv.*{message}"):
        read_path_table(file)


def pixels(content):
    return matplotlib.image.imread(io.BytesIO(content))


def test_the_plots_are_pictures_that_show_what_was_found(searched):
    problem, result = searched
    rows = path_rows(problem, result)
    drawn = paths_plot(rows)
    assert pixels(drawn).shape == (930, 1350, 4)
    assert paths_plot([{**row, "best": False} for row in rows]) != drawn
    assert pixels(iterations_plot(problem, result)).shape == (750, 1350, 4)


def test_a_plot_of_hundreds_of_paths_has_few_labels():
    times = BlockTimes({str(i): 0.2 for i in range(6)}, 0.1, {str(i): 0.1 for i in range(6)}, 0.01)
    loads = path_loads(times, candidate_paths(6, 6))
    problem = path_problem(PathLoad(times.original), 0.9, loads, reward_value(PathReward(), 0.9), above_original=False)
    generator = np.random.default_rng(0)
    result = exhaustive_search(problem, lambda path: float(generator.random()))
    assert pixels(paths_plot(path_rows(problem, result))).shape[1] == 1350


def test_without_a_trained_path_there_is_nothing_to_draw():
    problem = path_problem(PathLoad(1.0), 0.8, {Path(0, 0, 0, 1): PathLoad(1.0)}, lambda option, accuracy: accuracy)
    result = exhaustive_search(problem, lambda path: 0.9)
    for draw in (lambda: paths_plot(path_rows(problem, result)), lambda: iterations_plot(problem, result)):
        with pytest.raises(ValueError, match="nothing to draw: no path was trained"):
            draw()


def test_what_was_found_is_printed_and_written(searched, tmp_path, capsys):
    problem, result = searched
    rows = path_rows(problem, result)
    print_search(rows, result)
    printed = capsys.readouterr().out
    assert printed.count("[0, 1, ") == len(result.trained) + 1
    assert f"Found: the path {result.path} ({result.reason})" in printed
    assert f"{100 * ORIGINAL:.2f} %" in printed
    files = write_search(tmp_path, rows, problem, result)
    assert list(files) == ["paths.png", "iterations.png", "paths.csv"]
    assert all(file.stat().st_size > 1000 for file in files.values())
    assert read_path_table(files["paths.csv"]).accuracy == ORIGINAL


def test_a_search_that_trains_nothing_has_a_table_and_says_why(tmp_path, capsys):
    problem = path_problem(PathLoad(1.0), 0.8, {Path(0, 0, 0, 1): PathLoad(1.0)}, lambda option, accuracy: accuracy)
    result = exhaustive_search(problem, lambda path: 0.9)
    rows = path_rows(problem, result)
    assert list(write_search(tmp_path, rows, problem, result)) == ["paths.csv"]
    print_search(rows, result)
    assert "Found: the local network as it is (no path is above the local network's 1 images" in capsys.readouterr().out
