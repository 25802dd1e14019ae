"""What the frozen-feature cache saves: a training step with it against the same step without.

Reconstruction at layer3 of a ResNet-18 (the frozen head is not run and no image is decoded) and head distillation at
layer1 (the teacher is not run), both at 64 pixels; separate training of a ResNet-32's five exits (the backbone is not
run) at 32 pixels; links between two ResNet-20 behind a late front and behind an early one, and with the local network's
logits (which is not run either); by the task's own training step on batches that the data module serves. Steps with and
without the cache alternate, so that both meet the machine in the same state. Prints the ratio of the times, pair by
pair, beside what it should be, for links by the MACs of forward and of activation gradients, and how far the losses lie
apart. With ``--epochs`` it times whole epochs of Lightning's trainer on a folder of images instead.

    python benchmarks/feature_cache.py [--only METHOD …] [--steps 40] [--threads 2]
    python benchmarks/feature_cache.py --only exits_separate --epochs 2 --data DIR
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cleave.architectures import create_backbone, linked_network, multi_exit_network, split_network, staged_network
from cleave.architectures.modes import evaluating
from cleave.datamodules import Digits, ImageDataModule, ImageFolder
from cleave.lightning_modules import (
    ExitsSeparate,
    Frozen,
    HeadDistillation,
    Links,
    Reconstruction,
    Task,
    Training,
    caching,
)
from cleave.losses import HeadDistillationLoss, JointExitLoss, KnowledgeDistillationLoss, ReconstructionLoss
from cleave.scripts.assembly.starting.terminal import quiet

OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3)
CODEC = {"bits": 8, "range": "sample"}


class Case(NamedTuple):
    """A method on a backbone, and how many times as fast the cache should make it; ``None``: as its MACs say."""

    library: str
    backbone: str
    pixels: int
    batch_size: int
    target: float | None


CASES = {
    "reconstruction": Case("torchvision", "resnet18", 64, 64, 5.0),
    "head_distillation": Case("torchvision", "resnet18", 64, 64, 1.15),
    "exits_separate": Case("cifar", "resnet32", 32, 128, 5.0),
    "links_late": Case("cifar", "resnet20", 32, 128, None),
    "links_early": Case("cifar", "resnet20", 32, 128, None),
    "links_distilled": Case("cifar", "resnet20", 32, 128, None),
}
LINKED_BLOCKS = ["layer1.0", "layer2", "layer3", "pool"]


def make_task(method: str, data: ImageDataModule, **settings: Any) -> Task:
    torch.manual_seed(0)
    backbone = create_backbone(CASES[method].library, CASES[method].backbone, num_classes=10).network
    sample = torch.randn(2, *data.input.shape)
    training = Training(optimizer=OPTIMIZER)
    if method == "reconstruction":
        narrow = {"channels": 16, "width": 32}
        network = split_network(backbone, "layer3", sample, form="insert", bottleneck=narrow, codec=CODEC)
        return Reconstruction(network, loss=ReconstructionLoss(), training=training, **settings)
    if method == "exits_separate":
        exits = multi_exit_network(backbone, sample, count=5)
        # In this memory layout convolutions are fastest, with the cache and without.
        training = Training(optimizer=OPTIMIZER, channels_last=True)
        return ExitsSeparate(exits, loss=JointExitLoss(), training=training, **settings)
    if method.startswith("links"):
        return make_links(method, backbone, sample, **settings)
    narrow = {"channels": 8, "stride": 4, "width": 32}
    network = split_network(backbone, "layer1", sample, bottleneck=narrow, codec=CODEC)
    teacher = {"teacher": Frozen(copy.deepcopy(backbone))}
    return HeadDistillation(network, loss=HeadDistillationLoss(), others=teacher, training=training, **settings)


def make_links(method: str, local: nn.Module, sample: Tensor, **settings: Any) -> Task:
    """Return the links from layer2, or from the first block of layer1, over a host, and back behind layer3."""
    case = CASES[method]
    host = create_backbone(case.library, case.backbone, num_classes=10).network
    path = [0, 1, 2, 3] if method == "links_early" else [1, 2, 2, 3]
    network = linked_network(local, host, [sample, sample], [LINKED_BLOCKS, LINKED_BLOCKS], path)
    return Links(
        network,
        loss=nn.CrossEntropyLoss(),
        distillation=KnowledgeDistillationLoss(alpha=0.0) if method == "links_distilled" else None,
        others={"teacher": Frozen(staged_network(local, sample))},
        training=Training(optimizer=OPTIMIZER, channels_last=True),
        **settings,
    )


def target(task: Task, method: str) -> float:
    """Return how many times as fast a case should be: for links by MACs, of forward and of activation gradients."""
    known = CASES[method].target
    if known is not None:
        return known
    path = sum(cost.macs for cost in task.network.costs())
    front = caching.share_of_macs(task.network, task.stored().outputs["student"]) * path
    whole = sum(cost.macs for cost in task.network_of("teacher").costs()) if "teacher" in task.asked else 0
    rest = 2 * (path - front)
    return (front + whole + rest) / rest


def make_data(method: str, folder: Path | None = None) -> ImageDataModule:
    case = CASES[method]
    options: dict[str, Any] = {"batch_size": case.batch_size, "image_size": case.pixels, "augment": "none"}
    data = Digits(**options) if folder is None else ImageFolder(folder, **options)
    data.configure_input(create_backbone(case.library, case.backbone, num_classes=10).input)
    data.setup("fit")
    return data


def batches(data: ImageDataModule) -> Iterator[Any]:
    """Batches without end, as Lightning hands them to a step."""
    for epoch in itertools.count():
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            yield data.on_after_batch_transfer(batch, 0)


class Side:
    """One side of the comparison: a task with its data and optimizer."""

    def __init__(self, method: str, cache: dict[str, Any] | None) -> None:
        data = make_data(method)
        self.task = make_task(method, data)
        self.task.set_modes()
        if cache is not None:
            self.store(data, cache)
        self.optimizer = self.task.settings.optimizer(self.task.parameter_groups())
        self.batches = batches(data)

    def store(self, data: ImageDataModule, cache: dict[str, Any]) -> None:
        """Fill the cache as the task does at the start of a fit."""
        stored, networks = self.task.stored(), {owner: self.task.network_of(owner) for owner in self.task.asked}
        with evaluating(self.task.network):
            data.cache_features(
                lambda batch: stored.compute(networks, batch["images"]),
                self.task.frozen_digest(),
                images=stored.inputs,
                **cache,
            )

    def step(self) -> tuple[float, float]:
        """Run one step; return its seconds, fetching included, and its loss."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.optimizer.zero_grad()
        loss = torch.stack(list(self.task.training_loss(batch).values())).sum()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start, loss.item()


