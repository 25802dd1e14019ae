"""The search for a path from config to table, on digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra.utils import instantiate

from cleave.planning import PathCost, SearchFolder, path_name, read_block_times
from cleave.reports.paths.tables import read_path_table
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.linking.pairs import cut_pair, identity
from cleave.scripts.assembly.linking.searching import check
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.search_paths import described, search
from cleave.scripts.train import train

from .offline_run import offline_runs

QUIET = ["trainer=cpu", "+trainer.enable_progress_bar=false", "logger=none", "callbacks.progress=null"]
SHORT = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1"]
SHORT += ["training.scheduler=null", "data.augment=none"]
DIGITS = ["data=digits", "data.image_size=8", "data.batch_size=16", "backbone.in_channels=1", "backbone.name=resnet20"]
BLOCKS = ["links.local_blocks=[conv1,layer1,layer2,layer3]", "links.host_blocks=[features.2,features.5]"]
# Times by which all paths but those that skip nothing are faster.
TIMES = {
    "local": {"conv1": 1, "layer1": 4, "layer2": 4, "layer3": 4}, "output": 1,
    "host": {"features.2": 2, "features.5": 2}, "links": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def host_file(tmp_path_factory) -> Path:
    """A checkpoint of another architecture."""
    quiet()
    folder = tmp_path_factory.mktemp("host")
    given = [*DIGITS, "backbone.name=alexnet", "backbone.kwargs={width: 0.1}", *QUIET, *SHORT, "test=false"]
    train(compose_config("train", given, folder))
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def networks(teacher_file, host_file) -> list[str]:
    return [*BLOCKS, f"base.ckpt_path={teacher_file}", f"host.ckpt_path={host_file}"]


@pytest.fixture(scope="module")
def pair(networks, tmp_path_factory):
    return cut_pair(config(tmp_path_factory.mktemp("pair"), *networks))


@pytest.fixture(scope="module")
def times_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("times") / "times.json"
    file.write_text(json.dumps(TIMES))
    return file


def config(folder: Path, *given: str):
    quiet()
    return compose_config("search_paths", [*DIGITS, *QUIET, *SHORT, *given], folder)


def records(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "paths").glob("*.json"))}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, networks, times_file):
    """A search of two paths of four, its config's overrides, and its result."""
    folder = tmp_path_factory.mktemp("search")
    given = [*networks, f"search.times={times_file}", "search.lout=[0]", "search.hin=[1]", "search.lin=[2,3]"]
    given += ["search.algorithm.start=1", "search.algorithm.most=2", "experiment=links"]
    return folder, given, search(config(folder, *given, "logger=csv_wandb", "logger.wandb.mode=offline"))


def test_a_search_trains_some_paths_and_writes_a_record_of_each(searched):
    folder, _, result = searched
    found = records(folder)
    assert len(found) == len(result.trained) == 2
    table = read_path_table(folder / "paths.csv")
    assert set(table.accuracies) == {one.path for one in result.trained}
    assert len(table.loads) == 4  # [0, 1, 1, 2], [0, 1, 1, 3], and both skips
    assert table.original.local_seconds == 14
    assert {"paths.png", "iterations.png"} <= {file.name for file in folder.iterdir()}
    for one in result.trained:
        record = found[path_name(one.path)]
        assert record["accuracy"] == one.accuracy
        restored = restore(folder / record["details"]["checkpoint"])
        assert list(restored.config.links.path) == list(one.path)
        assert "search" not in restored.config
        load, params = table.loads[one.path], sum(weight.numel() for weight in restored.network.parameters())
        assert load.local_params + load.host_params == params
        assert (load.host_params == 0) == one.path.skips


def test_one_run_of_w_and_b_has_the_table_the_plots_and_the_worth_of_each_path(searched):
    folder, _, result = searched
    (tracked,) = offline_runs(folder)
    assert (tracked.exit_codes, tracked.run.job_type) == ([0], "search_paths")
    assert tracked.series("search/value") == pytest.approx([one.value for one in result.trained])
    assert tracked.summary["search/best_value"] == pytest.approx(result.value)
    assert [len(tracked.series(name)) for name in ("table", "paths", "iterations")] == [1, 1, 1]
    assert tracked.artifacts["paths.csv"].type == "report"
    assert len(list((folder / "csv").rglob("metrics.csv"))) == 1


def test_an_accuracy_is_that_of_the_validation_images(searched, tmp_path):
    folder, _, result = searched
    one = result.trained[0]
    given = [f"ckpt_path={folder}/runs/{path_name(one.path)}/checkpoints/best.ckpt", "split=val", *QUIET[:2]]
    assert evaluate(compose_config("evaluate", given, tmp_path))["val/acc"] == pytest.approx(one.accuracy, abs=1e-6)


