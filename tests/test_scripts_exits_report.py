"""exits_report as a person runs it: its figures against loops over stored logits, and what it writes and refuses."""

import csv
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cleave.reports.exits.measure
import cleave.reports.exits.points
import cleave.reports.exits.timing
import cleave.scripts.exits_report
from cleave.deployment import build_policy, offline, policy_from_dict, read_policy
from cleave.losses import fit_geometric_ensemble
from cleave.reports.exits.place import place, stage_and_head_macs
from cleave.reports.exits.timing import exit_seconds, wall_clock
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.exits_report import PLOTS, exits_report
from cleave.scripts.train import train

from .offline_run import offline_runs

BRIEF = ["timing.batches=2", "timing.batch_size=32", "timing.limit=3", "curve=15"]
KINDS = ["confidence", "entropy", "margin", "patience", "ensemble"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("exits")
    overrides = ["method=exits_joint", "exits.count=2", "data=digits", "data.image_size=8", "backbone.in_channels=1"]
    overrides += ["trainer=cpu", "trainer.max_epochs=1", "+trainer.enable_progress_bar=false", "test=false"]
    overrides += ["callbacks.progress=null", "logger=none", "training.optimizer.lr=0.01"]
    train(compose_config("train", overrides, folder))
    return folder / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def network(checkpoint):
    return restore(checkpoint).network


@pytest.fixture(scope="module")
def stored(checkpoint, network):
    """Images, labels and every exit's logits in float64, of val and of test."""
    data = restore_data(restore(checkpoint), compose_config("exits_report", ["ckpt_path=x"], checkpoint.parent).data)
    found = {}
    for split in ("val", "test"):
        batch = data.sample_batch(split, 10**6)
        images, names = data.input.normalize(batch["images"]), network.group("exits")
        with torch.no_grad():
            logits = network.outputs(images, names)
        found[split] = images, batch["labels"].numpy(), torch.stack([logits[n] for n in names]).double().numpy()
    return found


def run(checkpoint, folder, *overrides, pictures=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleave.scripts.exits_report, "PLOTS", dict(pictures))
        return exits_report(compose_config("exits_report", [f"ckpt_path={checkpoint}", *BRIEF, *overrides], folder))


@pytest.fixture(scope="module")
def reported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{kind}_DIR", str(folder / "own"))
        overrides = ["logger=csv_wandb", "logger.wandb.mode=offline", "placement.exits=1", "placement.budget=0.9"]
        overrides += ["choose.budget=0.7", "shared=false", "choose.shared=true"]
        files = run(checkpoint, folder, *overrides, pictures=PLOTS)
    return json.loads(files["exits_report.json"].read_text()), files


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def leaves(kind, thresholds, logits):
    """Where one sample leaves, from its logits (E, C), and what is answered there: loops, no policy of ours."""
    said, repeated, p = [], 0, softmax(logits)
    for exit in range(len(logits)):
        mean = np.exp(np.log(p[: exit + 1]).mean(0))
        said.append(int((mean if kind == "ensemble" else p[exit]).argmax()))
        repeated = repeated + 1 if exit and said[-1] == said[-2] else 0
        if exit == len(logits) - 1:
            break
        ordered = np.sort(p[exit])
        score = {
            "confidence": ordered[-1],
            "entropy": -(p[exit] * np.log(p[exit])).sum() / math.log(len(ordered)),
            "margin": ordered[-1] - ordered[-2],
            "patience": repeated,
            "ensemble": (mean / mean.sum()).max(),
        }[kind]
        t = thresholds[exit]
        if t is not None and (score <= t if kind == "entropy" else score >= t):
            break
    return exit, said[-1]


def by_hand(kind, thresholds, costs, labels, logits):
    """Accuracy, mean cost and shares of a policy on stored logits (E, B, C)."""
    left, said = zip(*(leaves(kind, thresholds, logits[:, i]) for i in range(len(labels))), strict=True)
    shares = [left.count(exit) / len(labels) for exit in range(len(logits))]
    return (np.array(said) == labels).mean(), np.mean([costs[exit] for exit in left]), shares


def costs_of(network, kind):
    own = [(exit + 1) * 10 if kind == "ensemble" else 0 for exit in range(3)]
    stages, heads = stage_and_head_macs(network)
    walked = np.cumsum(stages) + np.cumsum([*heads, 0])
    return ((walked + np.cumsum(own)) / network.backbone_macs).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_is_what_a_loop_over_the_samples_finds(reported, network, stored, kind):
    figures = reported[0]["policies"][kind]
    costs = costs_of(network, kind)
    kept = [point for point in figures["points"] if point["accuracy"] is not None]
    for point in [*kept, figures["best"]]:
        for split, prefix in (("val", "val_"), ("test", "")):
            accuracy, cost, shares = by_hand(kind, point["thresholds"], costs, *stored[split][1:])
            # The samples at a threshold decide by its last bit on val, where it is one's own score.
            slack = 1.1 / len(stored[split][1]) if split == "val" else 1e-9
            assert (point[f"{prefix}accuracy"], point[f"{prefix}cost"]) == pytest.approx((accuracy, cost), abs=slack)
        assert point["shares"] == pytest.approx(shares)
    assert all(point["val_cost"] <= point["budget"] + 1e-9 for point in kept)
    assert figures["best"]["val_accuracy"] >= max(point["val_accuracy"] for point in kept)
    assert [point["budget"] for point in figures["points"]] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_below_the_least_is_null_and_the_least_is_told(reported, network, stored, kind):
    figures = reported[0]["policies"][kind]
    easiest = {"entropy": 1.0, "patience": 1}.get(kind, 0.0)
    least = by_hand(kind, [easiest] * 2, costs_of(network, kind), *stored["val"][1:])[1]
    assert figures["least"] == pytest.approx(least)
    assert [point["budget"] for point in figures["points"] if point["accuracy"] is None] == [
        budget for budget in (0.25, 0.5, 0.75, 1.0) if budget < least
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_curve_runs_from_leaving_first_to_leaving_last(reported, network, stored, kind):
    figures = reported[0]["policies"][kind]
    costs = np.array(costs_of(network, kind))
    curve, shares = np.array(figures["curve"]), np.array(figures["curve_shares"])
    assert shares.sum(1) == pytest.approx(np.ones(len(curve)))
    assert shares @ costs == pytest.approx(curve[:, 0])
    assert (np.diff(curve[:, 0]) >= 0).all()
    assert curve[-1] == pytest.approx(figures["anytime"][-1])
    labels, logits = stored["test"][1:]
    for exit, (cost, accuracy) in enumerate(figures["anytime"]):
        stopped = [None] * exit + [{"entropy": 1.0}.get(kind, 0.0)] * (2 - exit)
        if kind != "patience":
            assert accuracy == pytest.approx(by_hand(kind, stopped, costs, labels, logits)[0])
        assert cost == pytest.approx(costs[exit])
    assert len(curve) == 15 if kind != "patience" else len(curve) == 2


def test_each_exit_alone_is_what_numpy_makes_of_its_logits(reported, network, stored):
    report, _ = reported
    labels, logits = stored["test"][1:]
    right = logits.argmax(2) == labels
    assert [exit["name"] for exit in report["exits"]] == list(network.exits)
    assert [exit["accuracy"] for exit in report["exits"]] == pytest.approx(right.mean(1).tolist())
    assert [exit["cost"] for exit in report["exits"]] == pytest.approx(costs_of(network, "confidence"))
    assert [exit["macs"] for exit in report["exits"]] == network.exit_costs()
    for exit, found in enumerate(report["exits"]):
        for key, temperature in (("ece", 1.0), ("ece_scaled", found["temperature"])):
            confidence = softmax(logits[exit] / temperature).max(1)
            bins = np.ceil(confidence * 15)
            gaps = [abs((right[exit] - confidence)[bins == b].sum()) for b in range(16)]
            assert found[key] == pytest.approx(sum(gaps) / len(labels), abs=1e-5)
    early = right[:-1].any(0)
    assert report["overthinking"] == pytest.approx((early & ~right[-1]).mean())
    assert report["oracle"]["accuracy"] == pytest.approx((early | right[-1]).mean())
    first = np.where(right[0], 0, np.where(right[1], 1, 2))
    assert report["oracle"]["cost"] == pytest.approx(np.array(costs_of(network, "confidence"))[first].mean())
    stages, _ = stage_and_head_macs(network)
    assert sum(stages) == network.backbone_macs == report["backbone_macs"]
    assert report["last_exit"] == {"accuracy": pytest.approx(right[-1].mean()), "cost": 1.0}


def test_the_policy_that_is_written_runs_to_the_accuracy_that_is_reported(reported, network, stored):
    report, files = reported
    policy = policy_from_dict(json.loads(files["exit_policy.json"].read_text()))
    assert policy == read_policy(files["exit_policy.json"])
    chosen = report["chosen"]
    assert (chosen["kind"], chosen["scheme"], chosen["budget"], chosen["drop"]) == ("confidence", "shared", 0.7, None)
    assert list(policy.thresholds) == chosen["thresholds"]
    with torch.no_grad():
        left = network.run(stored["test"][0], policy)
    assert (left.logits.argmax(1).numpy() == stored["test"][1]).mean() == pytest.approx(chosen["accuracy"])
    assert [(left.index == exit).double().mean().item() for exit in range(3)] == pytest.approx(chosen["shares"])


def test_an_exit_to_keep_is_predicted_without_the_other_heads(reported, network, stored):
    found = reported[0]["placement"]
    (name,) = found["exits"]
    kept = list(network.exits).index(name)
    stages, heads = stage_and_head_macs(network)
    costs = np.array([sum(stages[: kept + 1]), sum(stages)]) + heads[kept]
    for split, prefix, slack in (("val", "val_", 1.1 / len(stored["val"][1])), ("test", "", 1e-9)):
        _, labels, logits = stored[split]
        accuracy, cost, _ = by_hand("confidence", found["thresholds"], costs, labels, logits[[kept, 2]])
        values = found[f"{prefix}accuracy"], found[f"{prefix}cost"]
        assert values == pytest.approx((accuracy, cost / network.backbone_macs), abs=slack)
    assert found["val_cost"] <= 0.9
    assert found["exact"] is True


def test_a_cascade_has_no_exits_that_stand_alone():
    with pytest.raises(ValueError, match="placement needs exits that stand alone.*cascade=false"):
        place(SimpleNamespace(network=SimpleNamespace(cascade=True)), {"exits": 1, "budget": 1.0})


def test_the_table_of_points_is_that_of_the_report(reported, network):
    report, files = reported
    with files["exits_report.csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["point"] for row in rows} == {"budget", "best", "curve"}
    of_curves = [row for row in rows if row["point"] == "curve"]
    curves = [
        (kind, *point)
        for kind, figures in report["policies"].items()
        for point in zip(figures["curve"], figures["curve_shares"], figures["curve_thresholds"], strict=True)
    ]
    for row, (kind, (cost, accuracy), shares, thresholds) in zip(of_curves, curves, strict=True):
        found = [row["policy"], row["cost"], row["accuracy"], row[f"share/{network.exits[0]}"]]
        assert found == [kind, repr(cost), repr(accuracy), repr(shares[0])]
        assert row[f"threshold/{network.exits[0]}"] == ("" if thresholds[0] is None else repr(thresholds[0]))
    points = [p for figures in report["policies"].values() for p in [*figures["points"], figures["best"]]]
    for row, point in zip((row for row in rows if row["point"] != "curve"), points, strict=True):
        assert row["accuracy"] == ("" if point["accuracy"] is None else repr(point["accuracy"]))
        for exit, name in enumerate(network.exits):
            assert row[f"share/{name}"] == ("" if point["shares"] is None else repr(point["shares"][exit]))


def test_pictures_are_drawn_and_w_and_b_gets_everything(reported):
    report, files = reported
    (tracked,) = offline_runs(files["exits_report.json"].parent)
    assert (tracked.exit_codes, tracked.run.job_type) == ([0], "exits_report")
    best = report["policies"]["margin"]["best"]["accuracy"]
    assert tracked.summary["best_accuracy/margin"] == pytest.approx(best)
    for name in ("exits_accuracy", "exits_shares", "exits_alone"):
        content = files[f"{name}.png"].read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(2**20)) > 5
        (media,) = tracked.series(name)
        assert (tracked.folder / "files" / media["filenames"][0]).read_bytes() == content
    for name in ("exits_report.json", "exits_report.csv", "exit_policy.json"):
        assert tracked.artifacts[name].type == "report"
    assert len(tracked.series("points")) == 1


def test_costs_of_ones_own_temperatures_and_falling_shares(checkpoint, network, stored, tmp_path):
    overrides = ["policies=margin", "costs=[1,3,4]", "scheme=budgeted_batch", "temperatures=true", "budgets=[0.5]"]
    files = run(checkpoint, tmp_path, *overrides, "choose.policy=patience", "choose.drop=1", "timing.limit=0")
    report = json.loads(files["exits_report.json"].read_text())
    (point,) = report["policies"]["margin"]["points"]
    scaled = stored["test"][2] / np.array(report["temperatures"]).reshape(3, 1, 1)
    accuracy, cost, shares = by_hand("margin", point["thresholds"], [0.25, 0.75, 1.0], stored["test"][1], scaled)
    assert (point["accuracy"], point["cost"]) == pytest.approx((accuracy, cost))
    assert (point["shares"], point["scheme"]) == (pytest.approx(shares), "budgeted_batch")
    assert point["val_cost"] == pytest.approx(0.5, abs=2.1 / len(stored["val"][1]))
    assert report["temperatures"] == [exit["temperature"] for exit in report["exits"]]
    assert (report["costs"]["unit"], report["chosen"]["thresholds"], report["chosen"]["drop"]) == ("given", [1, 1], 1)
    assert read_policy(files["exit_policy.json"]).temperatures == tuple(report["temperatures"])
    assert report["seconds"]["single"] is None


class Clock:
    """Time that passes by what each call is given, in its turn."""

    def __init__(self, spent):
        self.spent, self.now, self.calls = iter(spent), 0.0, 0

    def perf_counter(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += next(self.spent)
        return self.now


def test_seconds_are_medians_per_image_and_their_ratio_stands_beside_that_of_macs(network, stored, monkeypatch):
    batches = list(stored["test"][0][:8].split(4))
    policy = build_policy("margin", 0.2, exits=3)
    with torch.no_grad():
        index = torch.cat([network.run(batch, policy).index for batch in [*batches, batches[0]]])
    monkeypatch.setattr(cleave.reports.exits.timing, "time", Clock([1, 2, 9, 3, 2, 4]))
    found = wall_clock(network, policy, batches, 3)
    assert found["seconds"]["median"] == 2 / 4
    assert found["backbone_seconds"] == {"lower": 2.5 / 4, "median": 3 / 4, "upper": 3.5 / 4}
    assert found["ratio"] == {"lower": 0.5, "median": 0.5, "upper": 1.75, "mean": 12 / 9}
    macs = np.array(network.exit_costs())[index.numpy()].mean()
    assert found["macs_ratio"] == pytest.approx(macs / network.backbone_macs)
    monkeypatch.setattr(cleave.reports.exits.timing, "time", Clock([1, 5, 6, 2, 1, 3, 2, 2]))
    assert exit_seconds(network, batches, 2) == ([1 / 4, 4 / 4, 4 / 4], 2 / 4)


def test_costs_in_seconds_are_shares_of_the_backbones(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cleave.reports.exits.measure, "exit_seconds", lambda *_: ([0.1, 0.3, 0.5], 0.4))
    overrides = ["costs=seconds", "policies=confidence", "choose=null", "budgets=1"]
    files = run(checkpoint, tmp_path, *overrides)
    assert "exit_policy.json" not in files
    report = json.loads(files["exits_report.json"].read_text())
    assert [exit["cost"] for exit in report["exits"]] == pytest.approx([0.25, 0.75, 1.25])
    monkeypatch.setattr(cleave.reports.exits.measure, "exit_seconds", lambda *_: ([0.1, 0.1, 0.5], 0.4))
    with pytest.raises(ValueError, match="seconds do not rise from exit to exit: 0.1, 0.1, 0.5; measure longer"):
        run(checkpoint, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["calibrate_on=test"], "calibrate_on must be val, got 'test': .*would flatter"),
        (["policies=[confidance]"], "policies: .*got 'confidance'. Did you mean 'confidence'"),
        (["choose.policy=marign"], "choose.policy: .*Did you mean 'margin'"),
        (["policies=[]"], "policies is empty"),
        (["budgets=[0.5,0]"], "budgets must be above 0, such as 0.5, got 0"),
        (["choose.budget=null"], "choose.budget must be above 0"),
        (["choose.drop=2"], "choose.drop must be from 0 to 1, got 2"),
        (["scheme=budgetd"], "scheme: there are budget, budgeted_batch, got 'budgetd'. Did you mean 'budget"),
        (["costs=flops"], "costs: there are macs, seconds, got 'flops'"),
        (["costs=[1,2]"], "costs must be 3 numbers"),
        (["costs=[1,2,x]"], "costs must be above 0, such as 0.5, got 'x'"),
        (["costs=seconds", "timing.batches=0"], "costs=seconds needs timing.batches"),
        (["curve=1"], "curve must be a whole number of at least 2, got 1"),
        (["choose.budget=0.01"], r"choose.budget=0.01 cannot be kept by confidence: the least possible is 0\.\d+"),
        (["placement.exits=3"], "placement: count must be a whole number of 1 to 2"),
        (["placement.exits=1", "placement.budget=0.01"], "placement: no choice of 1 exits.*cheapest costs"),
        (["data.root=somewhere"], r"data\.root=.*somewhere has no meaning"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_anything_is_written(checkpoint, tmp_path, overrides, told):
    with pytest.raises(ValueError, match=told):
        run(checkpoint, tmp_path, *BRIEF, "policies=[confidence]", "timing.batches=0", *overrides)
    assert not list(tmp_path.iterdir())


def test_a_network_without_exits_is_refused(teacher_file, tmp_path):
    with pytest.raises(ValueError, match="without early exits; train one by method=exits_joint"):
        run(teacher_file, tmp_path)


def test_a_fitted_ensemble_and_what_a_budget_may_come_to(checkpoint, stored, tmp_path, capsys):
    overrides = ["policies=ensemble", "costs=[1,3,4]", "budgets=[0.6]", "choose.policy=ensemble", "choose.budget=0.6"]
    quick = ["timing.limit=0", "timing.batches=0"]
    files = run(checkpoint, tmp_path, *overrides, *quick, "fit_ensemble=true")
    report = json.loads(files["exits_report.json"].read_text())
    logits, labels = torch.tensor(stored["val"][2]), torch.tensor(stored["val"][1])
    weights, log_bias = fit_geometric_ensemble(logits, labels)
    policy = read_policy(files["exit_policy.json"])
    torch.testing.assert_close(torch.tensor(policy.weights).double(), weights, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(torch.tensor(policy.log_bias).double(), log_bias, atol=2e-3, rtol=2e-3)
    (point,) = report["policies"]["ensemble"]["points"]
    # A threshold is one sample's own score, whose last bits are others here: it leaves, as it did there.
    index = offline(policy.with_thresholds([each - 1e-6 for each in point["thresholds"]]), logits).index
    cost = torch.tensor([0.25, 0.75, 1.0])[index].double()
    counts = [len(stored[split][1]) for split in ("val", "test")]
    error = cost.std(unbiased=False) * math.sqrt(sum(1 / count for count in counts))
    assert point["cost_error"] == pytest.approx(error.item(), rel=1e-4)
    assert 0 <= point["expected_excess"] <= 0.4 * point["cost_error"]
    told = " ".join(capsys.readouterr().out.split())
    assert f"a standard error of at most {100 * point['cost_error']:.2f} % of the backbone's" in told
    assert f"overspent by at most {100 * point['expected_excess']:.2f} % of it in expectation" in told


def test_an_ensemble_worse_than_its_exit_is_told_of(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cleave.reports.exits.points, "worse_than_exits", lambda *_: [(1, 0.725, 0.782)])
    overrides = ["policies=ensemble", "costs=[1,3,4]", "budgets=[0.6]", "choose=null", "timing.batches=0"]
    report = json.loads(run(checkpoint, tmp_path, *overrides)["exits_report.json"].read_text())
    (worse,) = report["worse_ensembles"]
    assert (worse["ensemble"], worse["exit"]) == (0.725, 0.782)
    told = " ".join(capsys.readouterr().out.split())
    assert f"the ensemble at {worse['name']} is worse than its exit on val, 72.50 % against 78.20 %" in told
