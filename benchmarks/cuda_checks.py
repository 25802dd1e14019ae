"""What only a GPU can show: mixed precision, DDP's launch, compiled parts, and an exported bundle on CUDA.

Trains and exports a small split ResNet-20 on the embedded digits, so that nothing is downloaded, and prints a table of
checks with what each measured. Exit status: 0 all passed, 1 a check failed, 2 there is no such device.

    python benchmarks/cuda_checks.py [--device cuda|cpu] [--steps 50] [--only bf16 ddp compile bundle]
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cleave.architectures import create_backbone, split_network
from cleave.architectures.partitions import network_partitions
from cleave.datamodules import Digits
from cleave.deployment import OutputSpec, Pipeline, export_bundle, load_bundle
from cleave.lightning_modules import Frozen, HeadDistillation, Training
from cleave.losses import HeadDistillationLoss
from cleave.scripts.assembly.starting.terminal import quiet

OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
BATCH, SIDE = 128, 32


class CheckError(Exception):
    """A check that ran and found something wrong."""


class Bench:
    """The device, and fresh equal copies of data, network and teacher for each check."""

    def __init__(self, device: str, steps: int) -> None:
        self.device, self.steps = torch.device(device), steps
        self.accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        torch.manual_seed(0)
        self.backbone = create_backbone("cifar", "resnet20", num_classes=10, in_channels=1)
        self.image = (1, SIDE, SIDE)
        sample = torch.randn(2, *self.image)
        self.network = split_network(
            self.backbone.network, "layer2", sample, bottleneck={"stride": 2}, codec={"bits": 4}
        )

    def data(self) -> Digits:
        data = Digits(batch_size=BATCH, augment="crop", image_size=SIDE)
        data.configure_input(self.backbone.input)
        return data

    def task(self, *, compiled: bool = False) -> HeadDistillation:
        return HeadDistillation(
            copy.deepcopy(self.network),
            loss=HeadDistillationLoss(),
            others={"teacher": Frozen(copy.deepcopy(self.backbone.network))},
            training=Training(optimizer=OPTIMIZER, compile=compiled),
        )

    def fit(self, task: HeadDistillation, **settings: Any) -> list[float]:
        """Train for a few steps and return the losses."""
        losses = Losses()
        trainer = pl.Trainer(
            accelerator=self.accelerator, devices=1, max_steps=self.steps, max_epochs=-1, logger=False,
            callbacks=[losses], limit_val_batches=0, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, use_distributed_sampler=False, **settings,
        )  # fmt: skip
        trainer.fit(task, datamodule=self.data())
        return losses.values

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, function: Callable[[], object], warmup: int = 10) -> float:
        """Median time of a call after some that are not counted: compilation, autotuning, allocation."""
        spent = []
        for i in range(warmup + self.steps):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            if i >= warmup:
                spent.append(1e3 * (time.perf_counter() - start))
        return statistics.median(spent)


class Losses(pl.Callback):
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: object) -> None:
        self.values.append(float(outputs["loss"]))


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def check_bf16(bench: Bench) -> Iterator[str]:
    """Head distillation in bf16-mixed learns as in float32, with float32 weights and an untouched teacher."""
    task = bench.task()
    teacher = task.others["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    half = bench.fit(task, precision="bf16-mixed")
    full = bench.fit(bench.task(), precision="32-true")
    expect(all(p.dtype == torch.float32 for p in task.parameters()), "weights are not float32")
    expect(half[-1] < half[0], f"the loss does not fall: {half[0]:.4g} to {half[-1]:.4g}")
    first = abs(half[0] / full[0] - 1)
    expect(first < 0.02, f"the first loss differs from float32's by {first:.1%}")
    after = teacher.state_dict()
    expect(all(torch.equal(after[name].cpu(), value) for name, value in before.items()), "the teacher changed")
    yield f"loss {half[0]:.4g} → {half[-1]:.4g} (float32 {full[0]:.4g} → {full[-1]:.4g})"


def check_ddp(bench: Bench) -> Iterator[str]:
    """DDP on one device gives the losses of no strategy at all, frozen tail and all."""
    plain = bench.fit(bench.task())
    wrapped = bench.fit(bench.task(), strategy="ddp")
    worst = max(abs(a / b - 1) for a, b in zip(wrapped, plain, strict=True))
    expect(len(wrapped) == bench.steps and worst < 1e-2, f"losses differ by up to {worst:.1%}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    yield f"{bench.steps} steps, losses within {worst:.1e} of a single process"


def check_compile(bench: Bench) -> Iterator[str]:
    """Compiled parts compute what eager ones do; the ratio of step times is told, not judged."""
    precision = torch.bfloat16
    images = torch.randn(BATCH, *bench.image, device=bench.device)
    times, losses = {}, {}
    for name in ("eager", "compiled"):
        task = bench.task(compiled=name == "compiled").to(bench.device)
        task.others["teacher"].to(bench.device)
        task.set_modes()
        optimizer = task.configure_optimizers()

        def step(task: HeadDistillation = task, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, precision):
                loss = task.training_loss({"images": images})["head"]
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses[name] = step().item()
        times[name] = bench.milliseconds(step)
        expect(not any("_orig_mod" in key for key in task.state_dict()), "compiling renamed the weights")
    off = abs(losses["compiled"] / losses["eager"] - 1)
    expect(off < 0.02, f"the compiled loss differs by {off:.1%}")
    yield f"eager {times['eager']:.2f} ms, compiled {times['compiled']:.2f} ms a step"
    yield f"speed ratio {times['eager'] / times['compiled']:.2f}×, losses within {off:.1e}"


def check_bundle(bench: Bench) -> Iterator[str]:
    """A bundle exported on the CPU passes its own test on the device; times of each part follow."""
    data, network = bench.data(), copy.deepcopy(bench.network).eval()
    found = network_partitions(network, data.input)
    images = data.sample_batch("test", BATCH)["images"]
    outputs = [OutputSpec("logits", "logits", (len(data.class_names),), tuple(data.class_names))]
    with tempfile.TemporaryDirectory() as folder:
        sample = {"input": data.input, "outputs": outputs, "images": images[:16]}
        export_bundle(Path(folder) / "bundle", found.parts, found.edges, **sample)
        reference = Pipeline(load_bundle(Path(folder) / "bundle")).run(images).logits
        bundle = load_bundle(Path(folder) / "bundle", bench.device)
        parity = bundle.self_test()
        pipeline = Pipeline(bundle)
        yield f"largest difference {parity.max_difference:.1e}, {100 * parity.codes_differing:.2g} % of codes differ"
        same = (pipeline.run(images).logits.argmax(1) == reference.argmax(1)).float().mean().item()
        expect(same >= 0.98, f"only {same:.1%} of predictions are the CPU's")
        yield f"{same:.1%} of {BATCH} predictions are the CPU's"
        for count in (1, BATCH):
            runs = [pipeline.run(images[:count]).part_seconds for _ in range(5 + bench.steps)][5:]
            medians = {name: 1e3 * statistics.median(run[name] for run in runs) for name in runs[0]}
            yield f"batch {count}: " + ", ".join(f"{name} {spent:.2f} ms" for name, spent in medians.items())


CHECKS: dict[str, Callable[[Bench], Iterator[str]]] = {
    "bf16": check_bf16,
    "compile": check_compile,
    "bundle": check_bundle,
    "ddp": check_ddp,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries the checks out")
    parser.add_argument("--steps", type=int, default=50, help="steps trained, and calls timed, in each check")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu runs the same checks without one.", file=sys.stderr)
        return 2
    quiet()
    bench = Bench(arguments.device, arguments.steps)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    table = Table("check", "result", "measured", title=f"{name}, torch {torch.__version__}, batch {BATCH}, {SIDE} px")
    failures = 0
    for check in arguments.only:
        lines: list[str] = []
        try:
            lines.extend(CHECKS[check](bench))
            result = "pass"
        except Exception as error:
            if not isinstance(error, CheckError):
                traceback.print_exc()
            lines.append(f"{type(error).__name__}: {error}")
            result, failures = "FAIL", failures + 1
        table.add_row(check, result, "\n".join(lines))
    Console().print(table)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