def test_the_same_search_goes_on_in_its_folder_and_trains_only_what_is_missing(searched, tmp_path):
    folder, given, result = searched
    again, last = tmp_path / "again", path_name(result.trained[-1].path)
    shutil.copytree(folder, again)
    before = {file: file.stat().st_mtime_ns for file in again.glob("runs/*/checkpoints/best.ckpt")}
    (again / f"paths/{last}.json").unlink()
    (again / f"runs/{last}/checkpoints/best.ckpt").write_text("half written")
    assert search(config(tmp_path / "run", *given, f"search.folder={again}")) == result
    assert records(again).keys() == records(folder).keys()
    changed = {file.parent.parent.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {last}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("training.optimizer.lr=0.1", r"settings\.training\.optimizer\.lr differs"),
        ("links.kernel=5", r"settings\.links\.kernel differs"),
        ("data.augment=crop", r"data\.augment differs"),
        ("host.weights=random", r"networks\.host\.weights differs"),
        ("trainer.max_epochs=2", r"settings\.trainer\.max_epochs differs"),
        ("base.ckpt_path=OTHER", r"networks\.base\.file differs"),
        ("host.ckpt_path=OTHER", r"networks\.host\.file differs"),
    ],
)
def test_a_folder_of_another_search_is_refused(searched, pair, tmp_path, other, named):
    folder, given, _ = searched
    (tmp_path / "other.ckpt").write_text("another network")
    cfg = config(tmp_path, *given, other.replace("OTHER", f"{tmp_path}/other.ckpt"))
    with pytest.raises(ValueError, match=rf"{folder.name} is another search's: {named}"):
        SearchFolder(folder, identity(cfg, pair.data))


def test_what_changes_no_accuracy_is_the_same_search(searched, pair, tmp_path):
    folder, given, _ = searched
    others = ["search.strategy=exhaustive", "search.lin=null", "data.num_workers=1", "logger=csv"]
    SearchFolder(folder, identity(config(tmp_path, *given, *others), pair.data))


def test_other_images_are_another_search(searched, pair, tmp_path):
    folder, given, _ = searched
    given = config(tmp_path, *given)
    other = instantiate(given.data)
    other.configure_input(pair.data.input)
    labels = other.dataset("val").source.labels
    labels[0] = (labels[0] + 1) % 10
    with pytest.raises(ValueError, match=r"is another search's: data\.images\.val differs"):
        SearchFolder(folder, identity(given, other))


def test_times_are_measured_once_for_a_folder(networks, pair, tmp_path):
    cfg = config(tmp_path, *networks, "search.rounds=1")
    described(cfg, pair)
    content = (tmp_path / "times.json").read_bytes()
    measured = read_block_times(tmp_path / "times.json", *pair.names)
    assert min(*measured.local.values(), measured.output, *measured.host.values(), *measured.links.values()) > 0
    assert len(measured.links) == 3 * 2 + 2 * 3 + 3  # lout to hin, hout to lin, and skips
    described(cfg, pair)
    assert (tmp_path / "times.json").read_bytes() == content


def test_where_no_path_is_faster_the_local_network_is_kept(networks, times_file, tmp_path):
    result = search(config(tmp_path, *networks, f"search.times={times_file}", "search.local_share=0"))
    assert result.path is None
    assert result.reason.startswith("no path is above the local network's")
    assert records(tmp_path) == {}
    assert read_path_table(tmp_path / "paths.csv").accuracies == {}


def test_the_cost_of_2023_is_searched_whatever_the_throughput(networks, pair, times_file, tmp_path):
    cost = "search.cost={_target_: cleave.planning.PathCost, least_accuracy: 0.9}"
    problem, _ = described(config(tmp_path, *networks, f"search.times={times_file}", cost), pair)
    assert problem.candidates() == list(problem.paths)
    path = problem.candidates()[0]
    assert problem.worth(path, 0.8) == -PathCost(0.9)(problem.paths[path].load, 0.8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["search.strategy=best"], "search.strategy must be one of mended, printed, random, exhaustive, got 'best'"),
        (["search.strategy=random"], "search.count=None does not fit search.strategy=random"),
        (["search.count=3"], "search.count=3 does not fit search.strategy=mended"),
        (["links.path=[0,1,1,2]"], r"links.path=\[0, 1, 1, 2\] is what is searched"),
        (["links.host=none"], "links.host=none leaves the host out"),
        (["export=true"], "export=true are options of train.py"),
        (["train=false"], "train=false and export=true are options of train.py"),
        (["ckpt_path=x.ckpt"], "a search goes on by search.folder=DIR"),
    ],
)
def test_what_a_search_cannot_do_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(config(tmp_path, *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["search.lin=[4]"], "search.lin has 4, which is no local block; they are 0 to 3"),
        (["search.cross=false", "search.skips=false"], "no path is left to choose from"),
        (["search.local_share=2"], "search.local_share must be a share of 0 to 1"),
    ],
)
def test_limits_are_refused(given, message, tmp_path, networks, pair, times_file):
    with pytest.raises(ValueError, match=message):
        described(config(tmp_path, *networks, f"search.times={times_file}", *given), pair)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["host.ckpt_path=null"], "search.cross=true needs a host; give host.ckpt_path=FILE"),
        (["search.cross=false"], "host.ckpt_path=.* has no meaning with search.cross=false"),
        (["base.ckpt_path=null"], "the local network has random weights; give base.ckpt_path"),
        (["links.local_blocks=[layer9]"], "no layer 'layer9'"),
    ],
)
def test_networks_that_cannot_be_searched_are_refused(given, message, tmp_path, networks):
    with pytest.raises(ValueError, match=message):
        cut_pair(config(tmp_path, *networks, *given))


@pytest.mark.parametrize(("seconds", "message"), [(None, "local/layer2 is missing"), (-1, "local/layer2 is negative")])
def test_a_file_of_times_that_misses_a_block_or_has_a_negative_one_is_refused(
    tmp_path, networks, pair, seconds, message
):
    local = {**TIMES["local"], "layer2": seconds}
    values = {**TIMES, "local": {key: value for key, value in local.items() if value is not None}}
    (tmp_path / "times.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        described(config(tmp_path / "run", *networks, f"search.times={tmp_path}/times.json"), pair)
