"""Rate and accuracy: means over seeds, accuracy at equal bytes, and the front of the best trade-offs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from cleave.reports.rates.results import Point

MEASURED = ("accuracy", "payload_bytes", "payload_zstd_bytes", "train_seconds")


@dataclasses.dataclass(frozen=True)
class Setting(Point):
    """The mean of the points of one setting over its seeds.

    Args:
        accuracy_std: Sample standard deviation of the accuracy over the seeds; ``None`` for one seed.
        seeds: How many there are.
    """

    accuracy_std: float | None = None
    seeds: int = 1


def settings(points: Iterable[Point]) -> list[Setting]:
    """Merge the seeds of each setting, and sort by kind, method and bytes.

    Points are of one setting if they differ in nothing but their seed and what was measured. Where a seed comes
    twice, settings are told apart by the bytes they send; points that still repeat a seed, or have none, stay single.

    Example:
        >>> runs = [Point("hnd", "4 bits", accuracy, 256, seed=seed) for seed, accuracy in enumerate((0.8, 0.9))]
        >>> [(round(s.accuracy, 3), round(s.accuracy_std, 3), s.seeds) for s in settings(runs)]
        [(0.85, 0.071, 2)]
    """
    merged = []
    for alike in _groups(points, _setting).values():
        for group in [alike] if _seeds_differ(alike) else _groups(alike, lambda p: p.payload_bytes).values():
            merged += [_mean(group)] if _seeds_differ(group) else [_mean([point]) for point in group]
    return sorted(merged, key=lambda s: (s.kind != "run", s.method, s.backbone or "", s.payload_bytes, s.label))


def interpolate(points: Iterable[Point], payload_bytes: float) -> float | None:
    """Return a method's accuracy at a number of bytes, linear in log2(bytes) between its neighbouring points.

    Seeds are averaged first. Of the settings only the upper envelope counts: those that no setting with as few bytes
    beats. Beyond its last one, up to the most bytes measured, its accuracy holds: bytes may be left unsent.

    Args:
        points: The points of one method.
        payload_bytes: Bytes per image, above 0.

    Returns:
        The accuracy, from 0 to 1; ``None`` below the fewest and above the most bytes measured.

    Raises:
        ValueError: The points are of several methods, or ``payload_bytes`` is not above 0.

    Example:
        >>> round(interpolate([Point("webp", "q1", 0.6, 64), Point("webp", "q9", 0.8, 256)], 128), 3)
        0.7
    """
    known = sorted(settings(points), key=lambda s: (s.payload_bytes, -s.accuracy))
    if len(methods := {s.method for s in known}) > 1:
        raise ValueError(f"points must be of one method, got {', '.join(sorted(methods))}")
    if not 0 < payload_bytes < math.inf:
        raise ValueError(f"payload_bytes must be above 0 and finite, got {payload_bytes}")
    if not known or not known[0].payload_bytes <= payload_bytes <= known[-1].payload_bytes:
        return None
    envelope: list[Setting] = []
    for setting in known:
        if not envelope or setting.accuracy > envelope[-1].accuracy:
            envelope.append(setting)
    at = bisect_left(envelope, payload_bytes, key=lambda s: s.payload_bytes)
    if at == len(envelope) or envelope[at].payload_bytes == payload_bytes:
        return envelope[min(at, len(envelope) - 1)].accuracy
    low, high = envelope[at - 1], envelope[at]
    share = math.log2(payload_bytes / low.payload_bytes) / math.log2(high.payload_bytes / low.payload_bytes)
    return low.accuracy + share * (high.accuracy - low.accuracy)


def pareto_front(costs: Sequence[tuple[float, ...]]) -> list[bool]:
    """Tell which vectors of costs no other dominates, that is, undercuts in one cost without exceeding it in another.

    Equal vectors do not dominate each other.

    Example:
        >>> pareto_front([(1, 4), (2, 2), (2, 3), (2, 2)])
        [True, True, False, True]
    """
    front: list[tuple[float, ...]] = []
    # In lexical order whatever dominates a vector comes before it, and a front member dominates all it rules out.
    for cost in sorted(set(costs)):
        if not any(all(a <= b for a, b in zip(best, cost, strict=True)) for best in front):
            front.append(cost)
    members = set(front)
    return [cost in members for cost in costs]


class TradeOff(NamedTuple):
    """A setting, and whether it is on the front of its backbone."""

    setting: Setting
    front: bool


def trade_offs(known: Iterable[Setting]) -> dict[str, list[TradeOff]]:
    """Compare settings in parameters on the device, bytes sent and accuracy, the three-way trade-off of SC2.

    A setting is on the front if no other of its backbone has at most as many parameters, at most as many bytes and at
    least its accuracy, one of them strictly better (Matsubara et al. 2023, "SC2 Benchmark: Supervised Compression for
    Split Computing").

    Args:
        known: Settings; those whose parameters nobody counted have no place here.

    Returns:
        By the name of the backbone, empty where unknown: its settings, fewest parameters first, then fewest bytes.
    """
    counted = [(s, (s.encoder_params, s.payload_bytes, -s.accuracy)) for s in known if s.encoder_params is not None]
    result = {}
    for backbone, group in sorted(_groups(counted, lambda pair: pair[0].backbone or "").items()):
        group = sorted(group, key=lambda pair: pair[1])
        front = pareto_front([cost for _, cost in group])
        result[backbone] = [TradeOff(s, member) for (s, _), member in zip(group, front, strict=True)]
    return result


def _groups(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _setting(point: Point) -> Hashable:
    told_apart = {field.name for field in dataclasses.fields(Point)} - {*MEASURED, "seed", "checkpoint"}
    return tuple(getattr(point, name) for name in sorted(told_apart))


def _seeds_differ(points: Sequence[Point]) -> bool:
    return None not in (seeds := {p.seed for p in points}) and len(seeds) == len(points)


def _mean(points: Sequence[Point]) -> Setting:
    values = {name: [getattr(p, name) for p in points] for name in MEASURED}
    means = {name: None if None in known else statistics.fmean(known) for name, known in values.items()}
    single = {} if len(points) == 1 else {"seed": None, "checkpoint": None}
    own = {field.name: getattr(points[0], field.name) for field in dataclasses.fields(Point)} | single | means
    std = None if len(points) == 1 else statistics.stdev(values["accuracy"])
    return Setting(**own, accuracy_std=std, seeds=len(points))
