"""Joint training of early exits: every exit learns from the labels, all at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from cleave.losses.exit_weights import WeightedExits, at_least_single


class JointExitLoss(WeightedExits):
    r"""Weighted sum of the cross entropies of all exits, the final classifier among them as the last.

    .. math:: L = \sum_{j=1}^{E} \lambda_j \, \frac{1}{B} \sum_{b=1}^{B} \mathrm{CE}(s_{j,b}, y_b)

    eq. 8 of Matsubara, Levorato and Restuccia, "Split Computing and Early Exiting for Deep Learning Applications",
    2022. The weights λ are given one by one, or by the name of a preset:

    - ``"equal"``: 1 for all.
    - ``"branchynet"``: 1 for every early exit, 0.3 for the last; Teerapittayanon, McDanel and Kung, "BranchyNet: Fast
      Inference via Early Exiting from Deep Neural Networks", 2016.
    - ``"linear"``: :math:`\lambda_j = j / \sum_i i`, so that later exits weigh more; Zhou et al., "BERT Loses Patience:
      Fast and Robust Inference with Early Exit", 2020.
    - ``"final"``: 1 for the last and 0 for all others, which trains the backbone alone.
    - ``"shallow_deep"``: 1 for the last; an early exit grows along the training from ``start`` to its relative cost,
      :math:`\lambda_j = \mathrm{start} + (C_j - \mathrm{start}) \cdot \mathrm{progress}`; Kaya, Hong and Dumitras,
      "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking", 2019.
    - ``"learned"``: :math:`\sum_j e^{-s_j} L_j + s_j` with a parameter s that begins at 0. For classification it is
      twice the objective of Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018,
      up to a constant, with :math:`s = \log \sigma^2 - \log 2`. Its optimum weighs an exit by :math:`1 / L_j`, and it
      falls below 0 where losses are small.

    The last two depend on the network: call ``bind`` before training. An exit whose weight is always 0 is not computed,
    so that neither its cost nor its NaNs arise, and gets no gradient.

    Args:
        weights: A preset, or λ ≥ 0 of each exit, the final classifier last, at least one above 0.
        label_smoothing: Share of the labels' mass that is spread over all classes, in [0, 1).
        start: What an early exit weighs at first with ``"shallow_deep"``, in [0, 1].

    Shape:
        - logits: E outputs (B, K), unnormalised, or all in one tensor (E, B, K).
        - labels: (B,), int64 in 0..K-1.
        - output: the weighted loss of each exit by its name, scalars in nats, float32 at least.

    Raises:
        ValueError: An argument is out of its range, or the weights do not fit the number of exits.

    Example:
        >>> import torch
        >>> logits = [torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])]
        >>> objective = JointExitLoss("branchynet")
        >>> objective.bind(["layer1", "layer2", "final"])
        >>> objective(logits, torch.tensor([0]))
        {'layer1': tensor(0.6931), 'layer2': tensor(0.6931), 'final': tensor(0.0054)}
        >>> scheduled = JointExitLoss("shallow_deep")
        >>> scheduled.bind(["layer1", "layer2", "final"], costs=[0.25, 0.5, 1.0])
        >>> scheduled.weights_at(3, progress=0.5)
        tensor([0.1300, 0.2550, 1.0000])
    """

    def __init__(
        self, weights: str | Sequence[float] = "equal", label_smoothing: float = 0.0, start: float = 0.01
    ) -> None:
        super().__init__(weights, start)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}; 0 trusts the labels")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Sequence[Tensor], labels: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """Return the weighted loss of each exit by its name; their sum is what is minimised.

        Args:
            logits: The exits' outputs.
            labels: The labels.
            progress: Share of the training that is done, in [0, 1].
        """
        return self.weigh(logits, lambda j: self._cross_entropy(logits[j], labels), progress)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_single(logits), labels, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"{super().extra_repr()}, label_smoothing={self.label_smoothing}"
