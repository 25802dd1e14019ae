"""A run killed between two saves goes on from last.ckpt to the weights of an uninterrupted one, bit by bit."""

import random
from pathlib import Path

import pytest

from .training_helpers import DIGITS, FINAL, PLAIN, differences, load, run_script, small

EVERY, EPOCHS, BATCHES = 5, 3, 19
SGD = ["training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.1", "+training.optimizer.momentum=0.9"]
RUN = [*PLAIN, *FINAL, f"trainer.max_epochs={EPOCHS}", f"callbacks.last.every_n_train_steps={EVERY}"]
DROPOUT = [*RUN, *small("DropoutNet"), *SGD, "data.augment=crop"]  # a cosine schedule a step is the default
BETWEEN_SAVES = [step for step in range(EVERY + 1, EPOCHS * BATCHES) if step % EVERY]


def killed(overrides: list[str], steps: list[int], folder: Path) -> Path:
    """Kill a run at each of the steps, going on from last.ckpt in between, and let it come to its end."""
    resume: list[str] = []
    for step in steps:
        kill = ["+callbacks.kill._target_=training_helpers.KillAt", f"+callbacks.kill.step={step}"]
        run_script("train", *overrides, *kill, *resume, folder=folder, code=-9)
        saved = load(folder / "checkpoints/last.ckpt")["global_step"]
        assert step - EVERY < saved < step
        resume = [f"ckpt_path={folder}/checkpoints/last.ckpt"]
    run_script("train", *overrides, *resume, folder=folder)
    return folder


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, averages, counters and the best checkpoint are equal; paths and times are not."""
    a, b = load(one / "final.ckpt"), load(other / "final.ckpt")
    of_the_folder = ("cleave", "callbacks")
    assert differences(*({k: v for k, v in c.items() if k not in of_the_folder} for c in (a, b))) == []
    states = [[state for state in c["callbacks"].values() if "time_elapsed" not in state] for c in (a, b)]
    paths = ("/dirpath", "_path", "best.ckpt", "last.ckpt")
    assert [d for d in differences(*states) if not d.endswith(paths)] == []
    best = [load(folder / "checkpoints/best.ckpt") for folder in (one, other)]
    assert best[0]["global_step"] == best[1]["global_step"]
    assert differences(best[0]["state_dict"], best[1]["state_dict"]) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_script("train", *DROPOUT, folder=folder, fresh=True)
    final = load(folder / "final.ckpt")
    assert (final["epoch"], final["global_step"]) == (EPOCHS, EPOCHS * BATCHES)
    return folder


@pytest.mark.slow
def test_a_run_killed_at_three_random_steps_ends_with_the_weights_of_an_uninterrupted_one(whole, tmp_path):
    steps = sorted(random.Random(2).sample(BETWEEN_SAVES, 3))
    assert_same_end(whole, killed(DROPOUT, steps, tmp_path / "run"))


@pytest.mark.slow
def test_head_distillation_with_averaged_weights_and_accumulation_resumes_exactly(tmp_path, teacher_file):
    # In this form a frozen head runs in training: its BatchNorm must stand still from the first resumed step on.
    overrides = [*RUN, *DIGITS, "experiment=digits_hnd", f"base.ckpt_path={teacher_file}", "split.form=insert"]
    overrides += ["callbacks=ema", "callbacks.ema.decay=0.9", "trainer.accumulate_grad_batches=2", "data.batch_size=32"]
    step = random.Random(3).choice(BETWEEN_SAVES)
    run_script("train", *overrides, folder=tmp_path / "whole")
    assert_same_end(tmp_path / "whole", killed(overrides, [step], tmp_path / "run"))
    last = load(tmp_path / "run/checkpoints/last.ckpt")
    assert differences(last["state_dict"], last["current_model_state"])


EPOCH_END = ["callbacks.last.every_n_train_steps=null"]
LAST_STEP = [f"callbacks.last.every_n_train_steps={BATCHES}"]  # the epoch's validation and scheduler still to come
BY_EPOCH = ["training.scheduler_interval=epoch", f"training.scheduler.T_max={EPOCHS}"]
SAME = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")
CASES = {
    "saved at each epoch's end": EPOCH_END,
    "saved at an epoch's last step": LAST_STEP,
    "saved at each epoch's end, schedule by the epoch": EPOCH_END + BY_EPOCH,
    "saved at an epoch's last step, schedule by the epoch": LAST_STEP + BY_EPOCH,
    "saved and validated within epochs": ["+trainer.val_check_interval=0.25"],
    "with workers": ["data.num_workers=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_wherever_a_run_saves_it_resumes_exactly(case, tmp_path):
    overrides = [*DROPOUT, *CASES[case]]
    run_script("train", *overrides, folder=tmp_path / "whole")
    resume: list[str] = []
    for step in (BATCHES + 2, 2 * BATCHES + 1):
        kill = ["+callbacks.kill._target_=training_helpers.KillAt", f"+callbacks.kill.step={step}"]
        run_script("train", *overrides, *kill, *resume, folder=tmp_path / "run", code=-9)
        resume = [f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"]
    run_script("train", *overrides, *resume, folder=tmp_path / "run")
    one, other = load(tmp_path / "whole/final.ckpt"), load(tmp_path / "run/final.ckpt")
    assert differences({k: one[k] for k in SAME}, {k: other[k] for k in SAME}) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_a_recipe_killed_inside_a_step_ends_with_the_weights_of_an_uninterrupted_one(number, tmp_path, teacher_file):
    overrides = [*RUN, *DIGITS, "experiment=bottlefit", "compare={layer2: 1.0, layer3: 1.0}", "split.at=layer2"]
    overrides += [f"base.ckpt_path={teacher_file}", "data.augment=crop", "trainer.max_epochs=2"]
    steps = 2 * BATCHES
    step = (number - 1) * steps + random.Random(number).choice([s for s in range(EVERY + 1, steps) if s % EVERY])
    kill = ["+callbacks.kill._target_=training_helpers.KillAt", f"+callbacks.kill.step={step}"]
    run_script("train", *overrides, folder=tmp_path / "whole")
    run_script("train", *overrides, *kill, folder=tmp_path / "run", code=-9)
    last = max((tmp_path / "run").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert last.parent.name == ("head", "finetune")[number - 1]
    run_script("train", *overrides, f"ckpt_path={last}", folder=tmp_path / "run")
    one, other = (load(tmp_path / name / "final.ckpt") for name in ("whole", "run"))
    assert differences(*({k: v for k, v in c.items() if k not in ("cleave", "callbacks")} for c in (one, other))) == []
    best = [load(tmp_path / name / "checkpoints/finetune/best.ckpt")["state_dict"] for name in ("whole", "run")]
    assert differences(*best) == []


DEFENCES = {
    "nopeek": [],
    "ressfl": ["method.extra_terms.attacker.loss.restarts=2"],
    "constrained": ["method=cross_entropy", "method.extra_terms.bound.loss.threshold=0.5"],
    "gaussian": ["noise.epsilon=200"],
    "laplace": ["noise.epsilon=200", "noise.bound=median"],
    "cloak": ["method.extra_terms.noise.weight=0.3"],
    "shredder": ["method=cross_entropy", "split.form=none"],
}


@pytest.mark.slow
@pytest.mark.parametrize("privacy", DEFENCES)
def test_a_defended_run_killed_at_a_random_step_ends_with_the_weights_of_an_uninterrupted_one(
    privacy, tmp_path, teacher_file
):
    overrides = [*RUN, *DIGITS, "experiment=digits_hnd", f"base.ckpt_path={teacher_file}", f"privacy={privacy}"]
    overrides += ["data.batch_size=32", *DEFENCES[privacy]]
    step = random.Random(privacy).choice(BETWEEN_SAVES)
    run_script("train", *overrides, folder=tmp_path / "whole")
    assert_same_end(tmp_path / "whole", killed(overrides, [step], tmp_path / "run"))
