"""The paths to choose from, and each as numbers that a model of accuracy can read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import comb

import numpy as np
import numpy.typing as npt

from cleave.architectures.linking.path import Path, every_path
from cleave.architectures.naming import whole_number

Floats = npt.NDArray[np.float64]
FEATURES = ("lout", "hin", "hout", "lin", "skipped share", "host share", "is a skip")
"""What :func:`path_features` tells of a path."""


def path_counts(local: int, host: int) -> tuple[int, int]:
    r"""Return how many cross-connections and how many skip-connections lead through so many blocks.

    .. math:: \binom{L}{2} \cdot \binom{H + 1}{2} \quad\text{and}\quad \binom{L - 1}{2}

    A cross-connection leaves and comes back at two of the L local blocks in order, and runs hin ≤ hout of the H host
    blocks. A skip-connection leaves out at least one local block.

    Args:
        local: Number L of the local network's blocks.
        host: Number H of the host's; 0 where there is no host.

    Example:
        >>> path_counts(6, 6)
        (315, 10)
    """
    whole_number("local", local)
    whole_number("host", host, least=0)
    return comb(local, 2) * comb(host + 1, 2), comb(local - 1, 2)


def candidate_paths(
    local: int,
    host: int,
    *,
    lout: Collection[int] | None = None,
    hin: Collection[int] | None = None,
    hout: Collection[int] | None = None,
    lin: Collection[int] | None = None,
    cross: bool = True,
    skips: bool = True,
) -> tuple[Path, ...]:
    """List the paths through two networks, or those of them that a search is limited to.

    Args:
        local: Number of the local network's blocks.
        host: Number of the host's; 0 where there is no host.
        lout: Local blocks to leave behind; ``None``: all.
        hin: Host blocks to enter at; a skip-connection has none, so that no choice of them leaves it out.
        hout: Host blocks to leave behind.
        lin: Local blocks to come back to.
        cross: Whether cross-connections are among them.
        skips: Whether skip-connections are among them.

    Raises:
        ValueError: A limit names a block that there is not, or no path is left.

    Example:
        >>> [str(path) for path in candidate_paths(3, 2, lout=[0], hin=[1])]
        ['[0, 1, 1, 1]', '[0, 1, 1, 2]', '[0, -, -, 2]']
    """
    path_counts(local, host)  # checks both numbers
    limits = {"lout": (lout, local), "hin": (hin, host), "hout": (hout, host), "lin": (lin, local)}
    allowed = {name: _blocks(name, values, count) for name, (values, count) in limits.items()}

    def within(path: Path) -> bool:
        if not (skips if path.skips else cross):
            return False
        return all(block is None or block in allowed[name] for name, block in path._asdict().items())

    found = tuple(path for path in every_path(local, host) if within(path))
    if not found:
        given = ", ".join(f"{name}={sorted(values)}" for name, (values, _) in limits.items() if values is not None)
        said = [f"cross={cross}, skips={skips}", *([given] if given else [])]
        raise ValueError(
            f"no path is left to choose from through {local} local and {host} host blocks with {', '.join(said)}; "
            "allow more of them"
        )
    return found


def path_features(paths: Sequence[Path], local: int, host: int) -> Floats:
    """Return what tells paths apart, each feature between 0 and 1.

    They are the four blocks, as shares of their network, the share of the local blocks that is left out, the share of
    the host's that runs, and whether it is a skip-connection, whose host blocks are 0.

    Args:
        paths: P paths.
        local: Number of the local network's blocks.
        host: Number of the host's.

    Returns:
        (P, 7), in the order of ``FEATURES``.

    Raises:
        ValueError: A path leads outside the blocks.

    Example:
        >>> path_features([Path(0, 1, 4, 5)], 6, 6)[0].round(2).tolist()
        [0.0, 0.2, 0.8, 1.0, 0.67, 0.67, 0.0]
    """
    rows = []
    for path in paths:
        if not (0 <= path.lout < path.lin < local and (path.hin is None or 0 <= path.hin <= (path.hout or 0) < host)):
            raise ValueError(f"the path {path} does not lead through {local} local and {host} host blocks")
        hin, hout = path.hin or 0, path.hout or 0
        run = 0 if path.skips else hout - hin + 1
        ends = [path.lout / max(local - 1, 1), hin / max(host - 1, 1), hout / max(host - 1, 1)]
        skipped = path.lin - path.lout - 1
        rows.append([*ends, path.lin / max(local - 1, 1), skipped / local, run / max(host, 1), float(path.skips)])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURES))


def _blocks(name: str, values: Collection[int] | None, count: int) -> set[int]:
    """Return the blocks that a limit allows."""
    if values is None:
        return set(range(count))
    if isinstance(values, str) or not isinstance(values, Collection):
        raise ValueError(f"{name} must be a list of blocks, got {values!r}")
    owner = "local" if name.startswith("l") else "host"
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise ValueError(f"{name} has {value!r}, which is no {owner} block; they are 0 to {count - 1}")
    return set(values)
