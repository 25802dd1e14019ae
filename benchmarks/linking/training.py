"""Paths between a local network and its hosts, trained and measured one by one; what the front makes is computed once.

A row is a path with all that it was trained with. Its result is kept in a file named after all of that, so that a row
that is there is not trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import (
    Blocks,
    StagedNetwork,
    cut_blocks,
    link_blocks,
    multi_exit_network,
    path_costs,
    staged_network,
)
from cleave.lightning_modules import ExitsDistilled, Frozen, Links, Task, Training
from cleave.losses import ExitDistillationLoss, KnowledgeDistillationLoss
from linking.five_classes import Images, Settings, accuracy, batches, key, network, normalise, trained

# Six blocks each, ends of which are of other depth, width and size.
LOCAL_BLOCKS = ("layer1.1", "layer2.0", "layer2.2", "layer3.0", "layer3.2", "pool")
HOST_BLOCKS = {
    "resnet20": ("layer1.1", "layer1.2", "layer2.0", "layer2.2", "layer3.0", "layer3.2"),
    "alexnet": ("features.2", "features.5", "features.7", "features.9", "features.11", "features.12"),
}
FLOAT = 4  # bytes
KINDS = ("pretrained", "random", "just links", "skip", "scratch", "exit")


@dataclasses.dataclass(frozen=True)
class Row:
    """A path, or an early exit beside it, and how it is trained.

    Args:
        kind: ``pretrained``, ``random`` or ``scratch``: what the host's weights are, and whether they learn with the
            links; ``just links``; ``skip``; ``exit``: an early exit at the end of block lout.
        path: lout, hin, hout and lin.
        host: Name of the host; empty where there is none.
        links: Settings of the links.
        images: Number of training images.
        epochs: Over them.
        batch: Images of a step.
        rate: Highest learning rate.
        seed: Of the links, a random host, and the order of images.
    """

    kind: str
    path: tuple[int | None, ...]
    host: str
    links: Mapping[str, Any]
    images: int
    epochs: int
    batch: int
    rate: float
    seed: int


class Pairs:
    """A local network and its hosts, each trained when it is first asked for, and the images of links.

    Args:
        local: Settings of the local network.
        hosts: Those of the hosts, by name.
        images: Images by split and owner.
        folder: Where networks and results are kept.
    """

    def __init__(
        self, local: Settings, hosts: Mapping[str, Settings], images: Mapping[str, Mapping[str, Images]], folder: Path
    ) -> None:
        self.settings = {"": local, **hosts}
        self.images, self.folder = images, folder
        self.train, self.test = images["train"]["local"], images["test"]["local"]
        self.sample = normalise(self.test.pixels[:2])
        self._stored: dict[Any, dict[str, Tensor]] = {}

    @functools.cache  # noqa: B019 (there is one for the whole run)
    def network(self, host: str = "") -> nn.Module:
        """Return a host by its name, or the local network."""
        return trained(self.settings[host], self.images["train"]["host" if host else "local"], self.folder)

    @functools.cache  # noqa: B019
    def accuracy(self, host: str = "") -> float:
        """Return the accuracy of a network on test images of its own classes."""
        return accuracy(self.network(host), self.images["test"]["host" if host else "local"])

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The local network's blocks, which all paths share."""
        return cut_blocks(self.network(), self.sample, LOCAL_BLOCKS, "local")

    @functools.cached_property
    def teacher(self) -> Frozen:
        """The local network as a whole."""
        return Frozen(staged_network(self.network(), self.sample))

    def result(self, row: Row) -> dict[str, Any]:
        """Return what a row came to; it is trained unless its result is kept."""
        file = self.file(row)
        if not file.exists():
            found = dataclasses.asdict(row) | self._measured(row)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=2) + "\n")
            partial.replace(file)
            words = f"{row.kind} {list(row.path)} {row.host or 'no host'}, seed {row.seed}"
            print(f"{words}: {100 * found['accuracy']:.2f} %, {found['seconds']:.0f} s", flush=True)
        return json.loads(file.read_text())

    def known(self, row: Row) -> dict[str, Any] | None:
        """Return what a row came to, ``None`` where it was not trained yet."""
        return json.loads(self.file(row).read_text()) if self.file(row).exists() else None

    def file(self, row: Row) -> Path:
        """Return the file of a row's result, named after all that it depends on."""
        networks = {owner: self.settings[owner]._asdict() for owner in {"", row.host}}
        counts = {owner: len(images.labels) for owner, images in self.images["train"].items()}
        settings = {"row": dataclasses.asdict(row), "networks": networks, "images": counts}
        return self.folder / "rows" / f"{row.kind.replace(' ', '_')}_{key(settings)}.json"

    def linked(self, row: Row) -> StagedNetwork:
        """Return the network of a row's path, its links untrained."""
        host = None
        if row.kind != "skip":
            random = self.settings[row.host]._replace(seed=100 + row.seed)
            given = network(random) if row.kind in ("random", "scratch") else self.network(row.host)
            host = cut_blocks(given, self.sample, HOST_BLOCKS[row.host], "host")
        torch.manual_seed(row.seed)
        return link_blocks(self.blocks, host, row.path, row.links, use_host=row.kind != "just links")

    def task(self, row: Row, **settings: Any) -> Task:
        """Return the task that trains a row."""
        training = Training(functools.partial(torch.optim.AdamW, lr=row.rate), seed=row.seed, channels_last=True)
        if row.kind == "exit":
            torch.manual_seed(row.seed)
            exits = multi_exit_network(self.network(), self.sample, at=[LOCAL_BLOCKS[row.path[0] or 0]])
            return ExitsDistilled(exits, loss=ExitDistillationLoss(), train=["exits"], training=training, evaluators=[])
        return Links(
            self.linked(row),
            loss=nn.CrossEntropyLoss(),
            distillation=KnowledgeDistillationLoss(alpha=0.0),
            others={"teacher": self.teacher},
            train=["links", "host"] if row.kind == "scratch" else None,
            training=training,
            evaluators=[],
            **settings,
        )

    def stored(self, task: Task, images: Images, name: str) -> dict[str, Tensor]:
        """Return what the frozen parts make of images: what Cleave's feature cache would store, in memory."""
        stored = task.stored()
        place = (name, len(images.labels), str(stored.outputs))
        if place not in self._stored:
            self._stored = {known: value for known, value in self._stored.items() if known[2] == place[2]}
            task.network.eval()
            networks = {owner: task.network_of(owner) for owner in task.asked}
            with torch.no_grad():
                found = [stored.compute(networks, normalise(pixels)) for pixels in images.pixels.split(500)]
            self._stored[place] = {output: torch.cat([each[output] for each in found]) for output in found[0]}
        return self._stored[place]

    def _measured(self, row: Row) -> dict[str, Any]:
        task, images = self.task(row), self.train.share(row.images)
        given, held = self.stored(task, images, "train"), self.stored(task, self.test, "test")
        seconds = fit(task, given, images.labels, row)
        answer = f"{LOCAL_BLOCKS[row.path[0] or 0]}/logits" if row.kind == "exit" else "logits"
        found = {"accuracy": measured_accuracy(task, held, self.test.labels, answer), "seconds": seconds}
        return found | (exit_costs(task.network) if row.kind == "exit" else costs(task.network))


