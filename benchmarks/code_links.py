"""Links between frozen networks (CoDE) on a folder of CIFAR-10 images: what a host's trained blocks are worth.

The local network answers five of the ten classes, its hosts learned from scratch on the other five. Paths are trained
alike over the trained host, over a random one, by their links alone, and past the blocks (a skip-connection); beside
them stand early exits, and links and host that learn together from scratch. What is there is not trained again.

    python benchmarks/code_links.py --data DIR --weights resnet20.th [--report FILE.md] [--plot FILE.png] [--tables DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from linking.five_classes import Settings, load_images
from linking.report import HEADER, cells, grouped, markdown, plot, search_table
from linking.training import Pairs, Row
from resumable import percent

from cleave.planning import candidate_paths
from cleave.reports.terminal import table
from cleave.scripts.assembly.starting.terminal import quiet

# What they leave out: layer3 (75 % of the parameters, 32 % of the MACs), 55 % and 76 % of the MACs.
PATHS = {"layer3": (2, 4, 5, 5), "half": (1, 4, 5, 5), "most": (0, 2, 5, 5)}
FURTHER = (2, 1, 4, 5)  # over AlexNet
REDUCED = (25, 5)
STEPS = ("headline", "seeds", "most", "tables", "others")
TABLES = ("alexnet", "resnet20")


def main() -> None:
    args = arguments()
    quiet()
    torch.set_num_threads(args.threads)
    pairs = make_pairs(args)
    planned = rows(args)
    for step in STEPS if args.only is None else args.only:
        for row in planned[step]:
            pairs.result(row)
    report(pairs, planned, args)


def report(pairs: Pairs, planned: Mapping[str, list[Row]], args: argparse.Namespace) -> None:
    """Print what is there so far; write it as Markdown, as a picture and as tables of all paths if asked."""
    original = 100 * pairs.accuracy()
    groups = grouped(pairs, [row for step in STEPS if step != "tables" for row in planned[step]])
    found = [cells(group, groups, original) for group in groups]
    hosts = ", ".join(f"{name} {percent(pairs.accuracy(name))}" for name in pairs.settings if name)
    words = (
        f"Local network {original:.2f} % on its five classes; hosts on theirs: {hosts}. Links: {args.images:,} images, "
        f"{args.epochs} epochs, AdamW of {args.rate:g}, batches of {args.batch}; mean ± standard deviation of seeds."
    )
    table(words, found, HEADER)
    if args.report:
        args.report.write_text(markdown(found, words))
    if args.plot and groups:
        args.plot.write_bytes(plot(groups, original))
    for host in TABLES if args.tables else ():
        args.tables.mkdir(parents=True, exist_ok=True)
        rows_of = [row for row in planned["tables"] if row.host == host]
        if not search_table(pairs, rows_of, host, args.tables / f"resnet20_{host}.csv"):
            print(f"{host}: not all paths of its table were trained yet")


def make_pairs(args: argparse.Namespace) -> Pairs:
    local = Settings("resnet20", args.local_epochs, 0.02, {}, str(args.weights))
    hosts = {
        "resnet20": Settings("resnet20", args.host_epochs, 0.2, {}),
        "alexnet": Settings("alexnet", args.host_epochs, 0.05, {"width": 0.375, "dropout": 0.1}),
    }
    return Pairs(local, hosts, load_images(args.data, args.output), args.output)


def rows(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return what is trained, in order of importance."""

    def row(kind: str, path: tuple[int | None, ...], host: str = "resnet20", seed: int = 0, **links: object) -> Row:
        path = (path[0], None, None, path[3]) if kind in ("skip", "exit") else path
        host = "" if kind in ("skip", "exit") else host
        return Row(kind, path, host, links, args.images, args.epochs, args.batch, args.rate, seed)

    both, most = (PATHS["layer3"], PATHS["half"]), PATHS["most"]
    compared = ("pretrained", "random", "skip")
    reduced = [row("pretrained", both[0], style="reduced", channels=channels) for channels in REDUCED]
    return {
        "headline": [row(kind, path) for path in both for kind in (*compared, "just links")],
        "seeds": [row(kind, path, seed=seed) for seed in range(1, args.seeds) for path in both for kind in compared],
        "most": [row(kind, most) for kind in (*compared, "just links")],
        "tables": [each for host in TABLES for each in table_rows(args, host)],
        "others": [
            *(row("exit", path) for path in (*both, most)),
            *reduced,
            *(row(kind, FURTHER, "alexnet") for kind in ("pretrained", "random", "just links")),
            row("scratch", both[0]),
            *(row("skip", both[0], style="reduced", channels=channels) for channels in REDUCED),
            row("scratch", both[1]),
        ],
    }


def table_rows(args: argparse.Namespace, host: str) -> list[Row]:
    """Return every path of a pair that a search may choose from: lout 0, hin 1, all hout, lin that skips some."""
    paths = candidate_paths(6, 6, lout=[0], hin=[1], lin=range(2, 6), skips=False)
    links: Mapping[str, object] = {}
    return [
        Row("pretrained", tuple(path), host, links, args.table_images, args.table_epochs, args.batch, args.rate, 0)
        for path in paths
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg of CIFAR-10"
    )
    parser.add_argument("--weights", type=Path, required=True, help="public weights of the CIFAR ResNet-20")
    parser.add_argument(
        "--output", type=Path, default=Path("logs/code_links"), help="where all that was trained is kept"
    )
    parser.add_argument(
        "--only", nargs="*", choices=STEPS, metavar="STEP", help=f"{', '.join(STEPS)}; none: only report what is there"
    )
    parser.add_argument("--images", type=int, default=8_000, help="training images of links")
    parser.add_argument("--epochs", type=int, default=5, help="over them")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2, help="highest learning rate of links")
    parser.add_argument("--seeds", type=int, default=3, help="of the headline")
    parser.add_argument("--table-images", type=int, default=3_000, help="training images of a path of the tables")
    parser.add_argument("--table-epochs", type=int, default=2)
    parser.add_argument("--local-epochs", type=int, default=1, help="fine-tuning of the public weights")
    parser.add_argument("--host-epochs", type=int, default=4, help="of the hosts, from scratch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write the table as Markdown to this file")
    parser.add_argument("--plot", type=Path, help="draw accuracy over local MACs into this PNG file")
    parser.add_argument("--tables", type=Path, metavar="DIR", help="write the tables of all paths of both pairs there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
