"""A backbone with early exits: the network that may answer before its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cleave.architectures.cutting.cut_points import cut_points, spread
from cleave.architectures.cutting.slicing import check_size
from cleave.architectures.cutting.stages import LOGITS, CutError, Stages, cut
from cleave.architectures.injected import InjectedBottleneck
from cleave.architectures.inserts.exit_heads import ExitHead
from cleave.architectures.macs import count_macs, count_params
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean
from cleave.deployment import Exited, ExitPolicy, leave_early
from cleave.losses import geometric_ensemble

FINAL = "final"
Step = Callable[[dict[str, Tensor]], tuple[Tensor | None, dict[str, Tensor]]]


class MultiExitNetwork(nn.Module):
    """A backbone in stages with a classifier behind some of them; its own classifier counts as the last exit.

    The network is cut from a deep copy of the backbone. With a ``split`` a bottleneck (encoder → quantiser → decoder)
    is inserted behind one stage, as in SPINN (Laskaridis et al. 2020) and Boomerang (Zeng et al. 2019): exits up to
    and at the split run on the device, those behind it on what was sent.

    Args:
        backbone: Network that maps normalised images (B, C, H, W) to logits (B, classes).
        sample: Normalised images (B, C, H, W) of the size the network will see; one is enough.
        at: Names of the layers with an exit behind them, in any order. Either this or ``count``.
        count: Number of exits before the last one, at even shares of the backbone's MACs.
        heads: Keyword arguments of :class:`~cleave.architectures.ExitHead`: ``pooling``, ``grid``, ``size``,
            ``convs``, ``width``, ``kernel``.
        cascade: Whether each exit also reads the class probabilities of the one before.
        ensemble: Whether each exit answers with the weighted geometric mean of all exits so far.
        split: Name of the layer behind which the bottleneck is inserted, or ``None``.
        bottleneck: As of :class:`~cleave.architectures.split.SplitNetwork`, in the form ``insert``.
        codec: As of :class:`~cleave.architectures.split.SplitNetwork`, of kind ``uniform``, for one width.

    Attributes:
        exit_names: The layers with an exit in the order of execution, then ``final``.
        names: All cut names in the order of execution: the exits' and the split's.
        classes: Number of classes.

    Raises:
        CutError: A layer is unknown, is crossed by several tensors, has two exits, or is the backbone's last.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sample: Tensor,
        *,
        at: Sequence[str] | None = None,
        count: int | None = None,
        heads: Mapping[str, Any] | None = None,
        cascade: bool = False,
        ensemble: bool = False,
        split: str | None = None,
        bottleneck: Mapping[str, Any] | None = None,
        codec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if split is None and (bottleneck is not None or codec is not None):
            raise ValueError("bottleneck and codec stand at a split; give split.at, or leave them null")
        if split in (FINAL, LOGITS):
            raise CutError(f"split.at names {split!r}, which stands for the last exit; split behind an earlier layer")
        exits = _places(backbone, sample, at, count)
        names = exits if split is None or split in exits else [*exits, split]
        self.stages = _cut(backbone, names, sample)
        self.names = self.stages.names
        self.split = split
        self.exit_names = (*(name for name in self.names if name in exits), FINAL)
        self.image_shape = tuple(sample.shape[1:])
        with torch.no_grad(), evaluating(self.stages):
            features = self.stages.features(sample[:1], at=[*self.names, LOGITS])
        self.classes = _classes(features, self.names)
        self.heads = nn.ModuleList()
        for i, name in enumerate(self.exit_names[:-1]):
            shape, layout = tuple(features[name].shape[1:]), self.stages.layouts[self.names.index(name)]
            head = ExitHead(shape, layout, self.classes, **(heads or {}), cascade=cascade and i > 0)
            self.heads.append(head)
        self.bottleneck: InjectedBottleneck | None = None
        if split is not None:
            layout = self.stages.layouts[self.names.index(split)]
            self.bottleneck = InjectedBottleneck(tuple(features[split].shape[1:]), layout, bottleneck, codec)
        self.cascade = cascade
        self.ensemble = GeometricEnsemble(len(self.exit_names), self.classes) if ensemble else None

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to the last exit's logits (B, classes)."""
        if self.ensemble is not None:
            return self.exits(images)[-1]
        for i, stage in enumerate(self.stages):
            images = stage(self._entering(i, images))
        return images

    def exits(self, images: Tensor) -> list[Tensor]:
        """Map normalised images (B, C, H, W) to the answer of every exit, logits (B, classes) each."""
        logits = self.classify(self.reduced(images))
        return logits if self.ensemble is None else list(self.ensemble(logits))

    def reduced(
        self, images: Tensor, equilibrium: bool = False, link: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Run the backbone once; return what each exit's classifier reads, and the last exit's logits as ``final``.

        Args:
            images: Normalised images (B, C, H, W).
            equilibrium: Scale gradients where exits branch off: of k exits, the i-th passes 1 / (k − i + 1) of its own
                to the backbone, beside (k − i) / (k − i + 1) of what comes from behind it, which keeps their variance
                even (gradient equilibrium, Li et al. 2019, "Improved Techniques for Training Adaptive Deep Networks").
            link: Takes the bottleneck's place, for instance to send its codes as real bytes.
        """
        found: dict[str, Tensor] = {}
        x, exits = images, len(self.exit_names)
        for i, (name, stage) in enumerate(zip((*self.names, FINAL), self.stages, strict=True)):
            x = stage(self._entering(i, x, link))
            if name == FINAL or name not in self.exit_names:
                continue
            behind = exits - 1 - self.exit_names.index(name)
            kept = self.stages.kept(i, x)
            if equilibrium:
                kept, x = scale_gradient(kept, 1 / (behind + 1)), scale_gradient(x, behind / (behind + 1))
            found[name] = self._head(name).reduce(kept)
        return found | {FINAL: x}

    def classify(self, reduced: Mapping[str, Tensor]) -> list[Tensor]:
        """Map what :meth:`reduced` returns to every exit's own logits, (B, classes) each, not ensembled."""
        logits: list[Tensor] = []
        for name in self.exit_names[:-1]:
            logits.append(self._head(name).classify(reduced[name], logits[-1] if logits else None))
        return [*logits, reduced[FINAL]]

    def run(self, images: Tensor, policy: ExitPolicy) -> Exited:
        """Answer as early as the policy allows: samples that leave are taken out, the others go on.

        Args:
            images: Normalised images (B, C, H, W).
            policy: Decides at each exit; :meth:`with_ensemble` gives one the ensemble's weights.

        Returns:
            The answers (B, classes) and where each sample left (B,).

        Raises:
            ValueError: The policy has another number of exits, or refuses the logits.
        """
        if policy.exits != len(self.exit_names):
            raise ValueError(
                f"the policy has {policy.exits} exits, the network {len(self.exit_names)}; both count the last"
            )
        return leave_early(list(self.steps()), {"x": images}, policy)

    def steps(self) -> Iterator[Step]:
        """One step a stage: from what is carried to its exit's logits, if it has one, and what goes on."""
        for i, name in enumerate((*self.names, FINAL)):
            yield self._step(i, name)

    def _step(self, index: int, name: str) -> Step:
        def step(carried: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
            x = self.stages[index](self._entering(index, carried["x"]))
            if name == FINAL:
                return x, {}
            carried = {**carried, "x": x}
            if name not in self.exit_names:
                return None, carried
            logits = self._head(name)(self.stages.kept(index, x), carried.get("before"))
            return logits, {**carried, "before": logits} if self.cascade else carried

        return step

    def _entering(self, index: int, x: Tensor, link: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What stage ``index`` reads of what came before: behind the split, what has passed the bottleneck."""
        if index == 0:
            check_size(x, self.stages.image_shape)
        if self.bottleneck is None or index == 0 or self.names[index - 1] != self.split:
            return x
        return self.bottleneck(x) if link is None else link(x)

    def _head(self, name: str) -> ExitHead:
        return cast(ExitHead, self.heads[self.exit_names.index(name)])

    # --- costs ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def profile(self) -> dict[str, dict[str, int]]:
        """MACs per image and parameters of each part in the order of execution: stages, exits, encoder, decoder."""
        weight = next(self.stages.parameters())
        x = torch.zeros(1, *self.image_shape, device=weight.device, dtype=weight.dtype)
        before = torch.zeros(1, self.classes, device=weight.device, dtype=weight.dtype)
        costs: dict[str, dict[str, int]] = {}
        with evaluating(self):
            for i, name in enumerate((*self.names, FINAL)):
                if self.bottleneck is not None and i and self.names[i - 1] == self.split:
                    for part in ("encoder", "decoder"):
                        module = getattr(self.bottleneck, part)
                        costs[part] = _cost(module, x)
                        x = module(x)
                costs[f"to {name}"] = _cost(self.stages[i], x)
                x = self.stages[i](x)
                if name in self.exit_names[:-1]:
                    costs[f"exit at {name}"] = _cost(self._head(name), x.clone(), before)
        return costs

    @property
    def backbone_macs(self) -> int:
        """MACs per image of the backbone alone, without exits and bottleneck."""
        return sum(cost["macs"] for part, cost in self.profile().items() if part.startswith("to "))

    def exit_costs(self, policy: ExitPolicy | None = None) -> list[int]:
        """MACs per image of leaving at each exit: all that runs until there, its own head and those on the way.

        Args:
            policy: Counts its own work as well, where it is not negligible.
        """
        costs: list[int] = []
        total = 0
        for part, cost in self.profile().items():
            total += cost["macs"]
            if part.startswith("exit at ") or part == f"to {FINAL}":
                total += policy.macs(len(costs), self.classes) if policy is not None else 0
                costs.append(total)
        return costs

    def cost_shares(self) -> list[float]:
        """Cost of leaving at each exit as a share of the whole network's, the last one 1."""
        costs = self.exit_costs()
        return [cost / costs[-1] for cost in costs]


class GeometricEnsemble(nn.Module):
    """Zero Time Waste's ensemble: exit m answers q_m ∝ b_m Π_{i ≤ m} p_i^{w_mi} (Wołczyk et al. 2021).

    Weights and biases are learned as logarithms, which keeps them positive; they begin as the geometric mean.

    Args:
        exits: Number of exits E.
        classes: Number of classes.
    """

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__()
        start = torch.arange(1, exits + 1).reciprocal().log().unsqueeze(1).expand(exits, exits)
        self.log_weights = nn.Parameter(start.clone())
        self.log_bias = nn.Parameter(torch.zeros(exits, classes))

    @property
    def weights(self) -> Tensor:
        """The weights w (E, E), lower triangle."""
        return self.log_weights.exp().tril()

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Map the exits' own logits, E of (B, classes), to the logarithm of every exit's answer (E, B, classes)."""
        return geometric_ensemble(logits, self.weights, self.log_bias)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()  # not a view: a layer that works in place may follow

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` as it is; its gradient is multiplied by ``factor``."""
    return cast(Tensor, _ScaleGradient.apply(x, factor))


def _places(backbone: nn.Module, sample: Tensor, at: Sequence[str] | None, count: int | None) -> list[str]:
    """Return the layers that get an exit."""
    if (at is None) == (count is None):
        raise ValueError(f"give either exits.at or exits.count, got at={at} and count={count}")
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"exits.count must be a whole number of at least 1, got {count!r}")
        points = cut_points(backbone, sample)
        return spread([point for point in points if point.name not in (FINAL, LOGITS)], count)
    if isinstance(at, str) or not at:
        raise ValueError(f"exits.at is a list of at least one layer, got {at!r}; write exits.at=[layer1]")
    at = list(at)
    if repeated := [name for name in at if at.count(name) > 1]:
        raise CutError(f"exits.at names {repeated[0]!r} twice; each layer takes one exit")
    if taken := [name for name in at if name in (FINAL, LOGITS)]:
        raise CutError(f"exits.at names {taken[0]!r}: the backbone's own classifier is the last exit already")
    return at


def _cut(backbone: nn.Module, names: Sequence[str], sample: Tensor) -> Stages:
    """Cut a copy of the backbone at the names in the order in which it runs them; the copy is in train mode."""
    backbone = copy.deepcopy(backbone)
    order: list[str] = []
    layers = dict(backbone.named_modules())
    for name in names:
        if not name or name not in layers:
            raise CutError(f"{type(backbone).__name__} has no layer {name!r}.{did_you_mean(name, layers)}")
    hooks = [layers[name].register_forward_hook(lambda *_, name=name: order.append(name)) for name in names]
    with torch.no_grad(), evaluating(backbone):
        backbone(sample[:1])
    for hook in hooks:
        hook.remove()
    last_call = {name: i for i, name in enumerate(order)}
    stages = cut(backbone, at=sorted(names, key=lambda name: last_call.get(name, -1)), sample=sample)
    return stages.train()


def _classes(features: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """Return the number of classes; refuse an exit where there is nothing left to save."""
    logits = features[LOGITS]
    if names and features[names[-1]].shape == logits.shape and torch.equal(features[names[-1]], logits):
        raise CutError(f"an exit at {names[-1]!r} stands behind the last layer, where nothing is left to save")
    return logits.shape[-1]


def _cost(module: nn.Module, *inputs: Tensor) -> dict[str, int]:
    return {"macs": count_macs(module, *inputs), "params": count_params(module)}
