"""The way from names of outputs to what computes them, which every network shares."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from cleave.architectures.cutting.slicing import check_size
from cleave.architectures.cutting.stages import CutError, Stages
from cleave.architectures.inserts.bottleneck import Carrier
from cleave.architectures.naming import did_you_mean
from cleave.architectures.network.outputs import ANSWER, INPUT, LOGITS, Op, plan, read_by

EXITS, ANSWERS = "exits", "answers"
_HINTS = {
    "likelihoods": "A learned prior emits likelihoods: codec=entropy_codec.",
    "mean": "A stochastic encoder emits mean: variance='learned'.",
    "log_variance": "A stochastic encoder emits log_variance: variance='learned'.",
    "input": "form='insert' keeps the feature before a bottleneck as input.",
    "z": "A bottleneck emits z, where the network is split.",
    "sent": "A bottleneck emits sent, where the network is split.",
    "received": "A bottleneck emits received, where the network is split.",
    "reduced": "An exit emits reduced.",
    "logits": "An exit emits logits.",
    "answer": "The exits of an ensemble emit answer: ensemble=True.",
}


class NamedOutputs(nn.Module):
    """Base of a network that computes named outputs, each no further than it needs."""

    stages: Stages
    cuts: tuple[str, ...]
    exits: tuple[str, ...]
    ensemble: nn.Module | None
    ops: list[Op]
    shapes: dict[str, tuple[int, ...]]
    _plans: dict[Any, list[Op]]
    _altering: set[tuple[str, str]]

    def outputs(
        self,
        inputs: Tensor | None,
        at: Iterable[str],
        given: Mapping[str, Tensor] | None = None,
        link: Carrier | None = None,
    ) -> dict[str, Tensor]:
        """Return named outputs; nothing is computed that they do not need.

        Args:
            inputs: The network's input (B, …); ``None`` where all that is needed is given.
            at: Names of outputs.
            given: Outputs that are known, such as stored ones; what stands before them on each branch is not run.
            link: Sends what each bottleneck makes instead of only quantising it: called with the cut, its codec and the
                tensors to send, it returns what the codec delivers.

        Returns:
            The outputs asked for. No layer that works in place alters them, nor what was given.

        Raises:
            CutError: There is no such output, or the input has another shape than the one it was cut for.
            ValueError: What is given has another shape than the output has, or no input is there though it is needed.
        """
        if isinstance(at, str):
            raise CutError(f"at is a list of names of outputs, got the string {at!r}; write at=[{at!r}]")
        wanted, known = tuple(dict.fromkeys(at)), dict(given or {})
        ops = self._plan(wanted, known)
        self._check_given(known)
        if inputs is not None:
            check_size(inputs, self.stages.input_shape)
            known[INPUT] = inputs
        elif missing := [name for name in read_by(ops, wanted) if name not in known]:
            raise ValueError(
                f"{', '.join(wanted)} cannot be computed from {', '.join(known) or 'nothing'}: "
                f"{', '.join(missing)} is missing; give it, or the network's input"
            )
        read, kept = {name for op in ops for name in op.needs}, {}
        asked = read.union(wanted)
        for op in ops:
            self.compute(op, known, asked, link)
            if (name := op.gives[0]) in wanted and name in read and name in self.cuts:
                # A copy made here: gradients of what is returned then meet those of what follows in one order.
                kept[name] = known[name].clone()
        return {name: kept.get(name, known[name]) for name in wanted}

    def _plan(self, wanted: tuple[str, ...], known: Mapping[str, Tensor]) -> list[Op]:
        key = (wanted, frozenset(known))
        if key not in self._plans:
            self.check_names([*wanted, *known])
            self._plans[key] = plan(self.ops, wanted, known)
        return self._plans[key]

    def compute(self, op: Op, known: dict[str, Any], asked: Collection[str] = (), link: Carrier | None = None) -> None:
        """Run one of the network's computations on named values, and add what it gives to them."""
        step = op.step
        values = [known[name] for name in op.needs] + [known.get(name) for name in op.optional]
        if (op.owner, step.method) in self._altering:
            values = [value.clone() for value in values]
        more: dict[str, Any] = {}
        if step.selective:
            more["wanted"] = frozenset(own for own, name in zip(step.gives, op.gives, strict=True) if name in asked)
        method = step.method
        if link is not None and step.linked is not None:
            method, more["link"] = step.linked, link
        owner = self.get_submodule(op.owner)
        result = owner(*values, **more) if method == "__call__" else getattr(owner, method)(*values, **more)
        if len(op.gives) == 1:
            known[op.gives[0]] = result
        else:
            known.update(zip(op.gives, result, strict=True))

    def check_names(self, names: Iterable[str]) -> None:
        """Raise CutError unless there is an output of every name; worth a call before training."""
        for name in names:
            if name not in self.emits:
                shown = [known for known in self.emits if known.rpartition("/")[2][:1] != ":"]
                raise CutError(
                    f"this network has no output {name!r}; it has {', '.join(shown)}.{did_you_mean(name, shown)}"
                    + self._hint(name)
                )

    def _hint(self, name: str) -> str:
        """Return what would make an output of a name, as far as it is known."""
        own = name.rpartition("/")[2]
        if own in _HINTS and own != name:
            return f" {_HINTS[own]}"
        layers = {path for stage in self.stages for path, _ in stage.named_modules()}
        return f" {name!r} is a layer; name it among the cuts to have its feature." if name in layers - {""} else ""

    def _check_given(self, given: Mapping[str, Tensor]) -> None:
        for name, value in given.items():
            if tuple(value.shape[1:]) != self.shapes[name]:
                raise ValueError(
                    f"given: {name} is {self.shapes[name]} for each sample, got {tuple(value.shape[1:])}; it may be "
                    "stored from another network"
                )

    @property
    def emits(self) -> tuple[str, ...]:
        """Names of all outputs."""
        return tuple(name for op in self.ops for name in op.gives)

    def group(self, name: str) -> tuple[str, ...]:
        """Return the outputs that a name stands for: ``exits``, every exit's own logits, or ``answers`` of an ensemble.

        Any other name stands for itself.

        Raises:
            CutError: The network has no exits, or no ensemble.
        """
        if name == EXITS:
            if not self.exits:
                raise CutError("this network has no exits; build it with exits or exits_count")
            return (*(f"{cut}/logits" for cut in self.exits[:-1]), LOGITS)
        if name == ANSWERS:
            if self.ensemble is None:
                raise CutError("this network has no ensemble of its exits; build it with ensemble=True")
            return (*(f"{cut}/answer" for cut in self.exits[:-1]), ANSWER)
        return (name,)

    def needed(self, names: Iterable[str], given: Iterable[str] = ()) -> frozenset[str]:
        """Return the parts whose parameters some outputs depend on, where others are given."""
        return frozenset(part for op in plan(self.ops, names, given) for part in op.uses)

    def frontier(self, names: Iterable[str], trained: Iterable[str]) -> tuple[str, ...]:
        """Return what to store of frozen parts, so that nothing of them runs again for some outputs.

        Args:
            names: Outputs that are needed.
            trained: Parts that learn.

        Returns:
            Outputs that depend on nothing that learns or draws, in order: those that what learns reads, and those of
            ``names`` themselves; ``images`` among them where what learns reads them.
        """
        names, learning, living = list(names), set(trained), set[str]()
        ops = plan(self.ops, names, ())
        fixed = []
        for op in ops:
            draws = op.step.random or learning.intersection(op.noisy_with)
            if draws or learning.intersection(op.uses) or living.intersection(op.needs):
                living.update(op.gives)
            else:
                fixed.append(op)
        live = [op for op in ops if op not in fixed]
        same = {op.gives[0]: op.needs[0] for op in fixed if op.step.same and len(op.gives) == 1}
        asked = [name for name in names if name not in living]
        return tuple(dict.fromkeys(_first(name, {} if name in asked else same) for name in read_by(live, asked)))


def _first(name: str, same: Mapping[str, str]) -> str:
    """Return the first of several names of one tensor."""
    while name in same:
        name = same[name]
    return name