def fit(task: Task, given: Mapping[str, Tensor], labels: Tensor, row: Row) -> float:
    """Train a task on what is stored of the images; return the seconds of this process."""
    task.set_modes()
    optimizer = task.settings.optimizer(task.parameter_groups())
    steps = row.epochs * (len(labels) // row.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(factor, steps=steps))
    start = time.process_time()
    for epoch in range(row.epochs):
        for chosen in batches(len(labels), row.seed, epoch, row.batch):
            loss = torch.stack(list(task.training_loss(batch_of(given, labels, chosen)).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return time.process_time() - start


def factor(step: int, steps: int) -> float:
    """Return the factor on the learning rate: up in a tenth of the steps, then down a cosine."""
    return min((step + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def batch_of(given: Mapping[str, Tensor], labels: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Return a batch of what is stored."""
    return {"labels": labels[chosen], "given": {name: _pick(value, chosen) for name, value in given.items()}}


def _pick(values: Tensor, chosen: Tensor | slice) -> Tensor:
    picked = values[chosen]
    return picked.contiguous(memory_format=torch.channels_last) if picked.ndim == 4 else picked


@torch.no_grad()
def measured_accuracy(task: Task, given: Mapping[str, Tensor], labels: Tensor, answer: str) -> float:
    """Return the share of images that a trained network answers rightly."""
    task.network.eval()
    own = {name.removeprefix("student/"): value for name, value in given.items() if name.startswith("student/")}
    right = 0
    for start in range(0, len(labels), 500):
        part = slice(start, start + 500)
        known = {name: _pick(value, part) for name, value in own.items()}
        answers = task.network.outputs(None, [answer], given=known)[answer].argmax(1)
        right += int((answers == labels[part]).sum())
    return right / len(labels)


def costs(net: StagedNetwork) -> dict[str, Any]:
    """Return MACs and parameters of a path's parts, and the bytes that cross as float32."""
    found = path_costs(net)
    assert found is not None
    crossing = [link for link in net.links.values() if link.owner == "host"]
    sent = {"bytes_up": 0, "bytes_down": 0}
    if crossing:
        up, down = crossing[0].source.shape, crossing[-1].target.shape
        sent = {"bytes_up": FLOAT * torch.Size(up).numel(), "bytes_down": FLOAT * torch.Size(down).numel()}
    return dataclasses.asdict(found) | sent


def exit_costs(net: StagedNetwork) -> dict[str, Any]:
    """Return MACs and parameters of a local network up to its early exit."""
    parts = net.costs()
    number = next(i for i, cost in enumerate(parts) if cost.kind == "exit")
    work = {"kept": parts[:number], "skipped": parts[number + 1 :], "host": [], "links": [], "inserts": [parts[number]]}
    found: dict[str, Any] = {
        name: {"macs": sum(cost.macs for cost in some), "params": sum(cost.params for cost in some)}
        for name, some in work.items()
    }
    return found | {"bytes_up": 0, "bytes_down": 0}
