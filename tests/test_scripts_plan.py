"""The plan of a network from config to table, and the commands that follow from it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cleave.architectures import CutError, trace_graph
from cleave.planning import layer_graph, read_profile, roofline
from cleave.planning.planners.problem import Problem
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.planning import problem as planning_problem
from cleave.scripts.assembly.planning.following import chosen_backbone, trainable_split
from cleave.scripts.assembly.starting.terminal import quiet, unwrapped
from cleave.scripts.plan import plan
from cleave.scripts.train import train

from .test_docs import commands_in
from .training_helpers import PLAIN, small

RESNET = ["backbone.name=resnet20", "num_classes=10", "image_size=16"]
SMALL = [each.replace("training_helpers", "tests.training_helpers") for each in small("PlainNet")[:2]]
SMALL += ["num_classes=10", "image_size=8"]
SLOW_LINK = ["link.up=0.5", "link.round_trip=0", "server.launch=0", "device.rate=1e9", "device.bandwidth=1e8"]


@pytest.fixture(scope="module", autouse=True)
def quietly() -> None:
    quiet()


def planned(tmp_path: Path, *overrides: str, network: Sequence[str] = SMALL):
    return plan(compose_config("plan", [*network, *overrides], tmp_path))


def test_all_planners_stand_in_one_table_and_are_written(tmp_path, capsys):
    chosen = ["rates=[1,100]", "options.bits=8", "options.image=jpeg_cifar10"]
    found = planned(tmp_path, *chosen, network=RESNET)
    text = capsys.readouterr().out
    names = ["local", "server", "neurosurgeon", "dads_light", "dads_heavy", "jps", "optimum (latency)"]
    assert set(names) <= set(found)
    assert all(name in text for name in names)
    assert "jpeg_cifar10: 1,790 bytes; features at 8 bits" in text
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["latency"] == found["optimum (latency)"].latency
    assert (written["network"], written["device"], len(written["digest"])) == ("resnet20", "Jetson Xavier NX", 64)
    rows = list(csv.DictReader((tmp_path / "rates.csv").read_text().splitlines()))
    assert {row["rate"] for row in rows} == {"1.0", "100.0"}
    assert {row["plan"] for row in rows} == set(found)
    assert {"gantt.png", "rates.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "tasks under optimum (latency)" in text
    planned(tmp_path, "rates=[4]", "link.up=4", "link.down=12")
    at_its_own, over_rates = (
        {row["plan"]: row["latency"] for row in csv.DictReader((tmp_path / name).read_text().splitlines())}
        for name in ("plans.csv", "rates.csv")
    )
    assert over_rates.items() <= at_its_own.items()  # the way back is as fast in the plot as in the table
    planned(tmp_path, "rates=[]")
    assert not (tmp_path / "rates.png").exists()  # nothing of the plan before


@pytest.mark.slow
def test_the_printed_training_command_runs(tmp_path, capsys):
    overrides = ["options.image=float32", "options.bits=4", "options.answer=0", *SLOW_LINK]
    found = planned(tmp_path / "plan", *overrides, network=RESNET)
    best = found["optimum (latency)"]
    assert best.tensors == 1
    assert best.sent[0].name != "input"
    (line,) = re.findall(r"Next: (python scripts/train\.py .*)", capsys.readouterr().out)
    ((script, *words),) = commands_in([line])
    assert script == "train"
    layer = next(word for word in words if word.startswith("split.at=")).removeprefix("split.at=")
    assert {"method=cross_entropy", "codec.bits=4", "data.image_size=16"} <= set(words)  # as it was planned
    short = [*PLAIN, "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "test=false"]
    run = [*words, *short, "backbone.in_channels=1", "+trainer.limit_val_batches=1"]
    train(compose_config("train", run, tmp_path / "run"))
    assert list((tmp_path / "run/checkpoints").glob("*.ckpt"))
    assert layer


def test_the_command_names_a_form_in_which_a_bottleneck_fits(tmp_path):
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8, "num_classes": 3}
    network = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes).eval()
    shape = (3, 32, 32)
    graph = layer_graph(trace_graph(network, torch.zeros(1, *shape)))
    settings = planning_problem.read_settings(compose_config("plan", [], tmp_path))
    profiles = roofline(graph.nodes, settings.device), roofline(graph.nodes, settings.server)
    planned = planning_problem.Planned(network, graph, *profiles)
    problem = Problem(graph, profiles[0], settings.link, profiles[1], settings.options)
    layers = {node.name: node.layer for node in graph.nodes.nodes}
    for wanted, form in (("conv_proj", "replace"), ("encoder.layers.encoder_layer_0", "insert")):
        members = next(m for m in graph.single_cuts().T if layers[graph.sent(m)[0].name] == wanted)
        best = problem.plan(members, "any", "", exact=False)
        assert trainable_split(settings, planned, best, shape) == (wanted, form)


def test_the_network_is_chosen_again_by_the_words_that_chose_it(tmp_path, monkeypatch):
    cfg = compose_config("plan", SMALL, tmp_path)
    assert chosen_backbone(cfg) == "backbone=custom backbone.network._target_=tests.training_helpers.PlainNet"
    assert chosen_backbone(compose_config("plan", RESNET, tmp_path)) == "backbone=cifar backbone.name=resnet20"
    words = ["backbone=timm", "link.up=3", "backbone.in_channels=1", "+backbone.kwargs={drop_path_rate: 0.1}"]
    config = SimpleNamespace(overrides=SimpleNamespace(task=words))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: config)
    assert shlex.split(chosen_backbone(cfg)) == [words[0], *words[2:]]


def test_where_nothing_is_cut_the_whole_network_is_trained_and_exported(tmp_path, capsys):
    for link, where in (("link.up=0.001", "on the device"), ("link.up=100000", "on the server")):
        planned(tmp_path, link, "link.round_trip=0", "rates=[]", *SLOW_LINK[2:])
        text = capsys.readouterr().out
        assert f"The whole network runs {where}" in text
        commands = [shlex.split(line) for line in re.findall(r"Next: (.*)", text)]
        assert [words[1] for words in commands] == ["scripts/train.py", "scripts/export.py"]


@pytest.mark.slow
def test_trained_networks_stand_in_the_same_table(tmp_path, capsys):
    quick = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1"]
    quick += [*PLAIN, "data.image_size=16", "data.batch_size=8", "backbone.in_channels=1", "backbone.name=resnet20"]
    split = ["method=cross_entropy", "split.at=layer2", "bottleneck.channels=4", "codec.bits=4", "export=true"]
    run = tmp_path / "run"
    train(compose_config("train", [*quick, *split, "+trainer.limit_test_batches=1"], run))
    exits = ["method=exits_joint", "exits.at=[layer1]", "split.at=layer2", "split.form=insert", "export=true"]
    exits += ["exits.policy.thresholds=0.1", "+trainer.limit_test_batches=1"]
    train(compose_config("train", [*quick, *exits], tmp_path / "exits"))
    file = run / "checkpoints/best.ckpt"
    leaving = tmp_path / "exits"
    sources = [file, run / "results.json", run / "bundle", leaving / "checkpoints/best.ckpt", leaving / "bundle"]
    candidates = f"candidates=[{','.join(map(str, sources))}]"
    found = planned(tmp_path / "plan", "backbone.in_channels=1", candidates, "rates=[]", network=RESNET)
    trained = {name: one for name, one in found.items() if name.startswith("trained")}
    assert len(trained) == 5
    assert any(name.startswith("trained (bundle run/bundle") for name in trained)
    checkpoint, results, bundle, to_the_end, early = trained.values()
    (point,) = json.loads((run / "results.json").read_text())["points"]
    assert checkpoint.bytes == results.bytes == bundle.bytes == pytest.approx(point["payload_bytes"])
    assert results.accuracy == bundle.accuracy == point["accuracy"]
    assert checkpoint.stages.device == pytest.approx(results.stages.device) == pytest.approx(bundle.stages.device)
    assert checkpoint.stages.server == pytest.approx(bundle.stages.server)
    assert results.stages.server > bundle.stages.server  # of the server a file of results says nothing
    assert "at most as long as the whole network" in results.why
    assert "100% leave at layer1" in early.why
    assert (early.bytes, early.stages.server, early.delay) == (0, 0, 0)
    assert early.stages.device < to_the_end.stages.device
    assert to_the_end.bytes > 0
    text = capsys.readouterr().out
    assert "a checkpoint does not know who leaves at its exits" in text
    assert text.count("│ trained (") == 5
    others = f"candidates=[{file},{run / 'results.json'},{run / 'bundle'}]"
    found = planned(tmp_path / "other", others, "rates=[]")
    assert not [name for name in found if name.startswith("trained")]
    assert capsys.readouterr().out.count(" left out,") == 3


@pytest.mark.slow
def test_times_are_measured_here_written_and_read_again(tmp_path, capsys):
    found = planned(tmp_path, "device_profile=here", "rates=[]")
    assert "node by node" in capsys.readouterr().out
    file = tmp_path / "device_profile.json"
    profile = read_profile(file)
    assert (profile.how, profile.batch) == ("measured", 1)
    assert found["local"].stages.device == pytest.approx(profile.total)
    again = planned(tmp_path, f"device_profile={file}", "rates=[]")
    assert again["local"].stages.device == found["local"].stages.device
    with pytest.raises(ValueError, match="another network or input size.*other sizes"):
        planned(tmp_path, "image_size=12", f"server_profile={file}")


def unwrapping(tmp_path: Path, *overrides: str) -> None:
    """Plan, and raise what a user is told."""
    try:
        planned(tmp_path, *overrides)
    except Exception as error:
        raise unwrapped(error) from None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["device.rate=null"], "device.rate of Jetson Xavier NX is missing: set device.rate, or give device_profile"),
        (["server.bandwidth=null"], "server.bandwidth of RTX A6000 is missing"),
        (["device.rate=0"], "device.rate of Jetson Xavier NX must be above 0"),
        (["device.power.send=-1"], "device.power.send must be at least 0, watts; got -1"),
        (["link.up=0"], "link.up of the link must be above 0"),
        (["link.up=-2"], "link.up of the link must be above 0"),
        (["link.up=null"], "link.up of the link is missing"),
        (["link.up=nan"], "link.up of the link must be above 0"),
        (["link.up=true"], "link.up of the link must be above 0"),
        (["options.exact=maybe"], "options.exact must be true or false"),
        (["rates=5"], "rates must be a list; write rates=[5]; got 5"),
        (["device=null"], "device must be a group of settings"),
        (["options=null"], "options must be a group of settings"),
        (["device_profile=5"], "device_profile must be the JSON file of a profile, here, or null; got 5"),
        (["candidates=5"], "write candidates=[5]"),
        (["num_classes=0"], "num_classes must be a whole number of at least 1"),
        (["image_size=0"], "image_size must be a whole number of at least 1"),
        (["depth=-1"], "depth must be a whole number of at least 0"),
        (["link.trace=FOLDER/none.csv", "link.up=null"], "none.csv"),
        (["rates=[1,0]"], "rates must be above 0"),
        (["device_profile=none.json"], "device_profile=none.json does not exist"),
        (["options.bits=40"], "options.bits must be"),
        (["options.objective=speed"], "options.objective must be one of"),
        (["options.image=jpg"], "options.image must be a number of bytes or one of"),
        (["options.objective=energy", "device.power=null"], "options.objective=energy needs the watts of the device"),
        (["link=trace", "link.trace=FOLDER/short.csv", "every=1.0"], "link.trace ends at 5 s, before the stream"),
        (["candidates=[none]"], "there is no none"),
        (["tasks=0"], "tasks must be a whole number"),
        (["every=-1"], "every must be at least 0"),
    ],
)
def test_mistakes_are_told_before_the_network_is_built(tmp_path, monkeypatch, overrides, words):
    monkeypatch.setattr(planning_problem, "build_backbone", lambda *_: pytest.fail("the network was built"))
    (tmp_path / "short.csv").write_text("0,8\n5,8\n")
    given = [each.replace("FOLDER", str(tmp_path)) for each in overrides]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        unwrapping(tmp_path, *given)


def test_a_graph_above_the_limit_is_refused_where_the_optimum_must_be_exact(tmp_path):
    with pytest.raises(ValueError, match="exact=true asks for every one"):
        planned(tmp_path, "options.limit=3", "options.exact=true", "rates=[]")
    found = planned(tmp_path, "options.limit=3", "rates=[]")
    assert not found["optimum (throughput)"].exact
    assert "may not be optimal" in found["optimum (throughput)"].why


class Branching(torch.nn.Module):
    """A forward that looks at its values, which nothing can trace."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3))
        return self.one(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_opened_says_that_it_has_no_cut_point_or_becomes_their_chain(monkeypatch, capsys):
    sample = torch.rand(2, 3, 8, 8)
    with pytest.raises(CutError, match="no cut point either"):
        planning_problem.open_network(Branching(4), sample, None)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    network = torch.nn.Sequential(*layers)

    def refuse(*_):
        raise CutError("it is closed.")

    monkeypatch.setattr(planning_problem, "trace_graph", refuse)
    graph = planning_problem.open_network(network.eval(), sample, None)
    assert [node.name for node in graph.nodes][-1] == "final"
    assert sum(node.macs for node in graph.nodes) == 4 * 36 * 27 + 144 * 5
    assert "cut points are planned, as a chain" in capsys.readouterr().out


def test_every_preset_is_built(tmp_path):
    conf = Path(__file__).parent.parent / "conf"
    (tmp_path / "trace.csv").write_text("0,5\n10,0\n")
    for file in (conf / "machine").glob("*.yaml"):
        given = [f"machine@device={file.stem}", f"machine@server={file.stem}"]
        settings = planning_problem.read_settings(compose_config("plan", given, tmp_path))
        assert settings.device.rate == settings.server.rate
        text = file.read_text()
        assert all(
            "#" in line for line in text.splitlines() if re.match(r"\s*(rate|bandwidth|launch|idle|efficiency):", line)
        )
    for file in (conf / "link").glob("*.yaml"):
        more = [f"link.trace={tmp_path}/trace.csv"] if file.stem == "trace" else []
        settings = planning_problem.read_settings(compose_config("plan", [f"link={file.stem}", *more], tmp_path))
        assert settings.link.up
    assert OmegaConf.is_config(compose_config("plan", [], tmp_path))
