"""What a network sends: its bottlenecks, the widths of their codes, their ranges and the links behind them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from cleave.architectures.inserts.bottleneck import Bottleneck
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.insert import Insert
from cleave.architectures.modes import evaluating
from cleave.architectures.network.named_outputs import NamedOutputs
from cleave.architectures.network.outputs import child_name


class Sending(NamedOutputs):
    """Base of a network with bottlenecks behind its cuts."""

    input_shape: tuple[int, ...]

    def inserts_at(self, cut: str) -> list[Insert]:
        """Return the inserts behind a cut in the order in which they pass the feature on."""
        child = self._modules.get(child_name(cut))
        return [] if child is None else [cast(Insert, insert) for insert in child.children()]

    @property
    def bottlenecks(self) -> dict[str, Bottleneck]:
        """The bottlenecks by the cut they stand at, in order."""
        found = ((cut, insert) for cut in self.cuts for insert in self.inserts_at(cut))
        return {cut: insert for cut, insert in found if isinstance(insert, Bottleneck)}

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The widths in bits of each bottleneck that knows several."""
        return {cut: bottleneck.widths for cut, bottleneck in self.bottlenecks.items() if bottleneck.widths}

    def bits(self, at: str | None = None) -> int | None:
        """Return the width of the codes at a cut, or at the first; ``None`` under a prior and where nothing is sent."""
        if at is None and not self.bottlenecks:
            return None
        return self._bottlenecks_at(at, "a width")[0].bits

    def set_bits(self, bits: int, at: str | None = None) -> None:
        """Change the width of the codes of one bottleneck, or of all; see :meth:`Bottleneck.set_bits`.

        Raises:
            ValueError: There is no bottleneck, or one cannot have this width.
        """
        for bottleneck in self._bottlenecks_at(at, f"bits={bits}"):
            bottleneck.set_bits(bits)
        self._replan()

    def set_channel(self, channel: Channel | None, at: str | None = None) -> None:
        """Put another link behind one bottleneck, or behind all, or none.

        Raises:
            ValueError: There is no bottleneck, or a link cannot carry what its quantiser makes.
        """
        if channel is None and at is None and not self.bottlenecks:
            return
        for bottleneck in self._bottlenecks_at(at, "a channel"):
            bottleneck.set_channel(copy.deepcopy(channel))
        self._replan()

    def calibrate(
        self, batches: Sequence[Tensor] | Iterable[Tensor], at: str, bits: int, method: str = "mse"
    ) -> tuple[float, float]:
        """Give a bottleneck that was trained in float codes of some width, their range chosen on batches of inputs.

        Returns:
            The range (low, high).
        """
        (bottleneck,) = self._bottlenecks_at(at, "a range")
        with evaluating(self), torch.no_grad():
            name = f"{at}/{self.bottlenecks[at].quantised}"
            representations = (self.outputs(batch, [name])[name] for batch in batches)
            found = bottleneck.calibrate(representations, bits, method)
        bottleneck.quantizer.train(bottleneck.training)  # it may be a new one
        self._replan()
        return found

    def _replan(self) -> None:
        """Look anew at what is computed: whether something is drawn or altered at a bottleneck has changed."""
        raise NotImplementedError

    def _bottlenecks_at(self, at: str | None, what: str) -> list[Bottleneck]:
        """Return one bottleneck, or all."""
        found = self.bottlenecks
        if not found:
            raise ValueError(f"{what} has no meaning: this network is not split")
        if at is None:
            return list(found.values())
        if at not in found:
            raise ValueError(f"there is no bottleneck at {at!r}; there are some at {', '.join(found)}")
        return [found[at]]

    def sizes(self, at: str) -> dict[str, int]:
        """Return the bytes per sample that a payload is judged by: the uint8 input, the float32 feature at a cut."""
        return {"input": math.prod(self.input_shape), "feature": 4 * math.prod(self.shapes[at])}
