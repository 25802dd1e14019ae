"""An exported bundle runs where nothing of the training code can be imported, with the checkpoint's accuracy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from datamodules import Digits
from scripts.assembly import compose_config
from scripts.export import export
from scripts.terminal import quiet
from scripts.train import train

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = [
    "pytorch_lightning", "lightning_fabric", "timm", "torchvision", "torchmetrics", "hydra", "omegaconf", "wandb",
    "sklearn", "losses", "architectures", "datamodules", "lightning_modules", "scripts",
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
pipeline = deployment.Pipeline(bundle)
files = sorted(Path({images!r}).glob("*.png"))
result = pipeline.run_files(files)
names = [bundle.class_names[i] for i in result.logits.argmax(1).tolist()]
right = [name == file.stem.split("_")[1] for name, file in zip(names, files)]
print(json.dumps({{"accuracy": sum(right) / len(right), "payload": set(result.payload_bytes).pop()}}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher_file) -> tuple[Path, dict[str, float]]:
    quiet()
    folder = tmp_path_factory.mktemp("student")
    quick = ["trainer=cpu", "trainer.max_epochs=3", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
    overrides = ["experiment=digits_hnd", f"teacher.ckpt_path={teacher_file}", *quick]
    metrics = train(compose_config("train", overrides, folder))
    overrides = [f"ckpt_path={folder}/checkpoints/best.ckpt", f"bundle={folder}/bundle", "trainer=cpu"]
    return export(compose_config("export", [*overrides, quick[-1]], folder / "export")), metrics


def test_a_bundle_runs_without_the_training_code_at_the_checkpoints_accuracy(tmp_path, exported):
    bundle, metrics = exported
    alone, images = tmp_path / "alone", tmp_path / "images"
    shutil.copytree(ROOT / "deployment", alone / "deployment")
    images.mkdir()
    data = Digits()
    data.setup("test")
    for i, (pixels, label) in enumerate(zip(*data.sample_images("test", 10**6), strict=True)):
        Image.fromarray(pixels[0].numpy()).save(images / f"{i:04}_{data.class_names[label]}.png")
    names = {"alone": str(alone), "bundle": str(bundle), "images": str(images), "root": str(ROOT)}
    code = RUNNER.format(blocked=BLOCKED, **names)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["accuracy"] == pytest.approx(metrics["test/acc"], abs=1e-6)
    assert measured["payload"] == metrics["test/payload_bytes"] == 32


def test_the_manifest_says_what_was_measured(exported):
    bundle, metrics = exported
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["metrics"]["test/acc"] == pytest.approx(metrics["test/acc"])
    assert [p["placement"] for p in manifest["partitions"]] == ["device", "server"]
    assert [p["macs"] for p in manifest["partitions"]] == [170_496, 1_124_992]
    assert manifest["input"]["color_mode"] == "L"
    assert manifest["config"]["split"]["at"] == "layer2"
    assert manifest["parity"]["max_difference"] <= 1e-5
