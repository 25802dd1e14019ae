"""Two processes on the CPU, in-process launched and subprocesses, train as one does."""

import json

import pytest
import torch

from cleave.deployment import Pipeline, load_bundle
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.train import train

from .training_helpers import ROOT, fingerprint, load, run_script, small

SILENT = ["callbacks.progress=null", "+trainer.enable_progress_bar=false"]
SPAWNED = ["trainer=ddp_sim", *SILENT, "logger=csv", "trainer.max_epochs=2", "export=true"]
TEACHERS = [
    "+callbacks.teachers._target_=training_helpers.TeacherOfEachRank",
    "+callbacks.teachers.folder=${paths.output_dir}",
]
SUBPROCESSES = [
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.plugins=null",  # synchronised BatchNorm is for GPUs alone
]


@pytest.mark.slow
def test_two_spawned_processes_distil_test_export_and_measure_what_one_does(tmp_path, teacher_file):
    folder = tmp_path / "run"
    given = ["experiment=digits_hnd", f"base.ckpt_path={teacher_file}"]
    told = run_script("train", *given, *SPAWNED, *TEACHERS, folder=folder, timeout=280, fresh=True)
    assert told.count("\nResults of best.ckpt\n") == told.count("Checkpoint: ") == told.count("Bundle: ") == 1
    assert "Warning" not in told
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in (folder / "csv").iterdir()] == ["version_0"]

    expected = fingerprint(restore(teacher_file).network).item()
    assert json.loads((folder / "teachers.json").read_text()) == pytest.approx([expected, expected], rel=1e-12)

    logged = (folder / "csv/version_0/metrics.csv").read_text().splitlines()
    rows = [dict(zip(logged[0].split(","), line.split(","), strict=True)) for line in logged[1:]]
    tested = {k: float(v) for k, v in rows[-1].items() if k.startswith("test/")}
    quiet()
    single = ["trainer=cpu", "+trainer.enable_progress_bar=false", f"ckpt_path={folder}/checkpoints/best.ckpt"]
    again = evaluate(compose_config("evaluate", single, tmp_path / "evaluate"))
    assert {k: again[k] for k in tested} == pytest.approx(tested, abs=1e-5)
    assert len([k for k in tested if "acc" in k]) == 12
    assert load_bundle(folder / "bundle").manifest.metrics["test/acc"] == pytest.approx(again["test/acc"], abs=1e-6)
    # The bundle is of the best weights, to which only the ranks' own networks had gone back.
    restored, bundle = restore(folder / "checkpoints/best.ckpt"), load_bundle(folder / "bundle")
    images = torch.randint(0, 256, (16, *restored.image_input.shape), dtype=torch.uint8)
    with torch.no_grad():
        expected_logits = restored.network(restored.image_input.normalize(images))
    torch.testing.assert_close(Pipeline(bundle).run(images).logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_subprocesses_of_half_the_batch_take_the_steps_of_one_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    run = [*SILENT, *small("PlainNet"), "logger=csv", "trainer.max_epochs=1", "data.augment=crop", "test=false"]
    run += ["training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.1"]
    quiet()
    train(compose_config("train", ["trainer=cpu", *run, "data.batch_size=32"], tmp_path / "one"))
    told = run_script("train", *SUBPROCESSES, *run, "data.batch_size=16", folder=tmp_path / "two", fresh=True)
    assert told.count("\nResults of best.ckpt\n") == told.count("Checkpoint: ") == 1
    assert "Warning" not in told
    assert [p.name for p in (tmp_path / "two/csv").iterdir()] == ["version_0"]
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2
    assert not (tmp_path / "logs").exists()  # the second rank shares the folder of the first
    one, two = (load(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 39
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
