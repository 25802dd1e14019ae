"""What the framework costs: a step of head distillation through Trainer.fit against the same computation, bare.

A CIFAR ResNet-20 at 32 pixels, batch 128, with logging and the rich progress bar on. Each step of Trainer.fit is
followed by one step of the bare loop on a twin of everything, so that both meet the machine in the same state; a fit
step lasts from one bare step to the next: fetching, hooks, logging and progress bar included. Prints the ratio pair by
pair.

    python benchmarks/step_overhead.py [--steps 250] [--accelerator cpu|gpu]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from itertools import chain, repeat

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from cleave.architectures import SplitNetwork, create_backbone, cut
from cleave.datamodules import Digits
from cleave.lightning_modules import HeadDistillation, Teacher
from cleave.lightning_modules.callbacks import ProgressBar
from cleave.losses import HeadDistillationLoss

OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
SCHEDULER = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max="total_steps")


def make_data() -> Digits:
    data = Digits(batch_size=128, augment="crop", image_size=32)
    data.configure_input(create_backbone("cifar", "resnet20", num_classes=10).input)
    data.setup("fit")
    return data


def make_network(shape: tuple[int, ...]) -> tuple[torch.nn.Module, SplitNetwork]:
    torch.manual_seed(0)
    backbone = create_backbone("cifar", "resnet20", num_classes=10).network
    sample = torch.randn(2, *shape)
    return backbone, SplitNetwork(backbone, "layer2", sample, bottleneck={"stride": 4}, codec={"bits": 4})


class BareLoop:
    """The same data, networks, loss, optimizer and schedule without any framework."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.data = make_data()
        self.batches = chain.from_iterable(self.data.train_dataloader() for _ in repeat(None))
        backbone, network = make_network(self.data.input.shape)
        sample = torch.randn(2, *self.data.input.shape)
        self.teacher = cut(backbone.requires_grad_(False).eval(), at=["layer2"], sample=sample).to(device)
        self.network = network.train().to(device)
        self.network.tail.requires_grad_(False).eval()
        task = HeadDistillation(self.network, self.data.class_names, OPTIMIZER, objective=HeadDistillationLoss())
        self.optimizer = OPTIMIZER(task.parameter_groups())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.device = device

    def step(self) -> None:
        images = self.data.input.normalize(next(self.batches)["images"].to(self.device))
        self.optimizer.zero_grad()
        student = self.network.features(images, at=["layer2"])["layer2"]
        with torch.no_grad():
            teacher = self.teacher.features(images, at=["layer2"])["layer2"]
        loss = (student - teacher).square().sum() / len(images)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()


class Interleave(pl.Callback):
    """Runs and times one bare step after each step of the trainer."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.fit_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.resumed = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bare = BareLoop(self.steps, pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        start = self.now()
        if self.resumed:
            self.fit_seconds.append(start - self.resumed)
        self.bare.step()
        self.resumed = self.now()
        if self.fit_seconds:
            self.bare_seconds.append(self.resumed - start)

    def now(self) -> float:
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize(self.bare.device)
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--warmup", type=int, default=20, help="pairs left out at the start")
    parser.add_argument("--target", type=float, default=1.03)
    arguments = parser.parse_args()
    data = make_data()
    backbone, network = make_network(data.input.shape)
    task = HeadDistillation(
        network, data.class_names, OPTIMIZER, SCHEDULER, scheduler_interval="step",
        teacher=Teacher(backbone), objective=HeadDistillationLoss(),
    )  # fmt: skip
    timing = Interleave(arguments.steps + arguments.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=arguments.accelerator, devices=1, max_epochs=-1,
            max_steps=arguments.steps + arguments.warmup + 1,
            logger=CSVLogger(folder), log_every_n_steps=10, limit_val_batches=0, num_sanity_val_steps=0,
            enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[ProgressBar(), LearningRateMonitor("step"), timing],
        )  # fmt: skip
        trainer.fit(task, datamodule=data)
    pairs = list(zip(timing.fit_seconds, timing.bare_seconds, strict=True))[arguments.warmup :]
    ratios = sorted(fit / bare for fit, bare in pairs)
    quarter = len(ratios) // 4
    median = statistics.median(ratios)
    threads = torch.get_num_threads()
    print(f"{len(pairs)} pairs of steps on {arguments.accelerator}, torch {torch.__version__}, {threads} threads")
    print(f"Trainer.fit: median {1e3 * statistics.median(f for f, _ in pairs):.2f} ms a step")
    print(f"bare loop:   median {1e3 * statistics.median(b for _, b in pairs):.2f} ms a step")
    print(f"ratio: median {median:.4f}, quartiles {ratios[quarter]:.4f} to {ratios[-quarter - 1]:.4f}")
    print(f"target: at most {arguments.target}: {'met' if median <= arguments.target else 'missed'}")
    sys.exit(median > arguments.target)


if __name__ == "__main__":
    main()
