"""Five classes of a folder of images for a local network, the others for its hosts, and these networks themselves.

The local network has public weights, which have seen all classes of the data; so hosts are trained from scratch, on the
classes that the local network does not answer. What was trained is kept in a folder, epoch by epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures import create_backbone

SIZE, CLASSES, BATCH = 32, 5, 128


class Images(NamedTuple):
    """Images of five classes.

    Attributes:
        pixels: (N, 3, 32, 32), bytes.
        labels: (N,), 0 to 4.
    """

    pixels: Tensor
    labels: Tensor

    def share(self, count: int, seed: int = 0) -> Images:
        """Return some images, the same share of all classes but for chance, always the same ones."""
        chosen = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.pixels[chosen], self.labels[chosen])


class Settings(NamedTuple):
    """How a network is made and trained.

    Args:
        name: Of the network in the zoo.
        epochs: Over all images of its classes.
        rate: Highest learning rate.
        kwargs: Arguments of its constructor.
        weights: File of the weights that it starts from; empty: random ones.
        seed: Of the random weights and the order of images.
    """

    name: str
    epochs: int
    rate: float
    kwargs: Mapping[str, Any]
    weights: str = ""
    seed: int = 0


def load_images(data: Path, folder: Path) -> dict[str, dict[str, Images]]:
    """Return the images of ``train`` and ``test``, each of the first five classes as ``local``, others as ``host``.

    They are decoded once and kept in a file of the folder.
    """
    names = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    found: dict[str, dict[str, Images]] = {}
    for split in ("train", "test"):
        for owner, chosen in (("local", names[:CLASSES]), ("host", names[CLASSES : 2 * CLASSES])):
            file = folder / f"images_{split}_{owner}.pt"
            if not file.exists():
                save(file, _decode([data / split / name for name in chosen]))
            stored = torch.load(file, weights_only=True)
            found.setdefault(split, {})[owner] = Images(stored["pixels"], stored["labels"])
    return found


def _decode(folders: Sequence[Path]) -> dict[str, Tensor]:
    pixels, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            with Image.open(file) as image:
                data = bytearray(image.convert("RGB").tobytes())
            pixels.append(torch.frombuffer(data, dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1))
            labels.append(label)
    return {"pixels": torch.stack(pixels), "labels": torch.tensor(labels)}


def network(settings: Settings) -> nn.Module:
    """Return an untrained network of five classes; of public weights it keeps the first five classes."""
    torch.manual_seed(settings.seed)
    if not settings.weights:
        return create_backbone("cifar", settings.name, CLASSES, kwargs=settings.kwargs).network
    found = create_backbone("cifar", settings.name, 2 * CLASSES, weights=settings.weights, kwargs=settings.kwargs)
    whole = found.network.get_submodule(found.classifier[0])
    kept = nn.Linear(whole.in_features, CLASSES)
    with torch.no_grad():
        kept.weight.copy_(whole.weight[:CLASSES])
        kept.bias.copy_(whole.bias[:CLASSES])
    found.network.set_submodule(found.classifier[0], kept)
    return found.network


def normalise(pixels: Tensor) -> Tensor:
    """Return bytes as the networks of the zoo read them."""
    image = create_backbone_input()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (image.mean, image.std))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def create_backbone_input() -> Any:
    """Return the input that the networks of the zoo expect, which is the same for all."""
    global _INPUT
    if _INPUT is None:
        _INPUT = create_backbone("cifar", "resnet20", CLASSES).input
    return _INPUT


_INPUT: Any = None


def batches(count: int, seed: int, epoch: int, size: int = BATCH) -> Iterator[Tensor]:
    """Yield the numbers of the images of an epoch's batches; those that fill none are left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(10_007 * seed + epoch))
    yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def trained(settings: Settings, images: Images, folder: Path) -> nn.Module:
    """Return a trained network, as kept in the folder; an interrupted training goes on after its last whole epoch."""
    net = network(settings).to(memory_format=torch.channels_last)
    file = folder / f"{settings.name}_{key(settings._asdict() | {'images': len(images.labels)})}.pt"
    steps = settings.epochs * (len(images.labels) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=steps + 1, pct_start=0.25)
    parts = {"network": net, "optimizer": optimizer, "scheduler": scheduler}
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, settings.epochs):
        net.train()
        for chosen in batches(len(images.labels), settings.seed, epoch):
            x = normalise(images.pixels[chosen])
            flip = torch.rand(len(x), 1, 1, 1) < 0.5
            loss = F.cross_entropy(net(torch.where(flip, x.flip(3), x)), images.labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
        save(file, {"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}})
        print(f"{settings.name}: epoch {epoch + 1} of {settings.epochs}, loss {loss.item():.3f}", flush=True)
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: nn.Module, images: Images) -> float:
    """Return the share of images that a network answers rightly."""
    net.eval()
    answers = torch.cat([net(normalise(pixels)).argmax(1) for pixels in images.pixels.split(500)])
    return (answers == images.labels).float().mean().item()


def key(values: Mapping[str, Any]) -> str:
    """Return a short digest of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def save(file: Path, values: Any) -> None:
    """Write a file as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(values, partial)
    partial.replace(file)
