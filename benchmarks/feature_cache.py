"""What the frozen-feature cache saves: a training step with it against the same step without.

Reconstruction at layer3 of a ResNet-18 (the frozen head is not run and no image is decoded), head distillation at
layer1 (the teacher is not run), and separate training of three exits (the backbone is not run), all at 64 pixels, by
Lightning's own training step on batches that the data module serves. Steps with and without the cache alternate, so
that both meet the machine in the same state. Prints the ratio of the times, pair by pair, and how far the losses lie
apart.

    python benchmarks/feature_cache.py [--steps 40] [--batch-size 64] [--threads 2]
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
from typing import Any

import torch

from architectures import MultiExitNetwork, SplitNetwork, create_backbone
from datamodules import Digits
from lightning_modules import ExitsSeparate, HeadDistillation, Reconstruction, Teacher
from lightning_modules.taught import TaughtTask
from losses import HeadDistillationLoss, JointExitLoss, ReconstructionLoss

OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3)
TARGETS = {"reconstruction": 5.0, "head_distillation": 1.15, "exits_separate": 5.0}


def make_task(method: str, data: Digits) -> TaughtTask:
    torch.manual_seed(0)
    backbone = create_backbone("torchvision", "resnet18", num_classes=10).network
    sample = torch.randn(2, *data.input.shape)
    codec = {"bits": 8, "range": "sample"}
    if method == "reconstruction":
        narrow = {"channels": 16, "width": 32}
        network = SplitNetwork(backbone, "layer3", sample, form="insert", bottleneck=narrow, codec=codec)
        return Reconstruction(network, data.class_names, OPTIMIZER, objective=ReconstructionLoss())
    if method == "exits_separate":
        exits = MultiExitNetwork(backbone, sample, at=["layer1", "layer2", "layer3"])
        return ExitsSeparate(exits, data.class_names, OPTIMIZER, objective=JointExitLoss())
    network = SplitNetwork(
        backbone, "layer1", sample, bottleneck={"channels": 8, "stride": 4, "width": 32}, codec=codec
    )
    teacher = Teacher(copy.deepcopy(backbone))
    return HeadDistillation(network, data.class_names, OPTIMIZER, teacher=teacher, objective=HeadDistillationLoss())


def make_data(batch_size: int) -> Digits:
    data = Digits(batch_size=batch_size, image_size=64, augment="none")
    data.configure_input(create_backbone("torchvision", "resnet18", num_classes=10).input)
    data.setup("fit")
    return data


def batches(data: Digits) -> Iterator[Any]:
    """Batches without end, as Lightning hands them to a step."""
    for epoch in itertools.count():
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            yield data.on_after_batch_transfer(batch, 0)


class Side:
    """One side of the comparison: a task with its data and optimizer."""

    def __init__(self, method: str, batch_size: int, cache: dict[str, Any] | None) -> None:
        data = make_data(batch_size)
        self.task = make_task(method, data)
        self.task.set_modes()
        if cache is not None:
            images = self.task.caches_images()
            data.cache_features(self.task.frozen_features, self.task.frozen_digest(), images=images, **cache)
        self.optimizer = self.task.optimizer_factory(self.task.parameter_groups())
        self.batches = batches(data)

    def step(self) -> tuple[float, float]:
        """Run one step; return its seconds, fetching included, and its loss."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.optimizer.zero_grad()
        loss = torch.stack(list(self.task.training_loss(batch).values())).sum()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start, loss.item()


def compare(method: str, dtype: str, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cached = Side(method, args.batch_size, {"directory": f"{folder}/cache", "dtype": dtype})
        plain = Side(method, args.batch_size, None)
        ratios, distances = [], []
        for number in range(args.steps + 3):
            pairs = [plain.step(), cached.step()] if number % 2 else [cached.step(), plain.step()][::-1]
            (slow, loss), (fast, other) = pairs
            if number >= 3:
                ratios.append(slow / fast)
            distances.append(abs(loss - other) / abs(loss))
    low, middle, high = statistics.quantiles(ratios, n=4)
    target = TARGETS[method]
    print(
        f"{method:20} {dtype}: {middle:6.2f} times as fast (quartiles {low:.2f} to {high:.2f}, target {target}); "
        f"losses differ by at most {distances[0]:.1e} in the first step, {max(distances):.1e} in {len(distances)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for method in TARGETS:
        for dtype in ("float32", "float16"):
            compare(method, dtype, args)


if __name__ == "__main__":
    main()
