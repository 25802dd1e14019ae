"""The base of all inserts: what stands behind a cut of a network, passes its feature on and may emit outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from cleave.deployment import Codec, Draw

IN, OUT = "in", "out"
# What a network itself gives under the name of a cut.
_TAKEN = frozenset({IN, OUT, "input", "answer"})
# Parts of a network that are no insert's.
_PARTS = frozenset({"backbone", "head", "middle", "tail", "ensemble", "terms"})


@dataclasses.dataclass(frozen=True)
class Step:
    """One computation of an insert; the network runs it only where somebody asks for what it gives.

    Names are those under the insert's cut: ``z`` stands for ``layer2/z`` at ``layer2``. ``in`` is the feature that
    reaches the insert and ``out`` what it passes on. A name with a slash is that of another cut's output.

    Args:
        method: Name of the insert's method, called with what is needed, in order; it returns what is given, a tuple
            where that is several.
        needs: What it reads.
        gives: What it makes.
        uses: The parts whose parameters it uses, of those that :meth:`Insert.parts` names.
        optional: What it also reads where that is known anyway, ``None`` where not.
        kind: What costs are listed as, such as ``encoder``; ``None`` costs nothing worth counting.
        late: Run behind all stages, as the classifiers of exits are.
        random: Draws random numbers in some mode, so that its result cannot be stored.
        noisy_with: Parts that make it draw random numbers while they learn, though it uses none of their parameters.
        selective: Also takes ``wanted``, the names that somebody asks for, so that it need not make the others.
        linked: Name of the method that takes its place where what is sent goes through real bytes.
        receives: Runs behind what the insert sends, on the side that it is sent to.
        same: Gives what it reads, unchanged, as long as the insert stays as it is.
    """

    method: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    uses: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kind: str | None = None
    late: bool = False
    random: bool = False
    noisy_with: tuple[str, ...] = ()
    selective: bool = False
    linked: str | None = None
    receives: bool = False
    same: bool = False


class Half(NamedTuple):
    """One side of an insert, as it is exported.

    Attributes:
        module: Takes what it needs by position, and returns what it gives.
        needs: Names under the cut, as of :class:`Step`.
        gives: Names under the cut.
    """

    module: nn.Module
    needs: tuple[str, ...]
    gives: tuple[str, ...]


class Halves(NamedTuple):
    """What an insert is once it is exported: one half, or two with a codec between them.

    Attributes:
        device: What runs where the feature is.
        codec: How what is sent becomes bytes; ``None`` where nothing is sent.
        server: What runs behind the codec.
    """

    device: Half
    codec: Codec | None = None
    server: Half | None = None


class Insert(nn.Module):
    """A module behind a cut. The simplest one states ``kind`` and a ``forward`` from the feature to what goes on.

    Attributes:
        kind: Its name among the inserts of a cut, and in the keys of a state dict.
        passes: Whether what goes on is its own result; an exit passes the feature on as it came.
        emits: Names of further outputs; ``forward`` returns them behind what goes on.
        owner: Whose side it lives on, in a network of two; empty where it stands where the feature is.

    Example:
        >>> class Scale(Insert):
        ...     kind = "scale"
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(()))
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> import torch
        >>> Scale().steps()[0].gives
        ('out',)
    """

    kind: ClassVar[str]
    passes: ClassVar[bool] = True
    emits: tuple[str, ...] = ()
    owner: str = ""

    def steps(self) -> Sequence[Step]:
        """Return what it computes, in order; here all at once, by ``forward``."""
        gives = (OUT, *self.emits) if self.passes else self.emits
        return [Step("__call__", (IN,), gives, tuple(self.parts()), kind=self.kind, random=True)]

    def parts(self) -> dict[str, nn.Module]:
        """Return what ``train`` can name of it: ``kind`` for the whole, which becomes ``kind/LAYER`` in a network."""
        return {self.kind: self}

    def leaves(self) -> list[nn.Module]:
        """Return the modules to compile one by one: those that are called by themselves."""
        return [self]

    def costed(self, kind: str) -> nn.Module:
        """Return the module whose parameters are those of a step of this kind."""
        return self

    def draws(self) -> dict[str, Draw]:
        """Return what its device's half draws for each sample, by the name under which that half needs it."""
        return {}

    def halves(self) -> Halves:
        """Return its sides as they are exported; here the insert itself, which sends nothing."""
        return Halves(Half(self, (IN,), (OUT, *self.emits) if self.passes else self.emits))


def check_inserts(cut: str, inserts: Sequence[Insert]) -> None:
    """Refuse inserts that cannot stand at one cut together.

    Raises:
        TypeError: One is no insert, or states no kind.
        ValueError: Two have one kind, emit one name or call a part the same, or a name means something else.
    """
    for insert in inserts:
        if not isinstance(insert, Insert) or not isinstance(getattr(insert, "kind", None), str):
            raise TypeError(
                f"what stands at {cut!r} must be an Insert with a kind, got {type(insert).__name__}; derive it from "
                'Insert and state kind = "name"'
            )
        if not insert.passes and not insert.emits:
            raise ValueError(f"the {insert.kind} at {cut!r} passes nothing on and emits nothing; state what it emits")
        for name in insert.emits:
            if name in _TAKEN or "/" in name or name.startswith(":"):
                raise ValueError(
                    f"the {insert.kind} at {cut!r} emits {name!r}, which means something else at a cut; call it "
                    "otherwise"
                )
        for part in insert.parts():
            if part in _PARTS:
                raise ValueError(
                    f"the {insert.kind} at {cut!r} has a part {part!r}, which means something else in a network; call "
                    "it otherwise"
                )
    for what, groups in (
        ("are called", [[insert.kind] for insert in inserts]),
        ("emit", [insert.emits for insert in inserts]),
        ("have a part", [insert.parts() for insert in inserts]),
    ):
        names = [name for group in groups for name in group]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two inserts at {cut!r} {what} {repeated[0]!r}; name one of them otherwise")
