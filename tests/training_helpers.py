"""What the tests of whole training runs share: starting scripts, small networks, and callbacks named in overrides.

Scripts started by :func:`run_script` find this file as the module ``training_helpers``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback as HydraCallback
from omegaconf import DictConfig
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent

# A run without terminal furniture. Digits at 8×8 grey pixels; every choice may be overridden after it.
PLAIN = ["trainer=cpu", "logger=none", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
DIGITS = ["data=digits", "data.image_size=8", "backbone.in_channels=1"]
FINAL = ["+callbacks.final._target_=training_helpers.SaveFinal", "+callbacks.final.folder=${paths.output_dir}"]


def python_path(*folders: Path) -> str:
    """Some folders and those of this process's own PYTHONPATH, for a process that runs elsewhere."""
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(map(str, [*folders, *(Path(folder).resolve() for folder in own)]))


def small(network: str, **arguments: Any) -> list[str]:
    """Overrides that train a network of this file on digits."""
    chosen = ["backbone=custom", f"backbone.network._target_=training_helpers.{network}", *DIGITS]
    return chosen + [f"+backbone.network.{key}={value}" for key, value in arguments.items()]


class ScriptServer:
    """A process that forks one for each script: see ``script_server.py``."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/script_server.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.communicate)

    def run(self, **request: Any) -> int:
        """Run a script to its end and return its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


server = functools.cache(ScriptServer)


