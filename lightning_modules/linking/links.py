"""Links between frozen networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules import caching
from cleave.lightning_modules.evaluators import Evaluator
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.learning import check_network
from cleave.lightning_modules.optimization.training import DEFAULT, Training
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import STUDENT, Term

LEAST_SHARE = 0.1
"""The share of a path's MACs from which on it pays to store a front whose feature is larger than the image."""


class Links(Task):
    """The links of a path are trained, and nothing else: both networks stay as they are.

    After "Coordinated Deep Neural Networks: A Versatile Edge Offloading Algorithm" (2023) and "Edge AI as a Service
    with Coordinated Deep Neural Networks" (2024), which train by cross entropy; optimizer, rate and epochs are not
    given there. Back-propagation ends at the entry link. Ours are the two further terms, which compare with the local
    network as a whole, the ``teacher``: its logits, and its feature before block lin.

    Args:
        network: The network of a path.
        loss: Compares logits (B, classes) with labels (B,); ``None`` leaves it out.
        distillation: Compares logits of the path and of the local network, and the labels; ``None`` leaves it out.
        distillation_weight: Factor on it.
        feature: Compares what the last link makes with the feature that it stands for; ``None`` leaves it out.
        feature_weight: Factor on it.
        train: Parts that learn; ``None``: the links, and bottlenecks on the way.
        extra_terms: More terms by name.
        others: Frozen networks by name; ``teacher`` is the local network.
        evaluators: What measures the network; ``None`` takes those of what it has.
        training: Optimizer, schedule, seed and the like.
        feature_cache: As of :class:`~cleave.lightning_modules.Task`; the front is left out of it where its feature is
            larger than the image and it is under a tenth of the path's MACs.

    Raises:
        ValueError: The network has no links.
    """

    trains = ("links", "bottleneck")

    def __init__(
        self,
        network: StagedNetwork,
        *,
        loss: nn.Module | None = None,
        distillation: nn.Module | None = None,
        distillation_weight: float = 1.0,
        feature: nn.Module | None = None,
        feature_weight: float = 1.0,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        others: Mapping[str, Frozen] | None = None,
        evaluators: Sequence[Evaluator] | None = None,
        training: Training = DEFAULT,
        feature_cache: Mapping[str, Any] | None = None,
    ) -> None:
        check_network(network, "Links")
        if not network.links:
            raise ValueError("Links trains links, which this network lacks; set links.path")
        terms: dict[str, Term] = {}
        if loss is not None:
            terms["cross_entropy"] = Term(loss, of=["student/logits", "labels"])
        if distillation is not None:
            names = ["student/logits", "teacher/logits", "labels"]
            terms["distillation"] = Term(distillation, of=names, weight=distillation_weight)
        if feature is not None:
            made, meant = feature_names(network)
            terms["feature"] = Term(feature, of=[f"student/{made}", f"teacher/{meant}"], weight=feature_weight)
        super().__init__(
            network,
            terms,
            training=training,
            evaluators=evaluators,
            others=others,
            train=train,
            feature_cache=feature_cache,
            extra_terms=extra_terms,
        )

    def on_fit_start(self) -> None:
        """Begin, and say where the feature cache leaves out the front."""
        super().on_fit_start()
        if self.feature_cache.get("use") and STUDENT not in self.stored().outputs:
            rank_zero_info(
                "feature_cache.use=true: the front is computed anew in every epoch: what it makes is larger than the "
                f"image, and it is under {LEAST_SHARE:.0%} of the path's MACs"
            )

    def worth_storing(self, stored: caching.Stored) -> caching.Stored:
        """Leave out the front where computing it again is cheaper than reading what it makes."""
        own = stored.outputs.get(STUDENT, ())
        width = 2 if self.feature_cache.get("dtype") == "float16" else 4
        larger = width * sum(math.prod(self.network.shapes[name]) for name in own) > math.prod(self.network.input_shape)
        if not own or not larger or caching.share_of_macs(self.network, own) >= LEAST_SHARE:
            return stored
        return caching.Stored({owner: names for owner, names in stored.outputs.items() if owner != STUDENT}, True)


def feature_names(network: StagedNetwork) -> tuple[str, str]:
    """Return the output that the last link of a path makes, and the local layer whose feature it stands for."""
    cut, link = list(network.links.items())[-1]
    return cut, link.stands_for.partition("/")[2]
