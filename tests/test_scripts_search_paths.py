"""The search for a path from config to table, on digits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules.signals import Stopped
from cleave.planning import PathCost, SearchFolder, path_name, read_block_times
from cleave.reports.paths.tables import read_path_table
from cleave.scripts import search_paths as search_script
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.given.resumed import overrides, run_of_another
from cleave.scripts.assembly.given.value_types import check_values
from cleave.scripts.assembly.identity import identity
from cleave.scripts.assembly.idle import idle_of_search, say_what_is_idle
from cleave.scripts.assembly.linking.pairs import cut_pair
from cleave.scripts.assembly.linking.searching import check
from cleave.scripts.assembly.networks import link_builder
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import CONF, quiet
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
def pair(composed):
    return cut_pair(composed)


@pytest.fixture(scope="module")
def times_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("times") / "times.json"
    file.write_text(json.dumps(TIMES))
    return file


def config(folder: Path, *given: str):
    quiet()
    return compose_config("search_paths", [*DIGITS, *QUIET, *SHORT, *given], folder)


@pytest.fixture(scope="module")
def composed(networks, times_file, tmp_path_factory):
    """A search's config; each test changes a copy, as composing takes half a second."""
    return config(tmp_path_factory.mktemp("composed"), *networks, f"search.times={times_file}")


def changed(cfg, folder: Path, *given: str):
    found = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(given)))
    found.paths.output_dir = str(folder)
    return found


def records(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "paths").glob("*.json"))}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, networks, times_file):
    """A search of two paths of four: its folder, its config and its result."""
    folder = tmp_path_factory.mktemp("search")
    given = [*networks, f"search.times={times_file}", "search.lout=[0]", "search.hin=[1]", "search.lin=[2,3]"]
    given += ["search.algorithm.start=1", "search.algorithm.most=2", "experiment=links"]
    given += ["search.reward.accuracy.slope=0.01"]  # the faster path is the better one, however little it was trained
    cfg = config(folder, *given, "logger=csv_wandb", "logger.wandb.mode=offline")
    return folder, cfg, search(cfg)


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


