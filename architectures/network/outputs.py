"""The named outputs of a network: what computes each of them, and which computations a question needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cleave.architectures.inserts.insert import IN, OUT, Insert, Step
from cleave.architectures.network.train_parts import ENSEMBLE, stage_parts

if TYPE_CHECKING:
    from cleave.architectures.network.staged import StagedNetwork

INPUT, LOGITS, ANSWER, FINAL = "images", "logits", "answer", "final"
RESERVED = frozenset({INPUT, "labels", "progress", LOGITS, ANSWER, FINAL})
"""Names that mean something else wherever outputs are named, so that no cut can have them."""
_STAGE = Step("__call__", (), (), kind="stage")
_LAST = Step("finish", (), (), kind="stage")
_ENSEMBLE = Step("answers_of", (), ())
_BRANCH = Step("__call__", (), (":exit", ":on"), selective=True)
_ALIAS = Step("unchanged", (), ())


def child_name(cut: str) -> str:
    """Return the name of the child module that holds the inserts of a cut."""
    return f"at:{cut.replace('.', '|')}"


@dataclasses.dataclass(frozen=True)
class Op:
    """One computation of a network, between named values.

    Args:
        owner: Path in the network of the module whose method it is.
        cut: The cut that it stands at; ``final`` behind the last one.
        step: How it is computed.
        needs: Names of what it reads in the network, in the order of the step's.
        gives: Names of what it makes.
        uses: Names of the parts whose parameters it uses.
        noisy_with: Names of the parts that make it draw while they learn.
        optional: Names of what it reads where that is known anyway.
        side: Whose network it runs beside, in a chain of several; else empty.
    """

    owner: str
    cut: str
    step: Step
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    uses: tuple[str, ...] = ()
    noisy_with: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    side: str = ""


def insert_ops(
    owner: str, insert: Insert, cut: str, arrives: str, goes_on: str, sides: tuple[str, str] = ("", "")
) -> list[Op]:
    """Return an insert's computations under the names that they have in a network.

    Args:
        owner: Path of the insert in the network.
        insert: The insert.
        cut: The cut that it stands at.
        arrives: Name of the feature that reaches it.
        goes_on: Name of what it passes on.
        sides: Where it runs, and where what it sends goes.
    """

    def full(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(qualified(name, cut, arrives, goes_on) for name in names)

    return [
        Op(
            owner=owner,
            cut=cut,
            step=step,
            needs=full(step.needs),
            gives=full(step.gives),
            uses=tuple(f"{part}/{cut}" for part in step.uses),
            noisy_with=tuple(f"{part}/{cut}" for part in step.noisy_with),
            optional=full(step.optional),
            side=sides[step.receives],
        )
        for step in insert.steps()
    ]


def qualified(name: str, cut: str, arrives: str, goes_on: str) -> str:
    """Return what a name under a cut is in the network; one with a slash is of another cut."""
    if name in (IN, OUT):
        return arrives if name == IN else goes_on
    return name if "/" in name else f"{cut}/{name}"


def plan(ops: Sequence[Op], wanted: Iterable[str], known: Iterable[str]) -> list[Op]:
    """Return the computations that what is wanted needs, in order; it stops at what is known on each branch."""
    made_by = {name: index for index, op in enumerate(ops) for name in op.gives}
    found, needed = set(known), set()
    left = list(wanted)
    while left:
        name = left.pop()
        if name in found or name not in made_by:
            continue
        found.add(name)
        needed.add(made_by[name])
        left += ops[made_by[name]].needs
    return [ops[index] for index in sorted(needed)]


def read_by(ops: Sequence[Op], wanted: Iterable[str] = ()) -> tuple[str, ...]:
    """Return what some computations read, and what is wanted besides, of all that none of them makes."""
    made = {name for op in ops for name in op.gives}
    names = [*(name for op in ops for name in op.needs), *wanted]
    return tuple(dict.fromkeys(name for name in names if name not in made))


def network_ops(network: StagedNetwork) -> list[Op]:
    """Return what a network computes, in order: stages and inserts, the classifiers of its exits, the ensemble."""
    ops: list[Op] = []
    parts = stage_parts(network)
    owners = network.stages.owners or [""] * len(network.stages)
    before = INPUT
    for i, cut in enumerate(network.cuts):
        if not (i == 0 and network.replaced):
            stage = Op(f"stages.stage{i}", cut, _STAGE, (before,), (f"{cut}/input",), (parts[i],), side=owners[i])
            ops, before = [*ops, stage], f"{cut}/input"
        ops += _behind(network, cut, before)
        before = cut
    outputs = network.results
    ops.append(Op("", FINAL, _LAST, (before,), outputs, (parts[-1],), side=owners[-1]))
    ops = [op for op in ops if not op.step.late] + [op for op in ops if op.step.late]
    if network.ensemble is not None:
        own = tuple(f"{cut}/logits" for cut in network.exits[:-1])
        answers = tuple(f"{cut}/answer" for cut in network.exits[:-1])
        ops.append(Op("", FINAL, _ENSEMBLE, (*own, LOGITS), (*answers, ANSWER), (ENSEMBLE,), side=owners[-1]))
    return ops


def _behind(network: StagedNetwork, cut: str, arrives: str) -> list[Op]:
    """Return the computations of what stands behind a cut, that of its inserts that pass the feature on last."""
    inserts = network.inserts_at(cut)
    exits = [insert for insert in inserts if not insert.passes]
    passing = [insert for insert in inserts if insert.passes]
    # Where the head is replaced there is no feature before the bottleneck, so exits read what comes out of it.
    first = network.replaced and cut == network.cuts[0]
    sides = insert_sides(network, cut)
    ops, at = ([], arrives) if first else _exits_at(network, cut, exits, arrives)
    for number, insert in enumerate(passing, 1):
        goes_on = cut if number == len(passing) else f"{cut}/:{insert.kind}"
        if first and exits and number == len(passing):
            goes_on = f"{cut}/:whole"
        ops += insert_ops(network.path_of(cut, insert), insert, cut, at, goes_on, sides[insert.kind])
        at = goes_on
    if first and exits:
        found, at = _exits_at(network, cut, exits, at)
        ops += found
    side = sides[passing[-1].kind][1] if passing else _side(network, cut)
    return ops if at == cut else [*ops, Op("", cut, _ALIAS, (at,), (cut,), side=side)]


def _exits_at(network: StagedNetwork, cut: str, exits: Sequence[Insert], feature: str) -> tuple[list[Op], str]:
    """Return the computations of the exits at a cut, and the name of the feature that goes on beside them."""
    ops: list[Op] = []
    at = feature
    if exits and network.gradient_equilibrium:
        branch = f"branches.{child_name(cut)}"
        gives = (f"{cut}/:exit", f"{cut}/:on")
        ops.append(Op(branch, cut, _BRANCH, (feature,), gives, side=_side(network, cut)))
        feature, at = f"{cut}/:exit", f"{cut}/:on"
    for insert in exits:
        sides = insert_sides(network, cut)[insert.kind]
        ops += insert_ops(network.path_of(cut, insert), insert, cut, feature, feature, sides)
    return ops, at


def insert_sides(network: StagedNetwork, cut: str) -> dict[str, tuple[str, str]]:
    """Return where each insert of a cut runs, by its kind, and where what it sends goes.

    On the way from one network to another the one that sends passes the feature over; what follows runs there.
    """
    owners, number = network.stages.owners, network.cuts.index(cut)
    inserts = network.inserts_at(cut)
    if not owners:
        return {insert.kind: ("", "") for insert in inserts}
    here, found = owners[number], {}
    passing = [insert for insert in inserts if insert.passes]
    for place, insert in enumerate(passing, 1):
        here = insert.owner or here
        there = next((each.owner for each in passing[place:] if each.owner), owners[number + 1])
        sends = any(step.receives for step in insert.steps())
        found[insert.kind] = (here, there if sends else here)
        here = found[insert.kind][1]
    late = here if network.replaced and number == 0 else owners[number]
    return found | {insert.kind: (late, late) for insert in inserts if not insert.passes}


def _side(network: StagedNetwork, cut: str) -> str:
    return network.stages.owners[network.cuts.index(cut)] if network.stages.owners else ""
