"""What the benchmark of links came to: its table, its plot, and tables of all paths that a search may choose from."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from resumable import line

from cleave.architectures import Blocks, Path, cut_blocks, link_blocks
from cleave.planning import (
    BlockTimes,
    PathLoad,
    PathReward,
    exhaustive_search,
    measure_chain,
    path_loads,
    path_problem,
    read_block_times,
    reward_value,
    write_block_times,
)
from cleave.planning.paths.times import crossings
from cleave.reports.csv_file import write_csv
from cleave.reports.paths.tables import path_rows
from cleave.reports.plotting import accuracy_axis, legend, matplotlib_defaults, new_figure, png, styles
from linking.five_classes import normalise
from linking.training import HOST_BLOCKS, LOCAL_BLOCKS, Pairs, Row

HEADER = (
    "path", "links lead over", "accuracy", "compensated, of the skip", "of the random host", "MACs local", "host",
    "links", "parameters host", "links", "bytes up", "down", "seconds an epoch",
)  # fmt: skip
NAMES = {
    "pretrained": "the trained host",
    "random": "a random host",
    "just links": "nothing: links alone",
    "skip": "nothing: skip-connection",
    "scratch": "a host that learns with the links from scratch",
    "exit": "nothing: early exit",
}


class Group(NamedTuple):
    """The rows that differ in their seed alone, and what those that are there came to."""

    row: Row
    found: list[dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        """Accuracies in per cent."""
        return [100 * each["accuracy"] for each in self.found]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.mean(self.accuracies)

    @property
    def local_share(self) -> float:
        """Share of the local network's MACs that still run, its own exit included."""
        one = self.found[0]
        whole = one["kept"]["macs"] + one["skipped"]["macs"]
        return (one["kept"]["macs"] + one["inserts"]["macs"]) / whole

    @property
    def name(self) -> str:
        """What its links lead over, and how they are made."""
        made = ", ".join(str(value) for value in self.row.links.values())
        host = f" ({self.row.host})" if self.row.host else ""
        return NAMES[self.row.kind] + host + (f", {made.replace(', ', '-')}" if made else "")

    @property
    def path(self) -> str:
        """Its path, or where its exit stands."""
        return LOCAL_BLOCKS[self.row.path[0] or 0] if self.row.kind == "exit" else str(Path(*self.row.path))


def grouped(pairs: Pairs, rows: Iterable[Row]) -> list[Group]:
    """Return the rows that are there, one for all seeds, those of a path together."""
    found: dict[str, Group] = {}
    for row in sorted(rows, key=lambda row: (-(row.path[0] or 0), -(row.path[3] or 0))):
        result = pairs.known(row)
        if result is not None:
            alike = dataclasses.replace(row, seed=0)
            found.setdefault(str(alike), Group(alike, [])).found.append(result)
    return list(found.values())


def cells(group: Group, groups: Sequence[Group], original: float) -> tuple[str, ...]:
    """Return the cells of a row of the table; the share that is compensated is against the mean of the same path."""
    one = group.found[0]
    beside = {
        each.row.kind: each.mean
        for each in groups
        if _ends(each) == _ends(group) and not each.row.links and each.row.host in ("", group.row.host or each.row.host)
    }

    def share(base: str) -> str:
        others = ("skip", "exit") if base == "skip" else ("random", "just links", "skip", "exit")
        if base not in beside or group.row.kind in others or beside[base] >= original:
            return ""
        return f"{100 * (group.mean - beside[base]) / (original - beside[base]):.0f} %"

    spread = statistics.stdev(group.accuracies) if len(group.accuracies) > 1 else None
    accuracy = f"{group.mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
    seconds = statistics.median(each["seconds"] for each in group.found) / group.row.epochs
    local = one["kept"]["macs"] + one["inserts"]["macs"]
    return (
        group.path, group.name, accuracy, share("skip"), share("random"), f"{local / 1e6:.1f} M",
        f"{one['host']['macs'] / 1e6:.1f} M", f"{one['links']['macs'] / 1e6:.1f} M",
        f"{one['host']['params'] / 1e3:.0f} k", f"{(one['links']['params'] + one['inserts']['params']) / 1e3:.0f} k",
        f"{one['bytes_up']:,}", f"{one['bytes_down']:,}", f"{seconds:.1f}",
    )  # fmt: skip