def test_the_same_search_goes_on_in_its_folder_and_trains_only_what_is_missing(searched, tmp_path, capsys):
    folder, cfg, result = searched
    again, last = tmp_path / "again", path_name(result.trained[-1].path)
    shutil.copytree(folder, again)
    before = {file: file.stat().st_mtime_ns for file in again.glob("runs/*/checkpoints/best.ckpt")}
    (again / f"paths/{last}.json").unlink()
    (again / f"runs/{last}/checkpoints/best.ckpt").write_text("half written")
    assert search(changed(cfg, tmp_path / "run", f"search.folder={again}", "logger=null")) == result
    assert records(again).keys() == records(folder).keys()
    trained = {file.parent.parent.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert trained == {last}
    printed = capsys.readouterr().out
    assert re.search(rf"^Path {re.escape(str(result.trained[0].path))}: .* from its record$", printed, re.MULTILINE)
    assert re.search(rf"^Path {re.escape(str(result.trained[1].path))}: .* in \d+ seconds$", printed, re.MULTILINE)
    best = f"{again}/runs/{path_name(result.path)}/checkpoints/best.ckpt"
    assert re.findall(r"^Next: (.*)$", printed, re.MULTILINE) == [
        f"python scripts/{name}.py ckpt_path={best}" for name in ("evaluate", "export")
    ]
    assert f"Written: {again}/paths.csv\n" in printed
    assert "Results of" not in printed  # of a single path's training
    assert "Blocks, host: 0 features.2, 1 features.5" in printed


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
    folder, cfg, _ = searched
    (tmp_path / "other.ckpt").write_text("another network")
    cfg = changed(cfg, tmp_path, other.replace("OTHER", f"{tmp_path}/other.ckpt"))
    with pytest.raises(ValueError, match=rf"{folder.name} is another search's: {named}"):
        SearchFolder(folder, identity(cfg, pair.data, ["search"]))


def test_what_changes_no_accuracy_is_the_same_search(searched, pair, tmp_path):
    folder, cfg, _ = searched
    others = ["search.strategy=exhaustive", "search.lin=null", "data.num_workers=1", "logger=null"]
    SearchFolder(folder, identity(changed(cfg, tmp_path, *others), pair.data, ["search"]))


def test_other_images_are_another_search(searched, pair, tmp_path):
    folder, cfg, _ = searched
    other = instantiate(cfg.data)
    other.configure_input(pair.data.input)
    labels = other.dataset("val").source.labels
    labels[0] = (labels[0] + 1) % 10
    with pytest.raises(ValueError, match=r"is another search's: data\.images\.val differs"):
        SearchFolder(folder, identity(cfg, other, ["search"]))


def test_times_are_measured_once_for_a_folder(composed, pair, tmp_path):
    cfg = changed(composed, tmp_path, "search.times=null", "search.rounds=1")
    described(cfg, pair)
    content = (tmp_path / "times.json").read_bytes()
    measured = read_block_times(tmp_path / "times.json", *pair.names)
    assert min(*measured.local.values(), measured.output, *measured.host.values(), *measured.links.values()) > 0
    assert len(measured.links) == 3 * 2 + 2 * 3 + 3  # lout to hin, hout to lin, and skips
    described(cfg, pair)
    assert (tmp_path / "times.json").read_bytes() == content


def test_what_a_search_did_not_need_before_is_measured_when_it_goes_on(composed, pair, tmp_path, capsys):
    given = ["search.times=null", "search.rounds=1"]
    described(changed(composed, tmp_path, *given, "search.lin=[3]", "search.cross=false", "search.lout=[0]"), pair)
    before = read_block_times(tmp_path / "times.json", *pair.names)
    assert list(before.links) == ["local/conv1 -> local/layer3"]
    described(changed(composed, tmp_path, *given, "search.lin=[3]"), pair)
    after = read_block_times(tmp_path / "times.json", *pair.names)
    assert before.local == after.local
    assert before.links.items() < after.links.items()
    assert f"Times: {tmp_path}/times.json; delete it to measure them anew" in capsys.readouterr().out


def test_where_no_path_is_faster_the_local_network_is_kept(composed, tmp_path):
    result = search(changed(composed, tmp_path, "search.local_share=0"))
    assert result.path is None
    assert result.reason.startswith("no path is above the local network's")
    assert records(tmp_path) == {}
    assert read_path_table(tmp_path / "paths.csv").accuracies == {}


def test_the_cost_of_2023_is_searched_whatever_the_throughput(composed, pair, tmp_path):
    cost = "search.cost={_target_: cleave.planning.PathCost, least_accuracy: 0.9}"
    problem, _ = described(changed(composed, tmp_path, cost), pair)
    assert problem.candidates() == list(problem.paths)
    path = problem.candidates()[0]
    assert problem.worth(path, 0.8) == -PathCost(0.9)(problem.paths[path].load, 0.8)


def test_a_cost_counts_what_crosses_at_the_speed_of_the_wire(composed, pair, tmp_path):
    cost = "search.cost={_target_: cleave.planning.PathCost, least_accuracy: 0.9}"
    given = [cost, "search.bytes_per_second=1000", "search.lin=[2]"]
    problem, _ = described(changed(composed, tmp_path, *given), pair)
    up, down = 4 * 16 * 8 * 8 + ENVELOPE_BYTES, 4 * 16 * 8 * 8 + ENVELOPE_BYTES
    loads = {path: option.load for path, option in problem.paths.items()}
    assert loads[0, 1, 1, 2].communication_seconds == pytest.approx((up + down) / 1000)
    assert loads[0, None, None, 2].communication_seconds == 0


def test_what_stops_a_search_says_how_it_goes_on(composed, tmp_path, monkeypatch):
    def stop(cfg):
        raise Stopped(15)

    monkeypatch.setattr(search_script, "search", stop)
    with pytest.raises(Stopped) as stopped:
        search_script.main(changed(composed, tmp_path / "run", f"search.folder={tmp_path}"))
    assert stopped.value.in_words().splitlines()[1:] == [
        f"Paths that were trained are kept in {tmp_path}",
        f"Go on: python scripts/search_paths.py search.folder={tmp_path}",
    ]


def test_the_run_of_a_path_is_resumed_by_train_py_without_what_is_the_searchs_own(tmp_path):
    given = ["search.lout=[0]", "method.distillation=null", "links.path=null"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("search_paths", given, return_hydra_config=True)
    try:
        HydraConfig.instance().set_config(cfg)
        with run_of_another(["search"], {"links.path": [0, None, None, 2]}):
            assert overrides() == ["method.distillation=null", "links.path=[0,null,null,2]"]
        assert overrides() == given
    finally:
        HydraConfig.instance().cfg = None


def test_settings_of_training_have_their_types_here_too(composed, tmp_path):
    with pytest.raises(TypeError, match="export must be true or false, got 'maybe'"):
        check_values(changed(composed, tmp_path, "export=maybe"), CONF)


def test_without_scikit_learn_it_is_said_before_anything_is_trained(composed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for strategy in ("mended", "printed"):
        with pytest.raises(ValueError, match=f"search.strategy={strategy} predicts .* pip install scikit-learn"):
            check(changed(composed, tmp_path, f"search.strategy={strategy}"))
    check(changed(composed, tmp_path, "search.strategy=exhaustive"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["search.strategy=random", "search.count=3", "search.algorithm.seed=7"], []),
        (["search.strategy=random", "search.count=3", "search.algorithm.start=4"], ["search.algorithm.start=4"]),
        (
            ["search.strategy=exhaustive", "search.algorithm.seed=7", "search.algorithm.most=5"],
            ["search.algorithm.most=5", "search.algorithm.seed=7"],
        ),
        (["search.algorithm.start=4"], []),
        (
            ["+search.cost._target_=cleave.planning.PathCost", "search.reward.accuracy.middle=0.5"],
            ["search.reward.accuracy.middle=0.5"],
        ),
    ],
)
def test_settings_that_a_search_does_not_use_are_said(given, named, composed, tmp_path, capsys):
    cfg = changed(composed, tmp_path, *(each.removeprefix("+") for each in given))
    assert [key for keys, _ in idle_of_search(cfg) for key in keys] == named
    say_what_is_idle(cfg, idle_of_search)
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}" in said for name in named)
    assert ("no effect" in said) == bool(named)


def test_a_search_is_not_started_once_for_each_device(composed, tmp_path):
    with pytest.raises(ValueError, match="trainer.devices=2 would start the search once for each device"):
        search(changed(composed, tmp_path, "trainer.devices=2"))


def test_a_file_is_no_folder_of_a_search(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"folder={tmp_path}/file is a file"):
        SearchFolder(tmp_path / "file", {})


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
        (["split.at=local/conv1"], "split.at=local/conv1 is of one path"),
        (["exits.count=2"], "exits.count=2 is of one path"),
        (["callbacks.checkpoint=null"], "callbacks.checkpoint=null keeps no weights"),
        (["search.rounds=0"], "search.rounds must be a whole number of at least 1, got 0"),
        (["search.strategy=random", "search.count=0"], "search.count must be a whole number of at least 1, got 0"),
        (["search.algorithm.start=0"], "search.algorithm.start must be a whole number of at least 1, got 0"),
        (["search.reward.accuracy.slope=0"], r"search\.reward\.accuracy\.slope must be a number above 0, got 0"),
        (
            ["search.cost={_target_: cleave.planning.PathCost, least_accuracy: 86}"],
            "search.cost.least_accuracy must be",
        ),
        (["search.bytes_per_second=1000"], "search.bytes_per_second=1000 would change nothing"),
        (["search.device=cdua"], "search.device=cdua cannot be used"),
    ],
)
def test_what_a_search_cannot_do_is_refused(given, message, tmp_path, composed):
    with pytest.raises(ValueError, match=message):
        check(changed(composed, tmp_path, *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["search.lin=[4]"], "search.lin has 4, which is no local block; they are 0 to 3"),
        (["search.cross=false", "search.skips=false"], "no path is left to choose from"),
        (["search.local_share=2"], "search.local_share must be a share of 0 to 1"),
    ],
)
def test_limits_are_refused(given, message, tmp_path, composed, pair):
    with pytest.raises(ValueError, match=message):
        described(changed(composed, tmp_path, *given), pair)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["host.ckpt_path=null"], "search.cross=true needs a host; give host.ckpt_path=FILE"),
        (["search.cross=false"], "host.ckpt_path=.* has no meaning with search.cross=false"),
        (["base.ckpt_path=null"], "the local network has random weights; give base.ckpt_path"),
        (["links.local_blocks=[layer9]"], "no layer 'layer9'"),
    ],
)
def test_networks_that_cannot_be_searched_are_refused(given, message, tmp_path, composed):
    with pytest.raises(ValueError, match=message):
        cut_pair(changed(composed, tmp_path, *given))


def test_a_link_that_cannot_be_is_named_before_anything_is_measured(composed, pair, tmp_path):
    cfg = changed(composed, tmp_path, "links.style=thin", "search.times=null")
    with pytest.raises(ValueError, match="links.style must be one of full, reduced"):
        described(cfg, pair._replace(links=link_builder(cfg)))
    assert not list(tmp_path.iterdir())


def test_one_network_is_not_both(composed, tmp_path):
    with pytest.raises(ValueError, match=r"host.ckpt_path=.* and base.ckpt_path are one network"):
        cut_pair(changed(composed, tmp_path, f"host.ckpt_path={composed.base.ckpt_path}"))


@pytest.mark.parametrize(("seconds", "message"), [(None, "local/layer2 is missing"), (-1, "local/layer2 is negative")])
def test_a_file_of_times_that_misses_a_block_or_has_a_negative_one_is_refused(
    tmp_path, composed, pair, seconds, message
):
    local = {**TIMES["local"], "layer2": seconds}
    values = {**TIMES, "local": {key: value for key, value in local.items() if value is not None}}
    (tmp_path / "times.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        described(changed(composed, tmp_path / "run", f"search.times={tmp_path}/times.json"), pair)
