"""Accuracy against the rate of lost packets, for networks trained with and without packet loss, in one plot.

Trains head distillation twice, over a perfect link and over one that loses a random share of its packets up to
``--worst``, and evaluates both at rates from 0 to ``--worst``, three draws each. By default on the embedded digits,
with a teacher trained on the way; further overrides of train.py go behind, and ``base.ckpt_path=FILE`` saves it:

    python benchmarks/packet_loss.py [--output DIR] [--worst 0.5] [OVERRIDE …]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from cleave.architectures import PacketLoss
from cleave.reports.csv_file import write_csv
from cleave.reports.plotting import accuracy_axis, legend, matplotlib_defaults, new_figure, png, styles
from cleave.reports.terminal import table
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.train import train

SEEDS = (0, 1, 2)
PLAIN = ["trainer=cpu", "callbacks.progress=null", "+trainer.enable_progress_bar=false"]
DIGITS = ["experiment=digits_hnd"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("logs/packet_loss"))
    parser.add_argument("--worst", type=float, default=0.5, help="highest rate of lost packets, below 1")
    parser.add_argument("--packet-bytes", type=int, default=8)
    parser.add_argument("overrides", nargs="*", help="of train.py; without any, experiment=digits_hnd")
    args = parser.parse_args()
    quiet()
    overrides = [*(args.overrides or DIGITS), *PLAIN]
    if not any(item.startswith("base.ckpt_path") for item in overrides):
        train(compose_config("train", ["experiment=digits_teacher", *PLAIN], args.output / "teacher"))
        overrides.append(f"base.ckpt_path={args.output}/teacher/checkpoints/best.ckpt")
    lossy = [
        "channel=packet_loss", f"channel.rate=[0.0,{args.worst}]", f"channel.packet_bytes={args.packet_bytes}",
        "channel.when=train",
    ]  # fmt: skip
    for name, more in (("perfect link", []), ("packet loss", lossy)):
        train(compose_config("train", [*overrides, *more], folder(args.output, name)))
    rates = [args.worst * i / 5 for i in range(6)]
    rows = [row for name in ("perfect link", "packet loss") for row in measure(args, name, rates)]
    table(
        f"Accuracy over lost packets of {args.packet_bytes} bytes",
        [(r["trained over"], f"{r['rate']:.2f}", f"{100 * r['accuracy']:.2f} % ± {100 * r['std']:.2f}") for r in rows],
        ("trained over", "packets lost", "accuracy"),
    )
    write_csv(args.output / "packet_loss.csv", rows)
    plot(rows, args.output / "packet_loss.png")
    print(f"Written: {args.output / 'packet_loss.csv'}, {args.output / 'packet_loss.png'}")


def folder(output: Path, name: str) -> Path:
    return output / name.replace(" ", "_")


@torch.no_grad()
def measure(args: argparse.Namespace, name: str, rates: list[float]) -> list[dict[str, Any]]:
    """Return the accuracy of one network at each rate: mean and standard deviation over three draws."""
    restored = restore(folder(args.output, name) / "checkpoints/best.ckpt")
    data = restore_data(restored, compose_config("evaluate", ["ckpt_path=x"], args.output / "evaluate").data)
    data.setup("test")
    batches = [(data.input.normalize(b["images"]), b["labels"]) for b in data.eval_dataloader("test")]
    rows: list[dict[str, Any]] = []
    for rate in rates:
        restored.network.set_channel(PacketLoss(rate, packet_bytes=args.packet_bytes))
        found = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            hits = sum((restored.network(x).argmax(1) == y).sum().item() for x, y in batches)
            found.append(hits / sum(len(y) for _, y in batches))
        spread = statistics.stdev(found)
        rows.append({"trained over": name, "rate": rate, "accuracy": statistics.mean(found), "std": spread})
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw both networks' accuracy over the rate of lost packets."""
    names = list(dict.fromkeys(row["trained over"] for row in rows))
    looks = styles(dict.fromkeys(names, False))
    handles = []
    with matplotlib_defaults():
        figure = new_figure(4.5)
        axes = figure.add_subplot()
        for name in names:
            line = [row for row in rows if row["trained over"] == name]
            drawn = axes.errorbar(
                [100 * row["rate"] for row in line],
                [100 * row["accuracy"] for row in line],
                [100 * row["std"] for row in line],
                color=looks[name].color,
                marker=looks[name].marker,
                capsize=3,
            )
            handles.append((f"trained over: {name}", drawn))
        accuracy_axis(axes, [100 * row["accuracy"] for row in rows], "Accuracy over a lossy link")
        axes.set_xlabel("Packets lost (%)")
        legend(figure, handles)
        file.write_bytes(png(figure))


if __name__ == "__main__":
    main()
