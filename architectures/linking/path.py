"""A path through the blocks of a local network and those of a host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cleave.architectures.naming import did_you_mean


class Path(NamedTuple):
    """The path r = [lout, hin, hout, lin] of Coordinated Deep Neural Networks (2023, 2024).

    Blocks count from 0, and the output layer follows the last one. It runs the local blocks 0 … lout, the entry link,
    the host's blocks hin … hout, the exit link, and the local blocks lin to the end; the local blocks lout + 1 … lin −
    1 are left out. A skip-connection has no host blocks: [lout, –, –, lin].

    Attributes:
        lout: The last local block before the path leaves.
        hin: The first block of the host; ``None`` on a skip-connection.
        hout: The last block of the host; ``None`` on a skip-connection.
        lin: The local block where the path comes back.
    """

    lout: int
    hin: int | None
    hout: int | None
    lin: int

    @property
    def skips(self) -> bool:
        """Whether it is a skip-connection."""
        return self.hin is None

    def __str__(self) -> str:
        """Return it as the papers write it."""
        return f"[{', '.join('-' if block is None else str(block) for block in self)}]"


def read_path(values: Sequence[Any], local: Sequence[str], host: Sequence[str] | None) -> Path:
    """Read a path and check it against the blocks.

    Args:
        values: lout, hin, hout and lin: numbers of blocks, or their names; ``None`` or ``-`` for both of the host's on
            a skip-connection.
        local: Names of the local network's blocks.
        host: Names of the host's; ``None`` where there is no host.

    Raises:
        ValueError: A block is unknown, or the path leads nowhere.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 4:
        raise ValueError(f"path must be four blocks, [lout, hin, hout, lin], got {values!r}")
    none = [is_no_block(value) for value in values]
    if none[0] or none[3] or none[1] != none[2]:
        raise ValueError(
            f"path={list(values)} must name lout and lin, and hin and hout both, or neither on a skip-connection"
        )
    lout, lin = _block(values[0], "lout", "local", local), _block(values[3], "lin", "local", local)
    if none[1]:
        if lin <= lout:
            raise ValueError(f"path={list(values)} has lin={lin}, which must come behind lout={lout}")
        if lin == lout + 1:
            raise ValueError(
                f"path={list(values)} skips nothing: block {lin} follows block {lout} anyway; take a later lin"
            )
        return Path(lout, None, None, lin)
    if host is None:
        raise ValueError(f"path={list(values)} leads over a host, but there is none; give a host, or a skip-connection")
    hin, hout = _block(values[1], "hin", "host", host), _block(values[2], "hout", "host", host)
    if lin <= lout:
        raise ValueError(f"path={list(values)} has lin={lin}, which must come behind lout={lout}")
    if hin > hout:
        raise ValueError(f"path={list(values)} has hin={hin} behind hout={hout}; the host's blocks run in order")
    return Path(lout, hin, hout, lin)


def is_no_block(value: Any) -> bool:
    """Whether a value stands for hin or hout where a path has none: ``None`` or a dash."""
    return value is None or (isinstance(value, str) and value.strip() in ("-", "–", ""))


def every_path(local: int, host: int, skips: bool = True) -> Iterator[Path]:
    """Yield every path through so many blocks, first those over the host, then the skip-connections.

    Args:
        local: Number of the local network's blocks.
        host: Number of the host's.
        skips: Whether to yield skip-connections.
    """
    for lout in range(local):
        for lin in range(lout + 1, local):
            yield from (Path(lout, hin, hout, lin) for hin in range(host) for hout in range(hin, host))
    if skips:
        yield from (Path(lout, None, None, lin) for lout in range(local) for lin in range(lout + 2, local))


def _block(value: Any, name: str, owner: str, blocks: Sequence[str]) -> int:
    listed = ", ".join(f"{number} {block}" for number, block in enumerate(blocks))
    if isinstance(value, str):
        if value not in blocks:
            close = did_you_mean(value, blocks)
            raise ValueError(f"path has {name}={value!r}, which is no {owner} block; they are {listed}.{close}")
        return list(blocks).index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(blocks):
        raise ValueError(f"path has {name}={value!r}, which is no {owner} block; they are {listed}")
    return value