def script(
    name: str, *arguments: str, cwd: Path, timeout: int = 150, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own.

    One thread a process: the order of sums in a convolution depends on the number of threads.

    Args:
        name: The script's.
        *arguments: Its arguments.
        cwd: Folder to run it in.
        timeout: Seconds after which it is killed.
        fresh: Whether a new interpreter runs it, with a hash seed and imports of its own, instead of a fork.
        **env: Environment variables.
    """
    command = [str(ROOT / "scripts" / f"{name}.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": python_path(), **env}
    if fresh or sys.platform != "linux":
        command.insert(0, sys.executable)
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch()
        err.touch()
        status = server().run(command=command, cwd=str(cwd), env=env, timeout=timeout, out=str(out), err=str(err))
        return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


def run_script(name: str, *overrides: str, folder: Path, code: int = 0, timeout: int = 150, fresh: bool = False) -> str:
    """Run a script with ``folder`` as its output folder and return what it printed; see :func:`script`."""
    folders = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    path = python_path(ROOT / "tests")
    result = script(name, *overrides, *folders, cwd=folder.parent, timeout=timeout, fresh=fresh, PYTHONPATH=path)
    told = result.stdout + result.stderr
    assert result.returncode == code, f"exit status {result.returncode} instead of {code}:\n{told}"
    return told


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """A manifest's metrics without the points that compare.py reads there."""
    return {name: value for name, value in metrics.items() if name != "points"}


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Paths at which two nested containers differ, tensors bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {k: f"{at}/{k}" for k in [*one, *(k for k in other if k not in one)]}
        absent = object()
        return [d for k, path in keys.items() for d in differences(one.get(k, absent), other.get(k, absent), path)]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    return [] if type(one) is type(other) and one == other else [at]


class KillAt(pl.Callback):
    """Ends the process as the kernel's out-of-memory killer would, after a number of optimizer steps of all fits."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._batches_that_stepped >= self.step:
            self.end()

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KilledError(Exception):
    """What :class:`FailAt` raises."""


class FailAt(KillAt):
    """Ends training within the test's own process; what lies on disk is what a killed one leaves."""

    def end(self) -> None:
        raise KilledError


class PoisonAt(pl.Callback):
    """Makes a weight NaN as a bad gradient would, before a training step or behind the last one before a save."""

    def __init__(self, step: int, behind: bool = False) -> None:
        self.step, self.behind = step, behind

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self.behind and trainer.global_step == self.step:
            next(pl_module.parameters()).data.view(-1)[0] = float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.behind and trainer.global_step == self.step:
            next(pl_module.parameters()).data.view(-1)[0] = float("nan")


class KillEncoder(pl.Callback):
    """Keeps the weights of every encoder at 0, so that it makes 0 of all images."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for bottleneck in pl_module.network.bottlenecks.values():  # type: ignore[union-attr, operator]
            for weight in bottleneck.encoder.parameters():
                weight.data.zero_()

    on_train_batch_end = on_train_batch_start


class SignalAt(pl.Callback):
    """Sends a signal to its own process, and a number of times: after a batch of training, or in a test."""

    def __init__(self, name: str, step: int = 4, times: int = 1, stage: str = "fit", parent: bool = False) -> None:
        self.signum, self.step, self.times, self.stage = signal.Signals[name], step, times, stage
        self.parent = parent

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.stage == "fit" and trainer.global_step == self.step and not (self.parent and trainer.global_rank):
            self.send()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.stage == "validate":
            self.send()

    def on_test_batch_start(self, *_: Any) -> None:
        if self.stage == "test":
            self.send()

    def send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getppid() if self.parent else os.getpid(), self.signum)
        self.times = 0


class SaveFinal(pl.Callback):
    """Saves a whole checkpoint at the end of training, wherever the interval of the others falls."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "final.ckpt"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class TeacherOfEachRank(pl.Callback):
    """Writes a fingerprint of the teacher that each rank trains with."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "teachers.json"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = pl_module.all_gather(fingerprint(pl_module.network_of("teacher")).to(pl_module.device))
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(found.tolist()))


class Watch(pl.Callback):
    """Notes what each training step saw, in the list ``Watch.steps``."""

    steps: list[dict[str, Any]] = []  # noqa: RUF012

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Watch.steps = []
        last = [m for m in pl_module.network.modules() if isinstance(m, nn.Linear)][-1]
        self.dtypes: set[torch.dtype] = set()
        last.register_forward_hook(lambda module, args, output: self.dtypes.add(output.dtype))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        optimizer = trainer.optimizers[0]
        gradients = [
            p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        Watch.steps.append(
            {
                "gradient": torch.cat(gradients).norm().item() if gradients else None,
                "rates": self.rates,
                "step": trainer.global_step,
                "logits": set(self.dtypes),
                "weights": {p.dtype for p in pl_module.parameters()},
                "optimizer": type(optimizer).__name__,
                "loss": float(outputs["loss"]),
                "images": batch["images"].sum().item(),
            }
        )


class WriteReturned(HydraCallback):
    """Writes what a job returned to its sweeper."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        Path(config.paths.output_dir, "returned.json").write_text(json.dumps(job_return.return_value))


def fingerprint(network: nn.Module) -> Tensor:
    return torch.stack([p.detach().double().square().sum() for p in network.parameters()]).sum()


class DropoutNet(nn.Module):
    """Convolutions with BatchNorm and dropout for images of any size."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 8, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, width, 3, stride=2), nn.BatchNorm2d(width))
        self.classifier = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.logits = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.classifier(self.body(self.stem(x))))


class PlainNet(nn.Module):
    """Without BatchNorm and dropout: the gradient of a batch is the mean of its parts' gradients."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.logits = nn.Linear(16 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.pool(self.stem(x)))


def quiet_trainer(**settings: Any) -> pl.Trainer:
    """A trainer on the CPU that leaves nothing behind and prints nothing."""
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return pl.Trainer(accelerator="cpu", **{**quiet, **settings})


def bundle_outputs(network: Any, data: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """The logits of a classifier's bundle, and of the classifier itself, on some test images."""
    from cleave.architectures.partitions import network_partitions
    from cleave.deployment import OutputSpec, Pipeline, export_bundle

    found = network_partitions(network.eval(), data.input)
    outputs = [OutputSpec("logits", "logits", network.shapes["logits"], tuple(data.class_names))]
    images = data.sample_batch("test", 4)["images"]
    more = {"draws": found.draws, "exits": found.exits, "images": images}
    bundle = export_bundle(folder, found.parts, found.edges, input=data.input, outputs=outputs, **more)
    return Pipeline(bundle).run(images).logits, network(data.input.normalize(images))
