"""The early exit: an insert that classifies the feature at a cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.backbones.norms import norm_of
from cleave.architectures.inserts.coders import MAP_LAYOUTS, VECTOR_LAYOUTS, Permute, conv_block
from cleave.architectures.inserts.insert import IN, Half, Halves, Insert, Step
from cleave.architectures.naming import whole_number

POOLINGS = ("average", "max", "mix")


class Shrink(nn.Module):
    """Average a map (B, C, H, W) down to at most ``size`` rows and columns; a smaller one passes as it is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, no larger than asked for."""
        rows, columns = min(self.size, x.shape[-2]), min(self.size, x.shape[-1])
        return x if (rows, columns) == tuple(x.shape[-2:]) else F.adaptive_avg_pool2d(x, (rows, columns))

    def extra_repr(self) -> str:
        """Show the size in the printed module."""
        return f"size={self.size}"


class Pool(nn.Module):
    """Pool maps (B, C, H, W) to a grid, or tokens (B, L, C) to one vector: by average, maximum, or a learned mix.

    The mix is a·max + (1 − a)·average with one learned a in (0, 1) (Lee, Gallagher and Tu 2016, "Generalizing Pooling
    Functions in Convolutional Neural Networks"), which Shallow-Deep Networks put before their exits.
    """

    def __init__(self, pooling: str, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.pooling = pooling
        self.grid = grid
        self.mix = nn.Parameter(torch.zeros(())) if pooling == "mix" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector a sample, (B, C · rows · columns) or (B, C)."""
        if self.mix is None:
            return self._average(x) if self.pooling == "average" else self._maximum(x)
        share = torch.sigmoid(self.mix)
        return share * self._maximum(x) + (1 - share) * self._average(x)

    def _average(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.grid is None else F.adaptive_avg_pool2d(x, self.grid).flatten(1)

    def _maximum(self, x: Tensor) -> Tensor:
        return x.amax(1) if self.grid is None else F.adaptive_max_pool2d(x, self.grid).flatten(1)

    def extra_repr(self) -> str:
        """Show pooling and grid in the printed module."""
        return self.pooling if self.grid is None else f"{self.pooling}, {self.grid[0]}x{self.grid[1]}"


class ExitHead(Insert):
    """An early exit's classifier: reduce → hidden layers → pooling → linear layer.

    ``reduce`` has no parameters, so that of a frozen backbone its output can be computed once and stored. Convolutions
    come with a norm and ReLU; tokens and flat vectors take linear layers with GELU in their place, and a LayerNorm
    before the classifier, which their features lack inside a network.

    Args:
        shape: Per-sample shape of the feature, in ``layout``.
        layout: ``NCHW``, ``NHWC`` (Swin), ``NLC`` (ViT) or ``NC``.
        classes: Number of classes.
        pooling: ``average``, ``max``, or ``mix``, which learns how much of each.
        grid: Rows and columns that a map is pooled to before the linear layer.
        size: Rows and columns that a map is averaged down to before anything else; ``None`` keeps it whole.
        convs: Hidden layers, 0 to 2.
        width: Their channels; ``None`` takes those of the feature.
        kernel: Odd kernel size of the convolutions.
        norm: ``batch``, or ``group`` for GroupNorm, which DP-SGD needs.
        cascade: Whether the linear layer also reads the class probabilities of the exit before (B, classes), which
            learn nothing from it (Wołczyk et al. 2021, "Zero Time Waste", cascade connections).

    Attributes:
        before: Output of the exit before, which an exit of a cascade reads; the network says it.

    Raises:
        ValueError: An argument is out of range, or no head fits a feature of this layout.

    Example:
        >>> head = ExitHead((16, 32, 32), "NCHW", classes=10, pooling="mix", grid=4, convs=1)
        >>> head(torch.randn(2, 16, 32, 32)).shape
        torch.Size([2, 10])
    """

    kind = "exit"
    passes = False
    emits = ("reduced", "logits")

    def __init__(
        self,
        shape: tuple[int, ...],
        layout: str,
        classes: int,
        *,
        pooling: str = "mix",
        grid: int = 4,
        size: int | None = 8,
        convs: int = 1,
        width: int | None = None,
        kernel: int = 3,
        norm: str = "batch",
        cascade: bool = False,
    ) -> None:
        super().__init__()
        _check(pooling, grid, size, convs, width, kernel, norm)
        self.cascade = cascade
        self.before: str | None = None
        vectors = layout in VECTOR_LAYOUTS
        if not vectors and layout not in MAP_LAYOUTS:
            raise ValueError(
                f"no exit fits the feature {shape} of layout {layout!r}; place it where the layout is one of "
                f"{', '.join((*MAP_LAYOUTS, *VECTOR_LAYOUTS))}"
            )
        channels = shape[0] if layout == "NCHW" else shape[-1]
        reduce: list[nn.Module] = [Permute(0, 3, 1, 2)] if layout == "NHWC" else []
        if not vectors and size is not None:
            reduce.append(Shrink(size))
        self.reduce = nn.Sequential(*reduce)
        hidden: list[nn.Module] = []
        for _ in range(convs):
            outputs = width or channels
            hidden += _linear(channels, outputs) if vectors else conv_block(channels, outputs, kernel, norm=norm)
            channels = outputs
        self.hidden = nn.Sequential(*hidden)
        rows, columns = shape[1:] if layout == "NCHW" else shape[:2] if layout == "NHWC" else (1, 1)
        cells = (min(grid, rows, size or rows), min(grid, columns, size or columns))
        self.pool = nn.Identity() if layout == "NC" else Pool(pooling, None if vectors else cells)
        features = channels if vectors else channels * cells[0] * cells[1]
        self.norm = nn.Identity() if layout == "NCHW" else nn.LayerNorm(features)
        self.classifier = nn.Linear(features + (classes if cascade else 0), classes)

    def steps(self) -> list[Step]:
        """Return its computations: reduce at once, what is learned behind all stages."""
        before = () if self.before is None else (self.before,)
        return [
            Step("reduce_feature", (IN,), ("reduced",), kind=self.kind),
            Step("classify", ("reduced", *before), ("logits",), ("exits",), kind=self.kind, late=True),
        ]

    def parts(self) -> dict[str, nn.Module]:
        """Return the whole, one of the network's ``exits``."""
        return {"exits": self}

    def leaves(self) -> list[nn.Module]:
        """Return the hidden layers."""
        return [self.hidden] if len(self.hidden) else []

    def halves(self) -> Halves:
        """Return the whole, which sends nothing."""
        return Halves(Half(self, (IN,) if self.before is None else (IN, self.before), ("logits",)))

    def reduce_feature(self, feature: Tensor) -> Tensor:
        """Return what the classifier reads of a feature (B, *shape)."""
        return self.reduce(feature)

    def forward(self, feature: Tensor, before: Tensor | None = None) -> Tensor:
        """Map a feature (B, *shape), and in a cascade the logits of the exit before, to logits (B, classes)."""
        return self.classify(self.reduce(feature), before)

    def classify(self, reduced: Tensor, before: Tensor | None = None) -> Tensor:
        """Map what ``reduce`` made of a feature to logits (B, classes)."""
        vector = self.norm(self.pool(self.hidden(reduced)))
        if self.cascade:
            if before is None:
                raise ValueError("an exit of a cascade reads the logits of the exit before it, got none")
            vector = torch.cat([vector, before.detach().softmax(1).to(vector.dtype)], dim=1)
        return self.classifier(vector)


def _linear(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.GELU()]


def _check(pooling: str, grid: int, size: int | None, convs: int, width: int | None, kernel: int, norm: str) -> None:
    norm_of(norm, 1)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    for name, value, least in (("grid", grid, 1), ("size", size, 1), ("convs", convs, 0), ("width", width, 1)):
        if value is not None or name not in ("size", "width"):
            whole_number(name, value, least)
    if convs > 2:
        raise ValueError(f"convs must be 0, 1 or 2, got {convs}; a deeper exit is better placed later")
    if whole_number("kernel", kernel) % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}; use {kernel - 1} or {kernel + 1}")
