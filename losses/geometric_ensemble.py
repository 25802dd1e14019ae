"""Zero Time Waste: an exit's answer is a weighted geometric mean of its own output and those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.losses.exit_weights import at_least_single, check_bound, check_exits, checked_names, exit_names


def geometric_ensemble(logits: Sequence[Tensor], weights: Tensor, log_bias: Tensor) -> Tensor:
    r"""Combine the output of each exit with those of all exits before it.

    .. math:: q_m^k = \frac{1}{Z_m} \, b_m^k \prod_{i \le m} (p_i^k)^{w_{mi}}, \qquad p_i = \mathrm{softmax}(s_i),

    the eq. of geometric ensembling in section 3 of Wołczyk et al., "Zero Time Waste: Recycling Predictions in Early
    Exit Neural Networks", 2021. Computed from logarithms: no product underflows.

    Args:
        logits: E outputs (B, K), unnormalised, or all in one tensor (E, B, K).
        weights: w > 0, (E, E); row m weighs the outputs of exit m. What stands above the diagonal is not looked at.
        log_bias: log b, (E, K).

    Returns:
        log q, (E, B, K), float32 at least: every row is the logarithm of a distribution.

    Raises:
        ValueError: The shapes do not fit each other.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]).log()
        >>> mean = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> geometric_ensemble(logits, mean, torch.zeros(2, 2)).exp()
        tensor([[[0.9000, 0.1000]],
        <BLANKLINE>
                [[0.7101, 0.2899]]])
    """
    check_exits(logits)
    exits, classes = len(logits), logits[0].shape[1]
    if weights.shape != (exits, exits) or log_bias.shape != (exits, classes):
        raise ValueError(
            f"weights {tuple(weights.shape)} and log_bias {tuple(log_bias.shape)} must be {(exits, exits)} and "
            f"{(exits, classes)} for {exits} exits over {classes} classes"
        )
    log_p = torch.stack([at_least_single(output).log_softmax(dim=1) for output in logits])
    # Not a matrix product, which autocast would compute in half precision.
    log_q = [(weights[m, : m + 1, None, None] * log_p[: m + 1]).sum(0) + log_bias[m] for m in range(exits)]
    return torch.stack(log_q).log_softmax(dim=2)


class GeometricEnsembleLoss(nn.Module):
    r"""Sum over the exits of the cross entropy of their ensembled answers, from which weights and biases are learned.

    .. math:: L = \sum_{m=1}^{E} \frac{1}{B} \sum_{b=1}^{B} - \log q_{m,b}^{y_b}

    The last stage of training in section 3 of Wołczyk et al., "Zero Time Waste: Recycling Predictions in Early Exit
    Neural Networks", 2021, with q of their eq. of geometric ensembling, ``geometric_ensemble``. The network
    is trained before and frozen.

    Shape:
        - answers: log q, (E, B, K) as ``geometric_ensemble`` returns it, or E of (B, K); a constant that was added to
          all classes of a row changes nothing.
        - labels: (B,), int64 in 0..K-1.
        - output: the cross entropy of each exit by its name, scalars in nats, float32 at least.

    Raises:
        ValueError: The answers are not one (B, K) for each exit, or of another number of exits than it is bound to.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]).log()
        >>> answers = geometric_ensemble(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.zeros(2, 2))
        >>> GeometricEnsembleLoss()(answers, torch.tensor([0]))
        {'1': tensor(0.1054), 'final': tensor(0.3423)}
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] | None = None

    def bind(self, exits: Sequence[str], costs: Sequence[float] | None = None) -> None:
        """Take the names of a network's exits, the final classifier included; their costs play no role."""
        self.names = checked_names(exits)

    def forward(self, answers: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy of each exit by its name; their sum is what is minimised."""
        check_exits(answers)
        check_bound(self.names, len(answers))
        names = exit_names(self.names, len(answers))
        return {
            name: F.cross_entropy(at_least_single(answer), labels) for name, answer in zip(names, answers, strict=True)
        }
