"""Every way of training early exits on one data set, at equal shares of the backbone's work.

A ResNet-32 is fine-tuned on the images; then it gets exits at even shares of its MACs, which each method trains: end to
end for 5 epochs, or on the frozen backbone with stored features. Validation and test are the two halves of ``test/``,
since the pretrained weights have seen all of ``train/``: thresholds are chosen on the one, all else is reported on the
other. A run that is there is not repeated, one that was interrupted is resumed.

    python benchmarks/exit_methods.py --data DIR --weights FILE [--only METHOD …] [--report FILE.md] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from resumable import line, percent, run

from cleave.reports.plotting import accuracy_axis, legend, matplotlib_defaults, new_figure, png, styles
from cleave.reports.rates.results import RESULTS
from cleave.reports.terminal import table

SGD = [
    "training.optimizer._target_=torch.optim.SGD",
    "+training.optimizer.momentum=0.9",
    "training.optimizer.weight_decay=1e-4",
]
# What was pretrained learns at a lower rate than the exits, which were not.
PRETRAINED = [f"+training.lr_scales.{layer}=0.4" for layer in ("conv1", "bn1", "layer1", "layer2", "layer3", "linear")]
END_TO_END = [*SGD, "training.optimizer.lr=0.05", *PRETRAINED, "trainer.max_epochs=EPOCHS"]
FROZEN = ["training.optimizer.lr=3e-3", "feature_cache.use=true", "feature_cache.dtype=float16", "data.augment=none"]
METHODS: dict[str, list[str]] = {
    "exits_distilled": ["method=exits_distilled", *END_TO_END],
    "shallow_deep": ["method=exits_joint", "method.loss.weights=shallow_deep", *END_TO_END],
    "branchynet": ["method=exits_joint", "method.loss.weights=branchynet", *END_TO_END],
    "separate": ["method=exits_separate", "trainer.max_epochs=10", *FROZEN],
    "distilled_heads": ["method=exits_distilled", "method.train=[exits]", "trainer.max_epochs=10", *FROZEN],
    "zero_time_waste": [
        "experiment=zero_time_waste", "~steps.backbone", "+steps.exits.trainer.max_epochs=10",
        "+steps.ensemble.trainer.max_epochs=3", *FROZEN,
    ],
    "linear": ["method=exits_joint", "method.loss.weights=linear", *END_TO_END],
}  # fmt: skip
# The rows of the table: which network, judged by which policy.
ROWS = {
    "BranchyNet: joint, weights 1 and 0.3; entropy": ("branchynet", "entropy"),
    "Shallow-Deep: joint, growing weights; confidence": ("shallow_deep", "confidence"),
    "Distilled from the final exit, end to end; confidence": ("exits_distilled", "confidence"),
    "Distilled from the final exit, frozen backbone; confidence": ("distilled_heads", "confidence"),
    "Separate, frozen backbone; confidence": ("separate", "confidence"),
    "Zero Time Waste, frozen backbone; ensemble": ("zero_time_waste", "ensemble"),
    "Patience, on the joint network with growing weights": ("shallow_deep", "patience"),
    "Patience, on the joint network with linear weights": ("linear", "patience"),
    "Patience, on the frozen backbone": ("separate", "patience"),
}


LOWEST = 70  # per cent: what is below says nothing of use, and would press all else together


def main() -> None:
    args = arguments()
    folder = args.output.absolute()
    common = [
        "data=image_folder", f"data.root={args.data.absolute()}", "data.val_from=test", "data.augment=crop_flip",
        "data.batch_size=128", "backbone=cifar", "backbone.name=resnet32", f"trainer={args.trainer}",
        f"trainer.precision={args.precision}", f"seed={args.seed}", "callbacks.progress=null",
        "+trainer.enable_progress_bar=false", "training.channels_last=true",
    ]  # fmt: skip
    faster = [f"training.compile={str(args.compile).lower()}"]
    run(
        "train", folder / "backbone", args.threads, "method=classification", *common, *faster, *SGD,
        "training.optimizer.lr=0.02", "trainer.max_epochs=3", f"backbone.weights={args.weights.absolute()}",
        done=RESULTS,
    )  # fmt: skip
    backbone = folder / "backbone/checkpoints/best.ckpt"
    exits = [f"base.ckpt_path={backbone}", "exits.count=5", f"feature_cache.directory={folder / 'feature_cache'}"]
    for name in args.only or METHODS:
        method, *overrides = (given.replace("EPOCHS", str(args.epochs)) for given in METHODS[name])
        compiled = faster if END_TO_END[-1] in METHODS[name] else []
        run("train", folder / name, args.threads, method, *common, *exits, *compiled, *overrides,
            done="trained")  # fmt: skip
        policies = ",".join({policy for network, policy in ROWS.values() if network == name} | {"confidence"})
        checkpoint = sorted(folder.glob(f"{name}/checkpoints/**/best.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
        run(
            "exits_report", folder / name / "report", args.threads, f"ckpt_path={checkpoint}",
            f"policies=[{policies}]", "shared=false", done="exits_report.json",
        )  # fmt: skip
    report(folder, args.report, args.plot)


def report(folder: Path, file: Path | None, picture: Path | None) -> None:
    """Print what is there so far, beside the untouched backbone; write it as Markdown and as a picture if asked."""
    backbone = json.loads((folder / "backbone" / RESULTS).read_text())["points"][0]["accuracy"]
    header = ("method", "25 %", "50 %", "75 %", "100 %", "best", "at", "last exit", "cost over budget, at most")
    rows = [("Untouched backbone", "", "", "", *[percent(backbone)] * 2, "100.0 %", percent(backbone), "")]
    reports = {name: folder / network / "report/exits_report.json" for name, (network, _) in ROWS.items()}
    found = {name: json.loads(path.read_text()) for name, path in reports.items() if path.exists()}
    rows += [(name, *cells(measured, ROWS[name][1])) for name, measured in found.items()]
    table("ResNet-32 with five exits: accuracy at shares of the backbone's MACs, test images", rows, header)
    if file:
        file.write_text("\n".join([line(header), line(["---"] * len(header)), *map(line, rows)]) + "\n")
    if picture:
        picture.write_bytes(
            plot({name: measured["policies"][ROWS[name][1]] for name, measured in found.items()}, backbone)
        )


def plot(figures: dict[str, dict[str, Any]], backbone: float) -> bytes:
    """Draw accuracy over mean cost, one line a row of the table and marks at its budgets, as a PNG."""
    with matplotlib_defaults():
        figure = new_figure(5.5)
        axes = figure.add_subplot()
        handles, heights = [], [100 * backbone]
        for name, look in styles(dict.fromkeys(figures, False)).items():
            curve = [(100 * cost, 100 * accuracy) for cost, accuracy in figures[name]["curve"]]
            axes.plot(*zip(*curve, strict=True), color=look.color, linewidth=1.5, alpha=0.8)
            points = [point for point in figures[name]["points"] if point["accuracy"] is not None]
            marks = [[100 * point[key] for point in points] for key in ("cost", "accuracy")]
            (mark,) = axes.plot(*marks, color=look.color, marker=look.marker, linestyle="none", markersize=6)
            handles.append((name, mark))
            heights += [*(accuracy for _, accuracy in curve), *marks[1]]
        level = axes.axhline(100 * backbone, color="black", linestyle="--", linewidth=1.2)
        accuracy_axis(axes, [height for height in heights if height > LOWEST], "")
        axes.set_xlabel("Mean MACs per image (% of the backbone's)")
        legend(figure, [*handles, (f"untouched backbone: {100 * backbone:.1f} %", level)])
        return png(figure)


def cells(found: dict[str, Any], policy: str) -> list[str]:
    """One network's figures under one policy."""
    figures = found["policies"][policy]
    points = [point for point in figures["points"] if point["accuracy"] is not None]
    accuracies = {point["budget"]: point["accuracy"] for point in points}
    best = max(points, key=lambda point: point["val_accuracy"])
    return [
        *(percent(accuracies.get(budget)) for budget in (0.25, 0.5, 0.75, 1.0)),
        percent(best["accuracy"]),
        f"{100 * best['cost']:.1f} %",
        percent(found["exits"][-1]["accuracy"]),
        f"{100 * max(point['cost'] - point['budget'] for point in points):+.1f} points",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg"
    )
    parser.add_argument("--weights", type=Path, required=True, help="pretrained weights of the CIFAR ResNet-32")
    parser.add_argument("--output", type=Path, default=Path("logs/exit_methods"))
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--trainer", default="cpu", choices=("cpu", "gpu", "default"))
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5, help="of the methods that train end to end")
    parser.add_argument("--report", type=Path, help="write the table as Markdown to this file")
    parser.add_argument("--plot", type=Path, help="draw accuracy over MACs into this PNG file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
