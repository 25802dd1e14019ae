"""Every objective of split training on one data set, with one encoder budget, beside image codecs at equal bytes.

A ResNet-20 is fine-tuned on the images, then split at layer2 with at most 70,000 parameters on the device, and trained
by each method for the same number of epochs: 6, or 4 + 4 for recipes of two steps. Validation and test are the two
halves of ``test/``, since the pretrained weights have seen all of ``train/``. A run that is there is not repeated, one
that was interrupted is resumed.

    python benchmarks/split_methods.py --data DIR --weights resnet20.th [--only head_distillation …] [--report FILE.md]
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

from resumable import line, percent
from resumable import run as run_until

from cleave.reports.rates.collect import collect, reference_accuracy
from cleave.reports.rates.fronts import interpolate, settings
from cleave.reports.rates.results import RESULTS
from cleave.reports.terminal import table
from cleave.scripts.compare import write_report

run = functools.partial(run_until, done=RESULTS)
BUDGET = 70_000
EPOCHS = ["trainer.max_epochs=6"]
STEPS = ["+steps.head.trainer.max_epochs=4", "+steps.finetune.trainer.max_epochs=4"]
# What was pretrained learns at a tenth of the rate of what was not.
END_TO_END = [f"+training.lr_scales.{layer}=0.1" for layer in ("layer3", "linear")]
FINE_TUNE = [f"+steps.finetune.training.lr_scales.{layer}=0.3" for layer in ("layer3", "linear")]
FINE_TUNE += ["+steps.finetune.training.optimizer.lr=1e-3"]
LAYERS = "{layer2: 1.0, layer3: 1.0}"
INSERTED = ["split.form=insert", "bottleneck.stride=2", "bottleneck.width=12", "bottleneck.depth=0"]
METHODS: dict[str, list[str]] = {
    "cross_entropy": ["method=cross_entropy", *EPOCHS, *END_TO_END],
    "knowledge_distillation": ["method=knowledge_distillation", *EPOCHS, *END_TO_END],
    "reconstruction": ["method=reconstruction", *EPOCHS, *INSERTED],
    "head_distillation": ["method=head_distillation", *EPOCHS],
    "generalized_head_distillation": [
        "method=generalized_head_distillation", f"method.loss.weights={LAYERS}", *EPOCHS,
    ],
    "bottlefit": ["experiment=bottlefit", f"compare={LAYERS}", *STEPS, *FINE_TUNE],
    "information_bottleneck": ["experiment=vib", *EPOCHS, *END_TO_END],
    "entropic_student": ["experiment=entropic_student", f"compare={LAYERS}", "beta=200", *STEPS, *FINE_TUNE],
    "reconstruction_128": ["method=reconstruction", *EPOCHS, *INSERTED, "codec.bits=2"],
    "bottlefit_128": ["experiment=bottlefit", f"compare={LAYERS}", *STEPS, *FINE_TUNE, "codec.bits=2"],
    "entropic_student_128": ["experiment=entropic_student", f"compare={LAYERS}", "beta=800", *STEPS, *FINE_TUNE],
}  # fmt: skip
ENTROPIC = ("entropic_student", "entropic_student_128")


def main() -> None:
    args = arguments()
    folder = args.output.absolute()
    teacher = folder / "teacher/checkpoints/best.ckpt"
    common = [
        "data=image_folder", f"data.root={args.data.absolute()}", "data.val_from=test", "data.augment=crop_flip",
        "data.batch_size=128", "backbone=cifar", "backbone.name=resnet20", f"trainer={args.trainer}",
        f"trainer.precision={args.precision}", f"seed={args.seed}", "callbacks.progress=null",
        "+trainer.enable_progress_bar=false",
    ]  # fmt: skip
    sgd = [
        "training.optimizer._target_=torch.optim.SGD",
        "training.optimizer.lr=0.02",
        "+training.optimizer.momentum=0.9",
    ]
    run(
        "train", folder / "teacher", args.threads, *common, *sgd, "training.optimizer.weight_decay=1e-4",
        "trainer.max_epochs=3", f"backbone.weights={args.weights.absolute()}",
    )  # fmt: skip
    run("image_codecs", folder / "codecs", args.threads, f"ckpt_path={teacher}", "envelope=false")
    split = [
        f"base.ckpt_path={teacher}", "split.at=layer2", "split.envelope=false", "bottleneck.stride=4",
        "bottleneck.width=56", "bottleneck.decoder_width=96", "training.optimizer.lr=3e-3",
        "training.channels_last=true",
    ]  # fmt: skip
    for name in args.only or METHODS:
        codes = [] if name in ENTROPIC else ["codec.bits=4", "codec.range=learned"]
        run("train", folder / name, args.threads, METHODS[name][0], *common, *split, *codes, *METHODS[name][1:])
    report(folder, args.report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg"
    )
    parser.add_argument("--weights", type=Path, required=True, help="pretrained weights of the CIFAR ResNet-20")
    parser.add_argument("--output", type=Path, default=Path("logs/split_methods"))
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--trainer", default="cpu", choices=("cpu", "gpu", "default"))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write the table as Markdown to this file")
    return parser.parse_args()


def report(folder: Path, file: Path | None) -> None:
    """Print what is there so far, beside image codecs interpolated to equal bytes; write it as Markdown if asked."""
    points = collect([folder])
    codecs = {
        name: [p for p in points if p.method.lower().startswith(name) and p.kind == "baseline"]
        for name in ("jpeg", "webp")
    }
    teacher = reference_accuracy(str(folder / "teacher"))
    runs = sorted((s for s in settings(points) if s.kind == "run"), key=lambda s: -s.accuracy)
    if over := [s for s in runs if (s.encoder_params or 0) > BUDGET]:
        sys.exit(
            f"{over[0].method} has {over[0].encoder_params:,} parameters on the device, over the {BUDGET:,} allowed"
        )
    header = (
        "method", "accuracy", "bytes", "after zstd", "JPEG at equal bytes", "WebP at equal bytes", "device MACs",
        "device parameters", "epochs", "training seconds",
    )  # fmt: skip
    rows = [
        (
            s.method, percent(s.accuracy), f"{s.payload_bytes:.1f}", f"{s.payload_zstd_bytes or 0:.1f}",
            *(percent(interpolate(codecs[name], s.payload_bytes)) for name in ("jpeg", "webp")),
            f"{s.encoder_macs or 0:,}", f"{s.encoder_params or 0:,}", str(s.epochs or ""),
            f"{s.train_seconds or 0:.0f}",
        )
        for s in runs
    ]  # fmt: skip
    short = ("method", "accuracy", "bytes", "zstd", "JPEG", "WebP", "MACs", "params", "epochs", "seconds")
    told = f"JPEG and WebP at equal bytes; the unsplit teacher has {percent(teacher)}"
    table(f"ResNet-20 split at layer2; {told}", rows, short)
    write_report(folder / "report", points, teacher, title="ResNet-20 on CIFAR-10 (JPEG), split at layer2")
    if file:
        lines = [
            f"Unsplit teacher: {percent(teacher)}.",
            "",
            line(header),
            line(["---"] * len(header)),
            *map(line, rows),
        ]
        file.write_text("\n".join(lines) + "\n")
    print(f"Plots and tables: {folder / 'report'}")


if __name__ == "__main__":
    main()
