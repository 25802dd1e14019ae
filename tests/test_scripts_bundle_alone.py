"""An exported bundle runs where nothing of the training code can be imported, with the checkpoint's accuracy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.export import export
from cleave.scripts.train import train

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = [
    "pytorch_lightning", "lightning_fabric", "timm", "torchvision", "torchmetrics", "hydra", "omegaconf", "wandb",
    "sklearn", "cleave",
]  # fmt: skip
RUNNER = """
import json, sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path({root!r})]
sys.path.insert(0, {alone!r})
import deployment
assert deployment.__file__.startswith({alone!r})
bundle = deployment.load_bundle({bundle!r})
bundle.self_test()
files = sorted(Path({images!r}).glob("*.png"))
measured = []
for bits in {widths!r}:
    result = deployment.Pipeline(bundle, bits=bits).run_files(files)
    names = [bundle.class_names[i] for i in result.logits.argmax(1).tolist()]
    right = [name == file.stem.split("_")[1] for name, file in zip(names, files)]
    measured.append([sum(right) / len(right), sum(result.payload_bytes) / len(files), len(set(result.payload_bytes))])
print(json.dumps(measured))
"""


def made(folder: Path, teacher_file: Path, *overrides: str) -> tuple[Path, dict[str, float]]:
    """The bundle of a student, and what was measured of its checkpoint."""
    quiet()
    quick = ["trainer=cpu", "trainer.max_epochs=1", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
    given = ["experiment=digits_hnd", f"base.ckpt_path={teacher_file}", *quick, *overrides]
    metrics = train(compose_config("train", given, folder))
    given = [f"ckpt_path={folder}/checkpoints/best.ckpt", f"bundle={folder}/bundle", "trainer=cpu"]
    return export(compose_config("export", [*given, quick[-1]], folder / "export")), metrics


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher_file) -> tuple[Path, dict[str, float]]:
    return made(tmp_path_factory.mktemp("student"), teacher_file, "+trainer.limit_train_batches=8")


def run_alone(tmp_path: Path, bundle: Path, *widths: int | None) -> list[list[float]]:
    """Accuracy, mean payload and number of payload lengths at each width, where deployment alone can be imported."""
    alone, images = tmp_path / "alone", tmp_path / "images"
    shutil.copytree(ROOT / "deployment", alone / "deployment")
    images.mkdir()
    data = Digits()
    data.setup("test")
    batch = data.sample_batch("test", 10**6)
    for i, (pixels, label) in enumerate(zip(batch["images"], batch["labels"], strict=True)):
        Image.fromarray(pixels[0].numpy()).save(images / f"{i:04}_{data.class_names[label]}.png")
    names = {
        "alone": str(alone),
        "bundle": str(bundle),
        "images": str(images),
        "root": str(ROOT),
        "widths": list(widths),
    }
    code = RUNNER.format(blocked=BLOCKED, **names)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_bundle_runs_without_the_training_code_at_the_checkpoints_accuracy(tmp_path, exported):
    bundle, metrics = exported
    ((accuracy, payload, lengths),) = run_alone(tmp_path, bundle, None)
    assert accuracy == pytest.approx(metrics["test/acc"], abs=1e-6)
    assert (payload, lengths) == (metrics["test/payload_bytes"], 1) == (ENVELOPE_BYTES + 32, 1)


@pytest.mark.slow
def test_an_entropy_coded_bundle_brings_its_tables(tmp_path, teacher_file):
    entropic = [
        "method=entropic",
        "codec=entropy",
        "~codec.bits",
        "method.loss.weights={layer2: 1.0}",
        "method.beta=1.0",
    ]
    bundle, metrics = made(tmp_path / "run", teacher_file, *entropic)
    ((accuracy, payload, lengths),) = run_alone(tmp_path, bundle, None)
    assert accuracy == pytest.approx(metrics["test/acc"], abs=1e-6)
    assert payload == pytest.approx(metrics["test/payload_bytes"], rel=1e-5)
    assert lengths > 1
    (edge,) = json.loads((bundle / "manifest.json").read_text())["route"]
    codec = edge["transfers"][0]["codec"]
    assert [sum(table) for table in codec["frequencies"]] == [2**16] * 4


@pytest.mark.slow  # test_scripts_methods runs each width in the process that trained it
def test_a_bundle_of_several_widths_runs_at_each(tmp_path, teacher_file):
    bundle, metrics = made(
        tmp_path / "run", teacher_file, "method=cross_entropy", "codec.widths=[2,4,8]", "trainer.max_epochs=3"
    )
    measured = run_alone(tmp_path, bundle, 2, 4, 8)
    for bits, (accuracy, payload, _) in zip((2, 4, 8), measured, strict=True):
        assert accuracy == pytest.approx(metrics[f"test/bits{bits}/acc"], abs=1e-6)
        assert payload == ENVELOPE_BYTES + 8 * bits
    assert len({accuracy for accuracy, _, _ in measured}) == 3


def test_the_manifest_says_what_was_measured(exported):
    bundle, metrics = exported
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["metrics"]["test/acc"] == pytest.approx(metrics["test/acc"])
    assert [p["placement"] for p in manifest["partitions"]] == ["device", "server"]
    assert [p["macs"] for p in manifest["partitions"]] == [170_496, 1_124_992]
    assert manifest["input"]["color_mode"] == "L"
    assert manifest["config"]["split"]["at"] == "layer2"
    assert manifest["parity"]["max_difference"] <= 1e-5