def compare_steps(method: str, dtype: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cached, plain = Side(method, {"directory": f"{folder}/cache", "dtype": dtype}), Side(method, None)
        ratios, distances = [], []
        for number in range(steps + 3):
            pairs = [plain.step(), cached.step()] if number % 2 else [cached.step(), plain.step()][::-1]
            (slow, loss), (fast, other) = pairs
            if number >= 3:
                ratios.append(slow / fast)
            distances.append(abs(loss - other) / abs(loss))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{method:20} {dtype}: {middle:6.2f} times as fast (quartiles {low:.2f} to {high:.2f}, target "
        f"{target(plain.task, method):.2f}); losses differ by at most {distances[0]:.1e} in the first step, "
        f"{max(distances):.1e} in {len(distances)}"
    )


class Stopwatch(pl.Callback):
    """Takes the time of training epochs, what comes before and validation left out."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def epoch(method: str, folder: Path | None, cache: dict[str, Any]) -> float:
    """Return the seconds of one epoch in Lightning's trainer."""
    data, watch = make_data(method, folder), Stopwatch()
    task = make_task(method, data, feature_cache=cache)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, callbacks=[watch],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return watch.seconds


def compare_epochs(method: str, dtype: str, count: int, data: Path | None) -> None:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        cache = {"use": True, "directory": f"{folder}/cache", "dtype": dtype}
        for _ in range(count):
            fast, slow = epoch(method, data, cache), epoch(method, data, {})
            ratios.append(slow / fast)
            print(f"{method:20} {dtype}: {slow:.1f} s without, {fast:.1f} s with the cache", flush=True)
    print(
        f"{method:20} {dtype}: an epoch is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
        f"{max(ratios):.2f} in {count}, target {target(make_task(method, make_data(method, data)), method):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD", help=", ".join(CASES)
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float16"), default=("float32", "float16"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=0, help="time so many whole epochs instead of single steps")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/*.jpg, for --epochs; else digits")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.data and not args.epochs:
        parser.error("--data is read by --epochs alone; add --epochs 2")
    quiet()
    torch.set_num_threads(args.threads)
    for method, dtype in itertools.product(args.only, args.dtype):
        if args.epochs:
            compare_epochs(method, dtype, args.epochs, args.data)
        else:
            compare_steps(method, dtype, args.steps)


if __name__ == "__main__":
    main()
