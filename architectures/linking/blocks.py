"""A network as the blocks between which paths leave and enter it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.copying import cut_copy
from cleave.architectures.costs import STAGE, Cost
from cleave.architectures.cutting.cut_points import cut_points, spread
from cleave.architectures.cutting.stages import CutError, Stages
from cleave.architectures.linking.feature import Feature, describe_feature
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.modes import evaluating
from cleave.architectures.network.outputs import FINAL, INPUT


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A network's own stages, cut once, of which any number of paths can be made; they share the stages.

    Attributes:
        owner: ``local`` or ``host``.
        stages: The stages, of a copy of the network.
        names: The last layer of each block, in order; the output layer follows the last one.
        features: The feature at each cut for the sample, and the results under ``logits``.
        sample: What the network was cut with.
        prefix: Tokens in front of its grids of tokens; ``None``: as few as leave a grid.
        aliases: Other names of layers by those of the cuts that end with the same tensor.
        source: The network that it was cut from.
    """

    owner: str
    stages: Stages
    names: tuple[str, ...]
    features: Mapping[str, Any]
    sample: Tensor
    prefix: int | None
    aliases: Mapping[str, str]
    source: nn.Module

    def numbers(self, first: int, last: int | None = None) -> range:
        """Return the numbers of the stages of the blocks from one to another, or to the end."""
        start = 0 if first == 0 else self.stages.names.index(self.names[first - 1]) + 1
        stop = len(self.stages) if last is None else self.stages.names.index(self.names[last]) + 1
        return range(start, stop)

    def before(self, block: int) -> Feature:
        """Describe what a block reads: the feature of the one before it, or the image.

        Raises:
            ValueError: No link fits it.
        """
        return self.behind(block - 1) if block else self._describe(self.sample, "NCHW", INPUT)

    def behind(self, block: int) -> Feature:
        """Describe what a block makes.

        Raises:
            ValueError: No link fits it.
        """
        name = self.names[block]
        return self._describe(self.features[name], self.stages.layouts[self.stages.names.index(name)], name)

    def layer(self, name: str) -> str:
        """Return the name of the cut that ends with a layer's tensor; a name that is no cut's stands for itself."""
        return self.aliases.get(name, name)

    def costs(self, numbers: Sequence[int]) -> list[Cost]:
        """Return the MACs per sample and the parameters of some stages."""
        found = []
        for number in numbers:
            cut = FINAL if number == len(self.stages) - 1 else self.stages.names[number]
            x = self.sample[:1] if number == 0 else self.features[self.stages.names[number - 1]]
            stage = self.stages[number]
            macs, params = count_macs(stage, x.clone()), count_params(stage)
            found.append(Cost(f"{self.owner}/{cut}", STAGE, macs, params, self.owner))
        return found

    def _describe(self, value: Tensor, layout: str, name: str) -> Feature:
        layout = "other" if name == INPUT and value.ndim != 4 else layout
        return describe_feature(value, layout, tuple(self.sample.shape[1:]), self.owner, name, self.prefix)


def cut_blocks(
    network: nn.Module,
    sample: Tensor,
    blocks: Sequence[str] | int,
    owner: str,
    *,
    cuts: Sequence[str] = (),
    prefix: int | None = None,
) -> Blocks:
    """Cut a copy of a network into blocks.

    Args:
        network: The network.
        sample: A batch of its inputs.
        blocks: The last layer of each block, by any name of its tensor; or their number, at even shares of the MACs.
        owner: ``local`` or ``host``.
        cuts: Further layers whose features are outputs.
        prefix: Tokens in front of its grids of tokens; ``None``: as few as leave a grid.

    Raises:
        CutError: A layer is unknown or cannot be cut at, or the network does not run on the sample.
        ValueError: There are no blocks.
    """
    if isinstance(blocks, str) or (not isinstance(blocks, int) and not blocks) or isinstance(blocks, bool):
        raise ValueError(f"{owner} blocks must be a list of layers or their number, got {blocks!r}")
    try:
        named = spread(cut_points(network, sample), blocks) if isinstance(blocks, int) else list(blocks)
        aliases = _aliases(network, [*named, *cuts], sample)
        known = [aliases.get(name, name) if name not in named else name for name in [*named, *cuts]]
        stages, features = cut_copy(network, list(dict.fromkeys(known)), sample)
    except Exception as error:
        size = "×".join(str(side) for side in sample.shape[-2:])
        fix = "set host.image_size to a size that it takes" if owner == "host" else "take other blocks"
        kind = CutError if isinstance(error, CutError) else ValueError
        raise kind(f"the {owner} network cannot be cut into blocks on images of {size}: {error}; or {fix}") from error
    names = tuple(name for name in stages.names if name in named)
    stages.eval()  # no path moves the statistics of what it borrows
    return Blocks(owner, stages, names, features, sample[:1], prefix, aliases, network)


def _aliases(network: nn.Module, cuts: Sequence[str], sample: Tensor) -> dict[str, str]:
    """Return for each layer that ends with the tensor of some cut the first such cut: ``layer1`` for ``layer1.2``."""
    ends: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            ends[name] = (value, value._version)  # kept, so that no other takes its place in memory

    layers = dict(network.named_modules())
    hooks = [
        layer.register_forward_hook(lambda *call, name=name: note(name, call[2])) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluating(network):
            network(sample[:1].clone())
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[tuple[int, int], str] = {}
    for name in (cut for cut in cuts if cut in ends):
        found.setdefault((id(ends[name][0]), ends[name][1]), name)
    return {name: cut for name, end in ends.items() if (cut := found.get((id(end[0]), end[1]))) is not None}
