"""The one network of Cleave: stages of a backbone, inserts behind its cuts, and named outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.costs import Cost, cumulative, measure_costs
from cleave.architectures.cutting.stages import CutError, Stages
from cleave.architectures.inserts.bottleneck import Bottleneck
from cleave.architectures.inserts.insert import Insert, check_inserts
from cleave.architectures.linking.link import Link
from cleave.architectures.macs import count_macs
from cleave.architectures.network.early_exits import exit_steps
from cleave.architectures.network.equilibrium import Branch
from cleave.architectures.network.outputs import (
    ANSWER,
    FINAL,
    INPUT,
    LOGITS,
    RESERVED,
    Op,
    child_name,
    network_ops,
)
from cleave.architectures.network.probe import in_order_of, probe
from cleave.architectures.network.sending import Sending
from cleave.architectures.network.state_names import collapse_names, public_name
from cleave.architectures.network.train_parts import network_parts, resolve_parts, stage_parts
from cleave.deployment import Exited, ExitPolicy, leave_early


class StagedNetwork(Sending):
    """Stages of a backbone with inserts behind named cuts; whatever it computes is an output with a name.

    ``layer2/input`` is the feature that arrives at a cut and ``layer2`` the one that goes on behind its inserts, which
    emit outputs under the name of their cut, such as ``layer2/z`` or ``layer1/logits``. The last stage gives
    ``logits``, or ``output/NAME`` for each of several results. An ensemble of the exits gives answers beside logits.

    Stages and bottlenecks run first, the classifiers of the exits behind them in order, so that gradients meet where
    they branched off in the same order however the network is asked.

    Args:
        stages: The backbone in stages.
        inserts: Inserts by the name of the cut they stand at, in the order in which they pass the feature on.
        sample: A batch of inputs of the size that the network will see.
        replaced: Whether the first insert that passes the feature on reads the input instead of the first stage's
            feature; that stage is gone.
        ensemble: Makes every exit's answer of the logits of all exits so far.
        gradient_equilibrium: Scale gradients where exits branch off: of k exits, the i-th passes 1 / (k − i + 1) of its
            own to the backbone, beside (k − i) / (k − i + 1) of what comes from behind it, which keeps their variance
            even (Li et al. 2019, "Improved Techniques for Training Adaptive Deep Networks").
        left_out: What stages that a path leaves out would cost.

    Attributes:
        cuts: Names of the cuts in the order of execution.
        exits: The cuts with an exit in order, then ``final``; empty where there is none.
        emits: Names of all outputs in the order in which they are computed.
        results: What the network is for: ``("logits",)``, or the names of several results.
        shapes: Shape of each output for one sample.
        input_shape: Shape of the input for one sample.
        envelope: Whether what it sends has an :class:`~cleave.deployment.Envelope`, which is counted in payload bytes.
        replaced_macs: MACs of the stage that is gone, which a comparison with the backbone counts.
        layer_depths: Depth of the backbone's weights by name; see ``architectures/layer_depths.py``.

    Raises:
        CutError: A cut has a name that means something else.
        ValueError: Two inserts emit one name, or inserts are given for a cut that is none.
    """

    def __init__(
        self,
        stages: Stages,
        inserts: Mapping[str, Sequence[Insert]] | None = None,
        *,
        sample: Tensor,
        replaced: bool = False,
        ensemble: nn.Module | None = None,
        gradient_equilibrium: bool = False,
        left_out: Sequence[Cost] = (),
    ) -> None:
        super().__init__()
        self.stages = stages
        self.cuts = stages.names
        self.replaced = replaced
        self.replaced_macs = 0
        self.envelope = True
        self.layer_depths: dict[str, int] = {}
        self.gradient_equilibrium = gradient_equilibrium
        self.left_out = tuple(left_out)
        self.input_shape = tuple(sample.shape[1:])
        self.input_dtype = sample.dtype
        self._install(inserts or {})
        self.ensemble = ensemble
        with_exit = [cut for cut in self.cuts if any(LOGITS in insert.emits for insert in self.inserts_at(cut))]
        self.exits = (*with_exit, FINAL) if with_exit else ()
        if gradient_equilibrium:
            behind = len(self.exits)
            branches = {child_name(cut): Branch(behind - number) for number, cut in enumerate(with_exit, 1)}
            self.branches = nn.ModuleDict(branches)
        if replaced:
            self._drop_head(sample)
        self._place_bottlenecks()
        self.results: tuple[str, ...] = (LOGITS,)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._plans: dict[Any, list[Op]] = {}
        self._costs: list[Cost] | None = None
        self._altering = {(f"stages.stage{i}", "__call__") for i in range(len(stages)) if stages.alters(i)}
        if stages.alters(len(stages) - 1):
            self._altering.add(("", "finish"))
        self.ops = network_ops(self)
        probe(self, sample)
        self.learnable = frozenset(name for name, weight in self.named_weights() if weight.requires_grad)
        collapse_names(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, …) to the network's answer: the last exit's in an ensemble, else ``logits``.

        Several results come as a dictionary by name.
        """
        names = (ANSWER,) if self.ensemble is not None else self.results
        found = self.outputs(inputs, names)
        return found[names[0]] if len(names) == 1 else found  # type: ignore[return-value]

    def answers_of(self, *logits: Tensor) -> tuple[Tensor, ...]:
        """Return what every exit answers in the ensemble, of all exits' own logits."""
        assert self.ensemble is not None
        return tuple(self.ensemble(logits))

    def finish(self, feature: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the last stage; several results come in the order of :attr:`results`."""
        return in_order_of(self.results, self.stages[-1](feature))

    @staticmethod
    def unchanged(feature: Tensor) -> Tensor:
        """Return a feature that no insert changes: what goes on is what arrives."""
        return feature

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def links(self) -> dict[str, Link]:
        """The links of a path through two networks by the cut they stand at, in order."""
        found = ((cut, insert) for cut in self.cuts for insert in self.inserts_at(cut))
        return {cut: insert for cut, insert in found if isinstance(insert, Link)}

    @property
    def cascade(self) -> bool:
        """Whether exits read what those before them answer."""
        exits = (insert for cut in self.cuts for insert in self.inserts_at(cut) if not insert.passes)
        return any("/" in name for insert in exits for step in insert.steps() for name in step.needs)

    @property
    def backbone_parts(self) -> tuple[str, ...]:
        """Names of the parts that the backbone's stages make up."""
        return tuple(dict.fromkeys(stage_parts(self)[int(self.replaced) :]))

    def order_at(self, cut: str) -> list[Insert]:
        """Return the inserts behind a cut in the order of execution: exits read what arrives there.

        Where the head is replaced nothing arrives, so exits read what comes out of the bottleneck.
        """
        inserts = self.inserts_at(cut)
        exits, passing = ([each for each in inserts if each.passes == passes] for passes in (False, True))
        return [*passing, *exits] if self.replaced and cut == self.cuts[0] else [*exits, *passing]

    def path_of(self, cut: str, insert: Insert) -> str:
        """Return the path of an insert in the network."""
        return f"{child_name(cut)}.{insert.kind}"

    def alters_input(self, cut: str, insert: Insert) -> bool:
        """Whether one of an insert's computations alters in place what it reads."""
        return any(owner == self.path_of(cut, insert) for owner, _ in self._altering)

    def parts(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the parts that can be trained or frozen, by name, in order; no module is in two of them."""
        return network_parts(self)

    def resolve(self, train: Sequence[str]) -> tuple[str, ...]:
        """Return the parts that ``train`` names; see ``resolve_parts``."""
        return resolve_parts(self, train)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return every parameter under its public name: a backbone's as the backbone calls it, whatever the cuts."""
        for name, weight in self.named_parameters():
            yield public_name(name), weight

    def leaves(self) -> list[nn.Module]:
        """Return the modules to compile one by one: the stages, and what each insert calls by itself."""
        inserts = [insert for cut in self.cuts for insert in self.inserts_at(cut)]
        return [*self.stages, *(leaf for insert in inserts for leaf in insert.leaves())]

    # --- costs ------------------------------------------------------------------------------------------------------

    def costs(self) -> list[Cost]:
        """Return MACs per sample and parameters of each part in the order of execution, measured once."""
        if self._costs is None:
            self._costs = measure_costs(self)
        return list(self._costs)

    @property
    def backbone_macs(self) -> int:
        """MACs per sample of the backbone alone, without its inserts and with a head that was replaced."""
        return self.replaced_macs + sum(cost.macs for cost in self.costs() if cost.kind == "stage")

    def exit_costs(self, policy: ExitPolicy | None = None) -> list[int]:
        """Return the MACs per sample of leaving at each exit: all that runs until there, heads on the way included.

        Args:
            policy: Counts its own work as well, where it is not negligible.
        """
        classes = self.shapes.get(LOGITS, (0,))[0]
        return cumulative(self.costs(), lambda exit: 0 if policy is None else policy.macs(exit, classes))

    def cost_shares(self) -> list[float]:
        """Return the cost of leaving at each exit as a share of the whole network's, the last one 1."""
        costs = self.exit_costs()
        return [cost / costs[-1] for cost in costs]

    # --- early exits ------------------------------------------------------------------------------------------------

    def run(self, inputs: Tensor, policy: ExitPolicy) -> Exited:
        """Answer as early as the policy allows: samples that leave are taken out, the others go on.

        Args:
            inputs: The network's input (B, …).
            policy: Decides at each exit.

        Returns:
            The answers (B, classes) and where each sample left (B,).

        Raises:
            ValueError: The policy has another number of exits, or refuses the logits; or there are none to judge.
        """
        self.check_names([LOGITS])
        if policy.exits != max(1, len(self.exits)):
            raise ValueError(f"the policy has {policy.exits} exits, the network {len(self.exits)}; both count the last")
        return leave_early(list(exit_steps(self)), {INPUT: inputs}, policy)

    def _replan(self) -> None:
        """Look anew at what is computed."""
        self.ops = network_ops(self)
        self._plans.clear()

    # --- construction -----------------------------------------------------------------------------------------------

    def _install(self, inserts: Mapping[str, Sequence[Insert]]) -> None:
        for cut in self.cuts:
            if cut in RESERVED:
                raise CutError(f"{cut!r} means something else among the outputs of a network; cut at another layer")
        for cut, behind in inserts.items():
            if cut not in self.cuts:
                raise ValueError(f"an insert is given at {cut!r}, which is no cut: there are {', '.join(self.cuts)}")
            check_inserts(cut, behind)
            if behind:
                self.add_module(child_name(cut), nn.ModuleDict({insert.kind: insert for insert in behind}))

    def _place_bottlenecks(self) -> None:
        """Tell each bottleneck where it stands, and what reads what it decodes, up to the next one's quantiser."""
        found = self.bottlenecks
        places = [self.cuts.index(cut) for cut in found]
        for bottleneck, first, last in zip(found.values(), places, [*places, len(self.cuts)][1:], strict=True):
            inserts = [insert for cut in self.cuts[first : last + 1] for insert in self.order_at(cut)]
            behind: list[nn.Module] = list(self.stages)[first + 1 : last + 1]
            for insert in inserts[inserts.index(bottleneck) + 1 :]:
                if isinstance(insert, Bottleneck):
                    behind.append(insert.encoder)
                    break
                behind.append(insert)
            bottleneck.place(self.cuts[first], behind)

    @torch.no_grad()
    def _drop_head(self, sample: Tensor) -> None:
        """Leave out the stage before the bottleneck that replaces it, but remember what it costs."""
        self.replaced_macs = count_macs(self.stages[0], sample[:1])
        self.stages.stage0 = nn.Identity()
