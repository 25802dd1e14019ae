"""How well a network's answers tell its training images from others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cleave.reports.attacks.metrics import Interval, interval

FALSE_POSITIVES = 0.01


@dataclasses.dataclass(frozen=True)
class Membership:
    """What one attack came to.

    Attributes:
        name: The attack in words.
        auc: Area under the curve of true against false positives: 0.5 for a guess, 1 where all are told apart.
        tpr: Share of the members found where at most 1 % of the others are taken for members.
    """

    name: str
    auc: Interval
    tpr: Interval


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each image, float64 (N,)."""
    return -logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return :math:`\log p_y - \log(1 - p_y)` of each image, float64 (N,).

    Its distribution over networks is nearly normal (Carlini et al., "Membership Inference Attacks From First
    Principles", 2022).
    """
    logits = logits.double()
    others = logits.scatter(1, labels[:, None], -math.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def modified_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the modified entropy of each image, float64 (N,).

    .. math:: -(1 - p_y) \log p_y - \sum_{i \ne y} p_i \log(1 - p_i)

    which is 0 for a sure right answer and without a bound for a sure wrong one (Song and Mittal, "Systematic Evaluation
    of Privacy Risks of Machine Learning Models", 2021, eq. 8).

    Example:
        >>> modified_entropies(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931], dtype=torch.float64)
    """
    logs = logits.double().log_softmax(1)
    shares = logs.exp()
    rest = torch.log1p(-shares.clamp(max=0.5))
    # 1 − p of a share near 1 is the sum of the others: subtracted from 1 it would be rounded away.
    top = shares.argmax(1, keepdim=True)
    of_top = logs.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    rest = rest.scatter(1, top, torch.where(shares.gather(1, top) > 0.5, of_top, rest.gather(1, top)))
    right = labels[:, None]
    terms = (shares * rest).scatter(1, right, 0.0)
    own = rest.gather(1, right).exp() * logs.gather(1, right)
    return -(own[:, 0] + terms.sum(1))


def area(members: Tensor, others: Tensor) -> Tensor:
    """Return the area under the curve of scores that should be higher for members; ties count half.

    Example:
        >>> area(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        tensor(0.8750, dtype=torch.float64)
    """
    ranked = others.sort().values
    below = torch.searchsorted(ranked, members.contiguous(), right=False)
    upto = torch.searchsorted(ranked, members.contiguous(), right=True)
    return (below + upto).double().mean() / (2 * len(others))


def true_positives(members: Tensor, others: Tensor, most: float = FALSE_POSITIVES) -> Tensor:
    """Return the largest share of members above a threshold that at most a share ``most`` of the others reaches.

    Example:
        >>> true_positives(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), most=0.0)
        tensor(0.5000, dtype=torch.float64)
    """
    allowed = math.floor(most * len(others) + 1e-9)
    if allowed >= len(others):
        return torch.ones((), dtype=torch.float64)
    bound = others.sort(descending=True).values[allowed]
    return (members > bound).double().mean()


def judged(name: str, members: Tensor, others: Tensor, resamples: int, seed: int = 0) -> Membership:
    """Return what scores that should be higher for members came to, with intervals over resampled images.

    Args:
        name: The attack in words.
        members: Scores of training images, (N,).
        others: Scores of images that were not in training, (M,).
        resamples: How often both are drawn with replacement.
        seed: Of these draws.

    Raises:
        ValueError: There are none of one kind, a score is NaN, or ``resamples`` is below 1.
    """
    if resamples < 1 or not len(members) or not len(others):
        raise ValueError(
            f"membership takes members, others and resamples, got {len(members)}, {len(others)} and {resamples}"
        )
    members, others = members.double().cpu(), others.double().cpu()
    if members.isnan().any() or others.isnan().any():
        raise ValueError(f"scores of {name} are NaN: the network has diverged")
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[Tensor]] = [[], []]
    for _ in range(resamples):
        some = [each[torch.randint(len(each), (len(each),), generator=generator)] for each in (members, others)]
        for figures, figure in zip(drawn, FIGURES, strict=True):
            figures.append(figure(*some))
    found = [interval(figure(members, others), torch.stack(each)) for each, figure in zip(drawn, FIGURES, strict=True)]
    return Membership(name, *found)


FIGURES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (area, true_positives)


def as_row(found: Membership) -> dict[str, Any]:
    """Return a row for CSV, intervals beside the values."""
    row: dict[str, Any] = {"attack": found.name}
    for name in ("auc", "tpr"):
        figure = getattr(found, name)
        row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return row
