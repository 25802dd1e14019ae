"""A tiny network of every family, shared by the tests of architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cleave.architectures import GaussianNoise, Insert, PacketLoss, StagedNetwork, entropy_codec, staged_network

Network = TypeVar("Network", bound=nn.Module)
CLASSES = 4
SAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CODERS = {"channels": 3, "width": 8}
CODES = {"bits": 4, "range": "sample"}


class Tiny(nn.Module):
    """Three convolutions; the last two begin with a layer that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.layer2 = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3, stride=2, padding=1))
        self.layer3 = nn.Sequential(
            nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Noise(Insert):
    """Noise on a feature in training, in place, beside how loud it is for each channel."""

    kind = "noise"
    emits = ("level",)

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self.level.expand(len(x), -1)
        if self.training:
            x.add_(level[..., None, None] * torch.randn_like(x))
        return x, level


_EXITS = {"exits": ["layer1", "layer2"], "exit_head": {"grid": 2, "width": 4}}
_SPLIT = {"split": "layer1", "form": "insert", "bottleneck": CODERS, "codec": CODES, "cuts": ["layer2"]}
_LOSSY = PacketLoss(0.4, packet_elements=4, when="train")
_THREE = {
    "split": ["layer1", "layer2", "layer3"],
    "codec_at": {"layer1": {"bits": 4, "widths": [2, 4], "range": "sample"}, "layer2": entropy_codec},
}

FAMILIES: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "cuts": {"cuts": ["layer2", "layer1"]},
    "exits": _EXITS,
    "cascade": _EXITS | {"cascade": True},
    "ensemble": _EXITS | {"cascade": True, "ensemble": True},
    "equilibrium": _EXITS | {"gradient_equilibrium": True},
    "replace": _SPLIT | {"form": "replace"},
    "insert": _SPLIT,
    "none": _SPLIT | {"form": "none", "bottleneck": None},
    "float": _SPLIT | {"codec": {"bits": 32}},
    "observed": _SPLIT | {"codec": {"bits": 4}},
    "learned": _SPLIT | {"codec": {"bits": 4, "range": "learned"}},
    "prior": _SPLIT | {"codec": entropy_codec},
    "stochastic": _SPLIT | {"bottleneck": CODERS | {"variance": "learned"}},
    "lossy": _SPLIT | {"channel": _LOSSY},
    "widths": _SPLIT | {"form": "replace", "codec": {"bits": 4, "widths": [2, 4], "range": "sample"}},
    "noise": _SPLIT | {"inserts": {"layer2": [Noise]}},
    "noise where the head is replaced": _SPLIT | {"form": "replace", "inserts": {"layer1": [Noise]}},
    "exits, replaced": _EXITS | _SPLIT | {"form": "replace"},
    "exits, inserted": _EXITS | _SPLIT,
    "exits, no bottleneck": _EXITS | _SPLIT | {"form": "none", "bottleneck": None},
    "exits around a split": _EXITS | _SPLIT | {"exits": ["layer1", "layer3"], "split": "layer2", "cascade": True},
    "ensemble around a split": _EXITS | _SPLIT | {"ensemble": True, "cascade": True},
    "equilibrium and a split": _EXITS | _SPLIT | {"gradient_equilibrium": True},
    "equilibrium where the head is replaced": _EXITS | _SPLIT | {"gradient_equilibrium": True, "form": "replace"},
    "all at once": _EXITS
    | _SPLIT
    | {
        "codec": entropy_codec,
        "bottleneck": CODERS | {"variance": "learned"},
        "channel": GaussianNoise(10, when="train"),
        "gradient_equilibrium": True,
        "cascade": True,
        "ensemble": True,
        "inserts": {"layer2": [Noise]},
    },
    "exits and widths": _EXITS | _SPLIT | {"codec": {"bits": 4, "widths": [2, 4], "range": "sample"}},
    "two bottlenecks": _EXITS | _SPLIT | {"split": ["layer1", "layer2"]},
    "two, the first in place of the head": _SPLIT | {"split": ["layer2", "layer1"], "form": "replace"},
    "three bottlenecks": _SPLIT | _THREE,
    "three features": _SPLIT | _THREE | {"form": "none", "bottleneck": None},
    "three and exits": _EXITS | _SPLIT | _THREE | {"form": "replace", "channel": _LOSSY},
}
EXITS = [name for name, settings in FAMILIES.items() if "exits" in settings]
SPLIT = [name for name, settings in FAMILIES.items() if "split" in settings]


_MADE: list[tuple[Callable[[dict[str, Any]], nn.Module], dict[str, Any], nn.Module, Tensor]] = []


def made_once(make: Callable[[dict[str, Any]], Network], settings: dict[str, Any]) -> Network:
    """Return a deep copy of what was made of equal settings, as cutting takes longer than most tests.

    What draws next draws what it would draw behind the making itself, which has to seed its own draws. Settings hold no
    tensors, which cannot be compared as a whole.
    """
    for maker, known, network, state in _MADE:
        if maker is make and known == settings:
            torch.set_rng_state(state)
            return copy.deepcopy(cast(Network, network))
    network = make(settings)
    _MADE.append((make, settings, copy.deepcopy(network), torch.get_rng_state()))
    return network


def build(backbone: Callable[[], nn.Module], sample: Tensor, **settings: Any) -> StagedNetwork:
    """Return a network of some settings; inserts are given by their classes, so that each has its own."""
    torch.manual_seed(0)
    whole = backbone()
    settings["inserts"] = {cut: [kind() for kind in kinds] for cut, kinds in settings.get("inserts", {}).items()}
    return staged_network(whole, sample, **settings)


def family(name: str, **more: Any) -> StagedNetwork:
    """Return a network of a family, in eval mode, its weights random, its statistics and ranges those of a batch."""
    return made_once(_family, dict(FAMILIES[name]) | more)


def _family(settings: dict[str, Any]) -> StagedNetwork:
    network = build(Tiny, SAMPLE, **settings).train()
    for bits in next(iter(network.widths.values()), (None,)):
        if bits is not None:
            network.set_bits(bits, at=next(iter(network.widths)))
        network.outputs(batch(16, seed=5), network.emits)
    for bottleneck in network.bottlenecks.values():
        if bottleneck.has_prior and (encoder := list(bottleneck.encoder.parameters())):
            with torch.no_grad():  # beyond half a step, which would all be rounded to zero
                [weight.mul_(4) for weight in encoder if weight.ndim == 4]
    return network.eval()


def batch(count: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def seeded(network: StagedNetwork, names: Sequence[str], **more: Any) -> dict[str, Tensor]:
    """Return outputs with all that is drawn drawn from one seed."""
    inputs = more.pop("inputs", batch())
    torch.manual_seed(11)
    return network.outputs(inputs, names, **more)