def _ends(group: Group) -> tuple[int | None, int | None]:
    return group.row.path[0], group.row.path[3]


def markdown(rows: Sequence[Sequence[str]], words: str) -> str:
    """Return the table as Markdown under a line of words."""
    return "\n".join([words, "", line(HEADER), line(["---"] * len(HEADER)), *map(line, rows)]) + "\n"


def plot(groups: Sequence[Group], original: float) -> bytes:
    """Draw accuracy over the local network's work that is left, as a PNG; bars reach over all seeds.

    What was run for one path alone makes no line, and is left to the table.
    """
    with matplotlib_defaults():
        figure = new_figure(5.5)
        axes = figure.add_subplot()
        handles, heights = [], [original]
        counted = Counter(group.name for group in groups)
        names = [name for name, paths in counted.items() if paths > 1]
        looks = styles(dict.fromkeys(names, False))
        for name in names:
            some = sorted((group for group in groups if group.name == name), key=lambda group: group.local_share)
            look, x = looks[name], [100 * group.local_share for group in some]
            reach = [[abs(group.mean - end(group.accuracies)) for group in some] for end in (min, max)]
            drawn = axes.errorbar(
                x, [group.mean for group in some], yerr=reach, color=look.color, marker=look.marker, capsize=3,
                linestyle=look.dash, linewidth=1,
            )  # fmt: skip
            handles.append((name, drawn))
            heights += [height for group in some for height in group.accuracies]
        level = axes.axhline(original, color="black", linestyle=":", linewidth=1.2)
        accuracy_axis(axes, heights, "")
        axes.set_xlabel("MACs left to the local side (% of the local network's)")
        legend(figure, [*handles, (f"local network: {original:.1f} %", level)])
        return png(figure)


def search_table(pairs: Pairs, rows: Sequence[Row], host: str, file: FilePath) -> bool:
    """Write the table of all paths of a pair as a search over all of them does; say whether all were trained."""
    found = {row.path: pairs.known(row) for row in rows}
    if not rows or any(result is None for result in found.values()):
        return False
    accuracies = {Path(*path): result["accuracy"] for path, result in found.items() if result is not None}
    times, original = block_times(pairs, host, list(accuracies)), pairs.accuracy()
    loads = {}
    for path, load in path_loads(times, list(accuracies)).items():
        one = found[tuple(path)]
        assert one is not None
        params = one["kept"]["params"], one["host"]["params"] + one["links"]["params"]
        loads[path] = dataclasses.replace(load, local_params=params[0], host_params=params[1])
    alone = PathLoad(times.original, local_params=sum(one[part]["params"] for part in ("kept", "skipped")))
    problem = path_problem(alone, original, loads, reward_value(PathReward(), original))
    write_csv(file, path_rows(problem, exhaustive_search(problem, accuracies.__getitem__)))
    return True


def block_times(pairs: Pairs, host: str, paths: Sequence[Path]) -> BlockTimes:
    """Return the seconds of this process by block and by link of some paths, measured once and kept in a file."""
    file = pairs.folder / f"times_{host}.json"
    if not file.exists():
        lent = cut_blocks(pairs.network(host), pairs.sample, HOST_BLOCKS[host], "host")
        images = normalise(pairs.test.pixels[:32])
        own, others = (
            measure_chain(list(blocks.stages), images, clock=time.process_time) for blocks in (pairs.blocks, lent)
        )
        times = BlockTimes(
            dict(zip(LOCAL_BLOCKS, own[:-1], strict=True)), own[-1], dict(zip(HOST_BLOCKS[host], others, strict=False)),
            links=_link_times(pairs.blocks, lent, paths),
        )  # fmt: skip
        write_block_times(file, times)
    return read_block_times(file, LOCAL_BLOCKS, HOST_BLOCKS[host])


def _link_times(local: Blocks, host: Blocks, paths: Sequence[Path]) -> dict[str, float]:
    """Return the seconds of each link of some paths by its name."""
    found: dict[str, float] = {}
    for path in paths:
        names = crossings(path, local.names, host.names)
        if all(name in found for name in names):
            continue
        links = link_blocks(local, None if path.skips else host, path).links.values()
        for name, link in zip(names, links, strict=True):
            x = local.sample.new_zeros(32, *link.source.shape)
            found.setdefault(name, measure_chain([link], x, rounds=5, clock=time.process_time)[0])
    return found
