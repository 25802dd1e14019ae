"""A run that diverges says so, keeps its last good checkpoint, and never ends in an error about NaN."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from cleave.architectures.inserts.finite import NumberError
from cleave.datamodules.sampling import EpochSampler
from cleave.lightning_modules import CrossEntropy, Term
from cleave.lightning_modules.callbacks import Guard
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.export import export
from cleave.scripts.train import train

from .split_tasks import Logged, batches, build, trainer_of
from .training_helpers import DIGITS, PLAIN, load, run_script, small

BATCHES = 19
RUN = [*PLAIN, *small("PlainNet"), "trainer.max_epochs=3", "training.optimizer.lr=0.01"]
POISON = "+callbacks.poison._target_=training_helpers.PoisonAt"


def is_finite(checkpoint: Path) -> bool:
    return all(value.isfinite().all() for value in load(checkpoint)["state_dict"].values())


def test_a_run_stops_at_a_loss_that_is_no_number_and_goes_on_by_its_own_command(tmp_path):
    folder, step = tmp_path / "run", 25
    told = run_script("train", *RUN, POISON, f"+callbacks.poison.step={step}", folder=folder, code=1)
    last = folder / "checkpoints/last.ckpt"
    assert re.search(
        rf"NumberError: the training loss \S+ is nan in epoch 1, step {step}, batch {step - BATCHES}", told
    )
    assert f"The last good checkpoint is {last}" in told
    assert is_finite(last)
    assert is_finite(folder / "checkpoints/best.ckpt")
    assert load(last)["global_step"] == BATCHES
    record = json.loads((folder / "not_finite.json").read_text())
    assert (record["epoch"], record["step"], record["batch"]) == (1, step, step - BATCHES)
    assert set(record["losses"].values()) == {"nan"}
    config = compose_config("train", RUN, tmp_path / "composed")
    sampler = EpochSampler(range(record_images(last)), seed=config.data.seed, drop_last=True)
    sampler.set_epoch(1)
    served = [index for _, index in sampler]
    size = config.data.batch_size
    assert record["indices"] == served[(step - BATCHES) * size : (step - BATCHES + 1) * size]
    command = shlex.split(re.search(r"clipped gradients: (.*); or start", told)[1])
    assert command[:2] == ["python", "scripts/train.py"]
    own = [word for word in command[2:] if "poison" not in word and not word.startswith("hydra.")]
    assert f"ckpt_path={last}" in own
    run_script("train", *own, folder=tmp_path / "again")
    assert load(tmp_path / "again/checkpoints/last.ckpt")["global_step"] == 3 * BATCHES


def record_images(checkpoint: Path) -> int:
    """How many images the run trained on."""
    return load(checkpoint)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["images"]


@pytest.mark.parametrize(("every", "told"), [(None, "logits .* in the validation"), (4, "no checkpoint was saved")])
def test_no_checkpoint_is_saved_of_weights_that_are_no_numbers(tmp_path, monkeypatch, every, told):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    step = 2 * BATCHES if every is None else 24
    behind = [POISON, f"+callbacks.poison.step={step}", "+callbacks.poison.behind=true"]
    overrides = [*RUN, *behind, f"callbacks.last.every_n_train_steps={every or 'null'}"]
    with pytest.raises(NumberError, match=told):
        train(compose_config("train", overrides, tmp_path))
    assert is_finite(tmp_path / "checkpoints/last.ckpt")
    assert is_finite(tmp_path / "checkpoints/best.ckpt")
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == (BATCHES if every is None else 20)


SPLIT = [*PLAIN, *DIGITS, "backbone.name=resnet20", "split.at=layer1", "split.form=insert"]


@pytest.mark.parametrize("network", [RUN, [*SPLIT, "method=cross_entropy", "codec.range=observed"]])
def test_without_the_guard_testing_and_export_say_that_it_diverged(tmp_path, monkeypatch, network):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    overrides = [*network, POISON, "+callbacks.poison.step=2", "callbacks.guard=null"]
    overrides += ["trainer.max_epochs=1", "data.batch_size=256"]
    with pytest.raises(NumberError, match="diverged"):
        train(compose_config("train", overrides, tmp_path))
    best = f"ckpt_path={tmp_path}/checkpoints/best.ckpt"
    config = compose_config("export", [best, "trust_checkpoint=true"], tmp_path / "export")
    with pytest.raises(NumberError, match=r"best.ckpt holds NaN or infinity in .*diverged"):
        export(config)


class Fixed(torch.nn.Module):
    """A loss that scales the last answer by a number of its own for each call."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.calls = factors, 0

    def forward(self, logits, labels):
        self.calls += 1
        return logits.float().square().mean() * self.factors.get(self.calls, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bad", "also"])
def test_the_term_is_named_and_the_weights_are_those_of_before(tmp_path, value, name):
    terms = {
        key: Term(Fixed({3: value} if key == name else {}), of=["student/logits", "labels"]) for key in ("bad", "also")
    }
    task = build(CrossEntropy, extra_terms=terms)
    seen = []

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append([weight.detach().clone() for weight in module.parameters()])

    trainer = trainer_of([Guard(str(tmp_path)), Before()])
    with pytest.raises(NumberError, match=rf"the training loss {name} is {value} in epoch 0, step 2, batch 2"):
        trainer.fit(task, batches(), batches())
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], task.parameters(), strict=True))
    record = json.loads((tmp_path / "not_finite.json").read_text())
    assert record["losses"][name] == str(value)
    assert math.isfinite(record["losses"]["bad" if name == "also" else "also"])
    assert record["indices"] is None  # no data module of Cleave's


def test_infinite_gradients_under_a_scaler_stop_nothing(tmp_path):
    task, logged = build(CrossEntropy), Logged()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer_of([Guard(str(tmp_path)), logged], plugins=[plugin]).fit(task, batches(), batches())
    assert scaler.get_scale() < 2.0**127  # steps were skipped
    assert not (tmp_path / "not_finite.json").exists()
    assert all(map(math.isfinite, logged.losses()))


@pytest.mark.parametrize("kind", ["observed", pytest.param("learned", marks=pytest.mark.slow), "sample"])
def test_a_dead_encoder_is_named_with_its_layer(tmp_path, monkeypatch, kind, recwarn):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    dead = ["+callbacks.dead._target_=training_helpers.KillEncoder"]
    overrides = [*SPLIT, "method=cross_entropy", f"codec.range={kind}", "trainer.max_epochs=1", "data.batch_size=256"]
    run = compose_config("train", [*overrides, *dead], tmp_path)
    if kind == "sample":
        train(run)
        assert any("layer1: all representations of the test images are equal: its encoder is dead" in str(w.message)
                   for w in recwarn)  # fmt: skip
    else:
        with pytest.raises(NumberError, match="layer1: the representation is 0 everywhere: its encoder is dead"):
            train(run)
