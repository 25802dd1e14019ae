"""All closed sets of a directed graph without cycles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cleave.architectures.naming import whole_number


class TooManySetsError(ValueError):
    """There are more closed sets than may be enumerated."""


def closed_sets(needs: Sequence[Sequence[int]], limit: int) -> np.ndarray:
    """Enumerate the sets of nodes that hold with a node all that it needs.

    The nodes are taken one by one. Of the sets found until then, those that hold what the new one needs give one more
    each; as no set is ever given up, it takes no more steps than there are sets, times the nodes.

    Args:
        needs: For every node the earlier ones that it needs.
        limit: The most sets to enumerate.

    Returns:
        bool (nodes, sets), the empty set first, the full one last.

    Raises:
        TooManySetsError: There are more.
        ValueError: ``limit`` is no whole number of at least 1, or a node needs one that is not before it.

    Example:
        >>> closed_sets([[], [0], [0]], 10).astype(int)
        array([[0, 1, 1, 1, 1],
               [0, 0, 1, 0, 1],
               [0, 0, 0, 1, 1]])
    """
    whole_number("limit", limit)
    for node, before in enumerate(needs):
        if any(not 0 <= each < node for each in before):
            raise ValueError(f"node {node} needs {list(before)}; each needs earlier ones only, by their numbers")
    count, found = 1, np.zeros((len(needs), min(limit, 1024)), dtype=bool)
    for node, before in enumerate(needs):
        chosen = np.flatnonzero(found[list(before), :count].all(0))
        total = count + len(chosen)
        if total > limit:
            raise TooManySetsError(
                f"there are more than limit={limit:,} sets of layers that a device could hold ({total:,} of the first "
                f"{node + 1} of {len(needs)} layers alone), too many to look at each; latency, energy and bytes have "
                "their optimum by min-cut without, and the best throughput is then a guess (exact=false)"
            )
        while total > found.shape[1]:
            found = np.concatenate([found, np.zeros_like(found)], axis=1)
        found[:node, count:total] = found[:node, chosen]
        found[node, count:total] = True
        count = total
    return found[:, :count]
