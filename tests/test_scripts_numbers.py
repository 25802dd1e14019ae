"""Numbers that a person would misread: what stands together is of one checkpoint, and what has no effect is said."""

import json
import re
from pathlib import Path

import pytest

from cleave.reports.answers import say_if_larger
from cleave.reports.rates.collect import collect
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.idle import idle
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.train import train

from .training_helpers import DIGITS, PLAIN

QUICK = [*PLAIN, *DIGITS, "data.augment=none", "+trainer.limit_train_batches=2"]
# The rate is so high from the second epoch on that the first one is the best.
WORSE = [
    "trainer.max_epochs=3",
    "training.optimizer.lr=3e-3",
    "training.scheduler._target_=torch.optim.lr_scheduler.StepLR",
]
WORSE += [
    "~training.scheduler.T_max",
    "+training.scheduler.step_size=1",
    "+training.scheduler.gamma=20",
    "callbacks.guard=null",
]
WORSE += ["training.scheduler_interval=epoch"]


def run(folder: Path, *overrides: str) -> dict[str, float]:
    quiet()
    return train(compose_config("train", [*QUICK, *overrides], folder))


def test_validation_and_test_stand_for_the_same_weights(tmp_path, capsys):
    metrics = run(tmp_path / "run", *WORSE, "trainer.limit_train_batches=8")
    best, last = (tmp_path / f"run/checkpoints/{name}.ckpt" for name in ("best", "last"))
    told = capsys.readouterr().out
    options = ["split=val", "trainer=cpu", "+trainer.enable_progress_bar=false"]
    of_best, of_last = (
        evaluate(compose_config("evaluate", [f"ckpt_path={file}", *options], tmp_path / "evaluate"))
        for file in (best, last)
    )
    assert of_best["val/acc"] > of_last["val/acc"]
    assert {name: metrics[name] for name in of_best} == pytest.approx(of_best, abs=1e-6)
    assert "Results of best.ckpt" in told
    (shown,) = re.findall(r"│ val/acc +│ +([\d.]+) │", told.partition("Results of best.ckpt")[2])
    assert float(shown) == pytest.approx(of_best["val/acc"], abs=1e-3)


def test_without_a_best_checkpoint_the_last_weights_are_named(tmp_path, capsys):
    run(
        tmp_path / "run",
        "trainer.max_epochs=1",
        "callbacks.checkpoint=null",
        "callbacks.last=null",
        "+trainer.enable_checkpointing=false",
    )
    assert "Results of the last weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    "policy", ["exits.policy.thresholds=0.3", pytest.param("exits.policy=null", marks=pytest.mark.slow)]
)
def test_a_network_of_exits_alone_leaves_results_that_compare_reads(tmp_path, policy, capsys):
    exits = ["method=exits_joint", "exits.at=[layer1]", "trainer.max_epochs=1", policy]
    metrics = run(tmp_path / "run", *exits)
    (point,) = collect([tmp_path / "run"])
    accuracy = metrics["test/acc" if policy.endswith("null") else "test/policy/acc"]
    assert (point.accuracy, point.payload_bytes, point.kind) == (pytest.approx(accuracy), 64, "run")
    assert point.label == "raw uint8 input, exits at layer1"
    assert re.search(
        r"Results: \S+ \(python scripts/compare\.py 'inputs=\[\S+results\.json\]'", capsys.readouterr().out
    )
    evaluate_at = [
        f"ckpt_path={tmp_path}/run/checkpoints/best.ckpt",
        "trainer=cpu",
        "+trainer.enable_progress_bar=false",
    ]
    evaluate(compose_config("evaluate", evaluate_at, tmp_path / "again"))
    (again,) = json.loads((tmp_path / "again/results.json").read_text())["points"]
    assert again["accuracy"] == pytest.approx(point.accuracy)


def test_a_payload_larger_than_the_picture_is_pointed_out(capsys):
    say_if_larger({"test/payload_to_file": 1.5})
    assert "1.5 times as large as the image's own file" in capsys.readouterr().out
    say_if_larger({"test/payload_to_file": 0.9})
    say_if_larger({})
    assert capsys.readouterr().out == ""


IDLE = [
    (["bottleneck.channels=4"], ["bottleneck.channels=4"], "split.at=LAYER"),
    (["codec.bits=4", "codec.widths=[4,8]"], ["codec.bits=4", "codec.widths=[4, 8]"], "split.at=LAYER"),
    (["+codec.at.layer1={bits: 2}"], ["codec.at.layer1={'bits': 2}"], "split.at=LAYER"),
    (["codec=entropy"], ["codec (entropy_codec)"], "split.at=LAYER"),
    (["channel=packet_loss"], ["channel (PacketLoss)"], "split.at=LAYER"),
    (["split.form=insert", "split.envelope=false"], ["split.form=insert", "split.envelope=False"], "split.at=LAYER"),
    (["split.at=layer1", "split.form=none", "bottleneck.stride=2"], ["bottleneck.stride=2"], "split.form=insert"),
    (["exits.cascade=true", "exits.head.convs=2"], ["exits.head.convs=2", "exits.cascade=True"], "exits.count=NUMBER"),
    (["exits.policy.thresholds=0.5"], ["exits.policy.thresholds=0.5"], "exits.count=NUMBER"),
    (["links.style=reduced", "links.host=none"], ["links.host=none", "links.style=reduced"], "add links.path="),
    (
        ["+links.norms=batch", "host.trust_checkpoint=true"],
        ["links.norms=batch", "host.trust_checkpoint=True"],
        "path=",
    ),
    (["links.path=[0,-,-,2]", "links.host_blocks=3"], ["links.host_blocks=3"], "a skip-connection has no host"),
    (["links.path=[0,-,-,2]", "channel=packet_loss"], ["channel (PacketLoss)"], "split.at=LAYER"),
    (["links.path=[0,1,1,2]", "codec.bits=4"], ["codec.bits=4"], "split.at=local/LAYER"),
    (["feature_cache.views=4"], ["feature_cache.views=4"], "feature_cache.use=true"),
]


@pytest.mark.parametrize(("overrides", "keys", "fix"), IDLE)
def test_what_has_no_effect_is_named_with_what_gives_it_one(tmp_path, overrides, keys, fix):
    ((found, reason),) = idle(compose_config("train", overrides, tmp_path))
    assert found == keys
    assert fix in reason


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["split.at=layer1", "codec=entropy", "channel=bit_errors", "bottleneck.channels=3", "split.envelope=false"],
        ["exits.count=2", "exits.cascade=true"],
        ["feature_cache.use=true", "feature_cache.views=4"],
        ["links.path=[0,1,1,2]", "channel=packet_loss", "split.envelope=false", "links.host_blocks=3"],
        ["links.path=[0,-,-,2]", "links.style=reduced"],
        ["experiment=digits_hnd"],
        ["experiment=digits_exits"],
    ],
)
def test_what_has_an_effect_is_not_named(tmp_path, overrides):
    assert list(idle(compose_config("train", overrides, tmp_path))) == []


def test_a_run_says_so(tmp_path, capsys):
    run(tmp_path, "trainer.max_epochs=1", "codec.bits=4", "test=false")
    assert (
        "codec.bits=4 has no effect: the network is not split; add split.at=LAYER, or leave it out"
        in capsys.readouterr().out
    )
