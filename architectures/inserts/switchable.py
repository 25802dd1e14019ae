"""BatchNorm with one set of statistics per code width, for networks that run at several widths."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.deployment import check_bits


class SwitchableBatchNorm2d(nn.Module):
    """BatchNorm with its own statistics and affine parameters for each width of the codes.

    Codes of 2 and of 8 bits give features of other means and variances, which one set of running statistics averages
    into something that fits neither; all other weights are shared (Yu et al., "Slimmable Neural Networks", 2019, for
    widths of layers; Jin, Yang and Liao, "AdaBits: Neural Network Quantization with Adaptive Bit-Widths", 2020, for
    bits).

    The choice, :meth:`select`, is state of the module that no state dict holds, and at first the largest width. Threads
    that run different widths at once need a copy each, or an exported partition, which takes the width as an input.

    Args:
        norm: The layer to switch, with which each width starts: torch's, or timm's, which also activates.
        widths: Two or more different widths in bits, 2 to 16.

    Attributes:
        sets: The layers by width, as a string: ``layer.sets["4"]``.
        widths: The widths in ascending order.

    Shape:
        - input and output: (B, C, H, W).

    Raises:
        ValueError: The widths are out of range, repeated or fewer than two, or the layer does something else.

    Example:
        >>> layer = SwitchableBatchNorm2d(nn.BatchNorm2d(3), widths=(2, 4)).eval()
        >>> layer.sets["2"].running_mean.fill_(1.0)
        tensor([1., 1., 1.])
        >>> x = torch.zeros(1, 3, 1, 1)
        >>> layer.select(4)(x).flatten(), layer.select(torch.tensor(2**2))(x).flatten()
        (tensor([0., 0., 0.], grad_fn=<...>), tensor([-1.0000, -1.0000, -1.0000], grad_fn=<...>))
    """

    _bits: Tensor

    def __init__(self, norm: nn.BatchNorm2d, widths: Sequence[int]) -> None:
        super().__init__()
        if type(norm).forward not in (nn.BatchNorm2d.forward, BatchNormAct2d.forward):
            raise ValueError(
                f"only BatchNorm2d of torch and BatchNormAct2d of timm can switch, got {type(norm).__name__}"
            )
        self.widths = _checked_widths(widths)
        self.sets = nn.ModuleDict({str(width): copy.deepcopy(norm) for width in self.widths})
        self.register_buffer("_bits", torch.tensor(self.widths), persistent=False)
        self._selected: int | Tensor = self.widths[-1]
        self.train(norm.training)

    def select(self, width: int | Tensor) -> SwitchableBatchNorm2d:
        """Choose the set for what runs next, and return the layer.

        Args:
            width: Bits as an integer, or, in eval mode alone, the number of levels 2**bits as a scalar int64 tensor;
                then the set is looked up by tensor operations, so that a trace takes the width as an input. A width
                that was not trained takes the nearest one, of two equally near ones the larger.

        Raises:
            ValueError: In training mode: a tensor, or a width that is not trained.
        """
        if isinstance(width, Tensor):
            self._refuse_in_training(f"the tensor {width.dtype} of shape {tuple(width.shape)}")
            self._selected = width
            return self
        check_bits(width)
        if width not in self.widths:
            self._refuse_in_training(str(width))
        # A quarter of a bit up: of two equally near widths the larger one wins, and no other order changes.
        self._selected = min(self.widths, key=lambda trained: abs(width + 0.25 - trained))
        return self

    def idle(self) -> list[nn.Module]:
        """Return the sets that are not chosen."""
        return [norm for width, norm in self.sets.items() if width != str(self._selected)]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the chosen set, the only one whose running statistics move in training."""
        if isinstance(self._selected, Tensor):
            self._refuse_in_training("a tensor")
            return self._look_up(x, self._selected)
        return self.sets[str(self._selected)](x)

    def _look_up(self, x: Tensor, levels: Tensor) -> Tensor:
        nearest = (levels.log2() + 0.25 - self._bits).abs().argmin().view(1)
        layers: list[Any] = list(self.sets.values())
        mean, variance, weight, bias = (
            None
            if getattr(layers[0], name) is None
            else torch.stack([getattr(layer, name) for layer in layers]).index_select(0, nearest)[0]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        y = F.batch_norm(x, mean, variance, weight, bias, training=mean is None, eps=layers[0].eps)
        return layers[0].act(layers[0].drop(y)) if isinstance(layers[0], BatchNormAct2d) else y

    def _refuse_in_training(self, selected: str) -> None:
        if self.training:
            raise ValueError(
                f"in training a switchable BatchNorm runs at one of its widths {self.widths} in bits, got {selected}; "
                "select one of them"
            )

    def extra_repr(self) -> str:
        """Show the widths in the printed module."""
        return f"widths={self.widths}"


def switchable(module: nn.Module, widths: Sequence[int]) -> nn.Module:
    """Make every BatchNorm2d of a module switchable, in place; each width starts from the layer's present state.

    Args:
        module: Module to change; one without BatchNorm2d stays as it is.
        widths: Widths in bits, as of :class:`SwitchableBatchNorm2d`.

    Returns:
        The module, or the layer that stands for it where it is itself a BatchNorm2d.

    Raises:
        ValueError: The widths are out of range, or the module is switchable already.
    """
    _checked_widths(widths)
    if any(isinstance(part, SwitchableBatchNorm2d) for part in module.modules()):
        raise ValueError("the module is switchable already; build it anew to change its widths")
    replaced: dict[nn.Module, nn.Module] = {}  # a layer used in two places stays one

    def replace(part: nn.Module) -> nn.Module:
        if isinstance(part, nn.BatchNorm2d):
            return replaced.setdefault(part, SwitchableBatchNorm2d(part, widths))
        for name, child in part.named_children():
            setattr(part, name, replace(child))
        return part

    return replace(module)


def select(module: nn.Module, width: int | Tensor) -> None:
    """Choose the width for every switchable layer of a module; see :meth:`SwitchableBatchNorm2d.select`."""
    for part in module.modules():
        if isinstance(part, SwitchableBatchNorm2d):
            part.select(width)


def draw_width(widths: Sequence[int], *key: int) -> int:
    """Draw a width evenly, for one step of training.

    The draw depends on ``key`` alone and moves no generator: ranks that name a step alike train it at one width, as
    averaging their gradients and statistics asks for, and a resumed run repeats it.

    Args:
        widths: Widths in bits.
        *key: What names the step, such as seed, epoch and batch; never the rank.

    Example:
        >>> [draw_width((2, 4, 8), 0, 0, batch) for batch in range(8)]
        [8, 2, 2, 8, 2, 4, 4, 4]
    """
    digest = hashlib.blake2b("/".join(map(str, ("width", *key))).encode(), digest_size=8).digest()
    return list(widths)[int.from_bytes(digest, "little") % len(widths)]


def _checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    ordered = tuple(sorted(check_bits(width) for width in widths))
    if len(set(ordered)) < max(2, len(ordered)) or ordered[-1] == 32:
        raise ValueError(f"widths must be two or more different widths of 2 to 16 bits, got {list(widths)}")
    return ordered
