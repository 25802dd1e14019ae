"""Generalised head-network distillation: the student mimics the teacher at several layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

from torch import Tensor, nn

from cleave.losses.head_distillation import HeadDistillationLoss


class GeneralizedHeadDistillationLoss(nn.Module):
    r"""Weighted squared errors between student and teacher at named layers, summed per sample, averaged over the batch.

    .. math:: L = \sum_j \lambda_j \, \frac{1}{B} \sum_{b=1}^{B} \lVert s_{j,b} - t_{j,b} \rVert_2^2

    eq. 7 of Matsubara, Levorato and Restuccia, "Split Computing and Early Exiting for Deep Learning Applications",
    2022; from Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
    Challenged Networks", 2020. With one layer and λ = 1 it is :class:`~cleave.losses.HeadDistillationLoss`.

    Args:
        weights: λ ≥ 0 of each layer by its name, at least one above 0. A layer of weight 0 is left out: neither
            network need compute it.

    Attributes:
        weights: The layers that are compared, those of λ > 0, in the order given.

    Shape:
        - student, teacher: features (B, ...) by layer; further layers are ignored, and no gradient flows into the
          teacher's.
        - output: the weighted error of each layer by its name, scalars in squared units of the features.

    Raises:
        ValueError: A weight is out of its range or none is above 0, a layer is missing, or its two features differ in
            shape; the message names the layer.

    Example:
        >>> import torch
        >>> objective = GeneralizedHeadDistillationLoss({"layer1": 1.0, "layer2": 0.5})
        >>> student = {"layer1": torch.ones(2, 3), "layer2": torch.ones(2, 4)}
        >>> teacher = {"layer1": torch.zeros(2, 3), "layer2": torch.zeros(2, 4)}
        >>> objective(student, teacher)
        {'layer1': tensor(3.), 'layer2': tensor(2.)}
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for layer, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights: {layer!r} must have a finite weight of at least 0, got {weight}")
        self.weights = {layer: weight for layer, weight in weights.items() if weight > 0}
        if not self.weights:
            raise ValueError(f"weights must give at least one layer a weight above 0, got {dict(weights)}")
        self.distance = HeadDistillationLoss()

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted error of each layer by its name; their sum is what is minimised."""
        terms = {}
        for layer, weight in self.weights.items():
            ours, theirs = _feature(student, layer, "student"), _feature(teacher, layer, "teacher")
            try:
                terms[layer] = weight * self.distance(ours, theirs)
            except ValueError as error:
                raise ValueError(f"layer {layer!r}: {error}") from error
        return terms

    def extra_repr(self) -> str:
        """Show the weights in the printed module."""
        return f"weights={self.weights}"


def _feature(features: Mapping[str, Tensor], layer: str, owner: str) -> Tensor:
    if layer in features:
        return features[layer]
    close = difflib.get_close_matches(layer, features)
    hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"weights names layer {layer!r}, but the {owner}'s features have {', '.join(features) or 'no layer'}.{hint}"
    )
