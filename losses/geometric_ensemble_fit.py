"""The optimum of Zero Time Waste's ensembles on stored logits, by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cleave.losses.exit_weights import check_exits

RIDGE = 1e-4
_ROUNDS = 500
_PRECISION = 1e-7


def fit_geometric_ensemble(logits: Sequence[Tensor], labels: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    r"""Fit the geometric ensemble of each exit to stored logits, to convergence.

    .. math::
        (w_m, b_m) = \arg\min \; -\frac{1}{B} \sum_{j=1}^{B} \log q_{m,j}^{y_j}
        + \frac{\rho}{2} \Big( \sum_{i \le m} (w_{mi} - \tfrac1m)^2 + \lVert \log b_m \rVert^2 \Big)

    with q of :func:`~cleave.losses.geometric_ensemble` (the eq. of geometric ensembling); the first summand is the last
    objective in section 3 of Wołczyk et al., "Zero Time Waste: Recycling Predictions in Early Exit Neural Networks",
    2021. In w and log b it is convex; the second keeps weights finite where every sample is answered rightly. L-BFGS in
    float64 over log w, which keeps w above 0, solves it exit by exit.

    Args:
        logits: E outputs (B, K), unnormalised, or all in one tensor (E, B, K).
        labels: (B,), int64 in 0..K-1.
        ridge: The weight ρ, above 0.

    Returns:
        w, (E, E), lower triangle, and log b, (E, K), in float64.

    Raises:
        ValueError: The logits are not one (B, K) for each exit, one is not finite, or ``ridge`` is not above 0.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0]] * 4])  # sure by 2, but right in three of four cases: log 3 would do
        >>> weights, log_bias = fit_geometric_ensemble(logits, torch.tensor([0, 0, 0, 1]), ridge=1e-9)
        >>> answer = weights[0, 0] * logits[0, 0].double().log_softmax(0) + log_bias[0]
        >>> [round(p, 3) for p in answer.softmax(0).tolist()]
        [0.75, 0.25]
    """
    check_exits(logits)
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge!r}")
    log_p = torch.stack([own.detach().cpu().double().log_softmax(1) for own in logits])
    for exit, own in enumerate(log_p):
        if not own.isfinite().all():
            raise ValueError(f"logits of exit {exit} hold NaN or infinity: the network has diverged there")
    exits, _, classes = log_p.shape
    weights, log_bias = log_p.new_zeros(exits, exits), log_p.new_zeros(exits, classes)
    for m in range(exits):
        weights[m, : m + 1], log_bias[m] = _fit(log_p[: m + 1], labels.cpu(), ridge)
    return weights, log_bias


@torch.enable_grad()
def _fit(log_p: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weights (m,) and log-biases (C,) of one exit, of the log-probabilities (m, B, C) up to it."""
    exits, _, classes = log_p.shape
    log_w = torch.full((exits,), 1 / exits, dtype=torch.float64).log().requires_grad_()
    log_b = torch.zeros(classes, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [log_w, log_b],
        max_iter=_ROUNDS,
        tolerance_grad=_PRECISION,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        w = log_w.exp()
        value = F.cross_entropy(torch.einsum("i,ibc->bc", w, log_p) + log_b, labels)
        value = value + ridge / 2 * ((w - 1 / exits).square().sum() + log_b.square().sum())
        value.backward()
        return value

    optimizer.step(loss)
    return log_w.detach().exp(), log_b.detach()
