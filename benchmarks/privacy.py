"""What hides the images behind a split of ResNet-20 on CIFAR-10: every defence over one bottleneck, judged by attacks.

A ResNet-20 is fine-tuned on the images and split at layer2 with codes of 8x8x8 at 4 bits, by an encoder in place of the
layers before the cut or behind them. Each defence begins at that split network and learns for the same number of epochs
from the teacher's logits, as the row without a defence does.
Then the same adversaries learn to rebuild the images from what is sent. Half of ``test/`` is for reporting; the other
half chooses epochs, of the networks and of the adversaries. A run that is there is not repeated.

    python benchmarks/privacy.py --data DIR --weights resnet20.th [--form FORM] [--only ROW …] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resumable import line, percent
from resumable import run as run_until

from cleave.reports.rates.collect import reference_accuracy
from cleave.reports.terminal import table

train = functools.partial(run_until, "train", done="results.json")
attack = functools.partial(run_until, "attack", done="attack.json")

NOPEEK = ["privacy=nopeek", "method.extra_terms.nopeek.weight={}"]
# Without restarts: in so few epochs a decoder that begins anew never learns enough to teach the encoder.
RESSFL = [
    "privacy=ressfl", "method.extra_terms.attacker.loss.strength={}", "method.extra_terms.attacker.loss.restarts=0",
]  # fmt: skip
CLOAK = ["privacy=cloak", "method.extra_terms.noise.weight={}"]
SHREDDER = ["privacy=shredder", "method.extra_terms.noise.weight={}"]


def _with(overrides: Sequence[str], value: float) -> list[str]:
    return [each.format(value) for each in overrides]


BASE, LONG = "no defence", "no defence, twice as long"
HEAD = "head distillation alone"
ROWS: dict[str, list[str]] = {
    HEAD: ["train=false"],
    "8 bits": ["codec.bits=8"],
    BASE: [],
    "2 bits": ["codec.bits=2"],
    "2 channels": ["bottleneck.channels=2"],
    "NoPeek, λ = 3": _with(NOPEEK, 3),
    "ResSFL, λ = 3": _with(RESSFL, 3),
    "ResSFL, λ = 10": _with(RESSFL, 10),
    "ResSFL, λ = 30": _with(RESSFL, 30),
    "ResSFL, λ = 20, and NoPeek, λ = 2": [
        *_with(RESSFL, 20),
        "+method.extra_terms.nopeek={_target_: cleave.lightning_modules.Term, weight: 2, "
        "of: [images, student/layer2/z], loss: {_target_: cleave.losses.DistanceCorrelationLoss}}",
    ],
    "constrained": [
        "privacy=constrained", "method.extra_terms.bound.loss.threshold=0.6",
        "method.extra_terms.attacker.loss.strength=10", "method.extra_terms.attacker.loss.restarts=0",
    ],
    "Gaussian, ε = 1000": ["privacy=gaussian", "noise.epsilon=1000"],
    "Gaussian, ε = 200": ["privacy=gaussian", "noise.epsilon=200"],
    "Gaussian, ε = 50": ["privacy=gaussian", "noise.epsilon=50"],
    "Gaussian, ε = 10": ["privacy=gaussian", "noise.epsilon=10"],
    "Shredder, λ = 0.001": _with(SHREDDER, 1e-3),
    "Cloak, λ = 0.3": _with(CLOAK, 0.3),
    LONG: ["trainer.max_epochs=6"],
    "ResSFL, λ = 50, twice as long": [*_with(RESSFL, 50), "trainer.max_epochs=6"],
}  # fmt: skip
RAW = {"raw layer1": "layer1", "raw layer2": "layer2"}
# Where the controls stand beside the attack, and releases are averaged.
NOISY = "Gaussian, ε = 200"
WITH_CONTROLS = ["controls=[raw,logits,unaware]", "attack.releases=[1,8]"]
# A small encoder in place of the layers before the cut, or one behind them, which learn with it or rest.
FORMS = {
    "replace": ["split.form=replace", "bottleneck.stride=4", "bottleneck.width=48", "bottleneck.decoder_width=48"],
    "insert": ["split.form=insert", "bottleneck.stride=2", "bottleneck.depth=2"],
    "frozen": ["split.form=insert", "bottleneck.stride=2", "bottleneck.depth=2"],
}


def main() -> None:
    args = arguments()
    folder = args.output.absolute()
    images = prepared(args.data.absolute(), folder / "images", args.images // 10)
    common = [
        "data=image_folder", f"data.root={images}", "data.augment=crop_flip", "data.batch_size=128",
        "data.num_workers=0", "backbone=cifar", "backbone.name=resnet20", "callbacks.progress=null",
        "+trainer.enable_progress_bar=false",
    ]  # fmt: skip
    teacher = folder / "teacher/checkpoints/best.ckpt"
    train(
        teacher.parent.parent, args.threads, *common, f"backbone.weights={args.weights.absolute()}",
        "trainer.max_epochs=3", "training.optimizer._target_=torch.optim.SGD", "training.optimizer.lr=0.02",
        "+training.optimizer.momentum=0.9", "training.optimizer.weight_decay=1e-4",
    )  # fmt: skip
    wanted = args.only or [*RAW, *ROWS]
    for name in filter(RAW.__contains__, wanted):
        raw = place(folder, name)
        train(
            raw, args.threads, *common, f"base.ckpt_path={teacher}", "split.form=none", f"split.at={RAW[name]}",
            "codec.bits=32", "train=false", "export=true", "method=cross_entropy",
        )  # fmt: skip
        judged(raw, f"bundle={raw / 'bundle'}", args, 0)
    for seed in args.seeds:
        for name in filter(ROWS.__contains__, wanted):
            defended(folder, name, teacher, common, args, seed)
    report(folder, args)


def defended(folder: Path, name: str, teacher: Path, common: list[str], args: argparse.Namespace, seed: int) -> None:
    """Train a row's network from the split one, and attack it."""
    own = ROWS[name]
    channels = next((each.partition("=")[2] for each in own if each.startswith("bottleneck.channels=")), "8")
    split = [
        "split.at=layer2", *FORMS[args.form], "split.envelope=false",
        f"bottleneck.channels={channels}", "training.channels_last=true", "codec.bits=4",
        f"teacher.ckpt_path={teacher}",
    ]  # fmt: skip
    slow = [f"training.lr_scales.{layer}=0.3" for layer in ("layer3", "linear")]
    first = folder / f"split_{channels}"
    steps = [f"+steps.{step}.trainer.max_epochs=4" for step in ("head", "finetune")]
    trained = ["method.train=[encoder,decoder,tail]"] if args.form == "frozen" else []
    cache = ["feature_cache.use=true", "feature_cache.views=3", f"feature_cache.directory={folder / 'cache'}"]
    train(
        first, args.threads, "experiment=bottlefit", "compare={layer2: 1.0, layer3: 1.0}", *common, *split, *steps,
        f"base.ckpt_path={teacher}", "training.optimizer.lr=3e-3", "+steps.finetune.training.optimizer.lr=1e-3",
        *(f"+steps.finetune.{each}" for each in [*slow, *trained]), *(cache if args.form == "frozen" else ()),
    )  # fmt: skip
    base = first / f"checkpoints/{'head' if name == HEAD else 'finetune'}/best.ckpt"
    run = place(folder, name, seed)
    long = any(each.startswith("trainer.max_epochs=") for each in own)
    epochs = [] if long else [f"trainer.max_epochs={args.epochs}"]
    train(
        run, args.threads, "method=knowledge_distillation", *common, *split, *(f"+{each}" for each in slow),
        f"base.ckpt_path={base}", *epochs, "training.optimizer.lr=1e-3", *cache, *trained,
        # The last weights, not the most accurate: those are of the epoch that hid the least.
        "callbacks.checkpoint=null", f"seed={seed}", *own,
    )  # fmt: skip
    victim = f"ckpt_path={base if name == HEAD else run / 'checkpoints/last.ckpt'}"
    judged(run, victim, args, seed)
    if name == NOISY:
        judged(run, victim, args, seed, "controls", *WITH_CONTROLS)


def judged(
    run: Path, victim: str, args: argparse.Namespace, seed: int, name: str = "attack", *overrides: str
) -> None:  # fmt: skip
    attack(
        run / name, args.threads, victim, f"data.root={run.parent / 'images'}", f"attack.images={args.attack_images}",
        f"attack.epochs={args.attack_epochs}", "attack.families=[linear,residual]", "attack.strengths=[small]",
        "white_box.use=false", "information.epochs=1", f"seed={seed}", "data.num_workers=0",
        *(overrides or ("controls=[]", "attack.releases=[1]")),
    )  # fmt: skip


def place(folder: Path, name: str, seed: int | None = None) -> Path:
    """Return where a row's run lies; a config's overrides know no commas and spaces."""
    plain = re.sub(r"\W+", "_", name.replace("λ", "weight").replace("ε", "epsilon"))
    return folder / (plain if seed is None else f"{plain}_seed_{seed}")


def prepared(data: Path, folder: Path, each: int) -> Path:
    """Make a folder of links: the first training images of each class, and the halves of its test images."""
    for place in sorted((data / "train").iterdir()):
        tests = sorted((data / "test" / place.name).iterdir())
        parts = {"train": sorted(place.iterdir())[:each], "val": tests[0::2], "test": tests[1::2]}
        for part, files in parts.items():
            (folder / part / place.name).mkdir(parents=True, exist_ok=True)
            for file in files:
                link = folder / part / place.name / file.name
                if not link.exists():
                    link.symlink_to(file)
    return folder


def found(run: Path) -> dict[str, Any] | None:
    """Return the figures of a run, where it is there."""
    files = [run / "results.json", run / "attack/attack.json"]
    if not all(file.exists() for file in files):
        return None
    (point,) = json.loads(files[0].read_text())["points"] or [{}]
    attacked = json.loads(files[1].read_text())
    best = min((each for each in attacked["attacks"] if each["role"] == "attacker"), key=_mse)
    correlation = (attacked.get("information") or {}).get("distance_correlation") or {}
    return {
        "dcor": correlation.get("value"),
        "accuracy": point.get("accuracy"), "bytes": point.get("payload_bytes"), "mse": _mse(best),
        "by": best["family"],
        **{name: best["figures"][name]["value"] for name in ("explained", "ssim")},
    }  # fmt: skip


def _mse(attack: dict[str, Any]) -> float:
    value: float = attack["figures"]["mse"]["value"]
    return value


def report(folder: Path, args: argparse.Namespace) -> None:
    """Print what is there so far beside the same bottleneck without a defence; write it as Markdown if asked."""
    runs = {name: [found(place(folder, name))] for name in RAW}
    runs |= {name: [found(place(folder, name, seed)) for seed in args.seeds] for name in ROWS}
    there = {name: [each for each in figures if each is not None] for name, figures in runs.items()}
    rows = [
        _cells(name, figures, there[LONG if name.endswith("twice as long") else BASE])
        for name, figures in there.items()
        if figures
    ]
    header = (
        "what is sent", "seeds", "accuracy", "lowest MSE", "times no defence", "explained", "SSIM", "dCor",
        "bytes", "by",
    )  # fmt: skip
    beside = words(folder, args)
    table("ResNet-20 on CIFAR-10 (JPEG), split at layer2", rows, header)
    print(beside)
    more = controls(place(folder, NOISY, args.seeds[0]) / "controls/attack.json")
    if more:
        table(f"Adversaries and controls: {NOISY}", more[1:], more[0])
    if args.report:
        lines = [line(header), line(["---"] * len(header)), *map(line, rows), "", beside]
        lines += ["", line(more[0]), line(["---"] * 3), *map(line, more[1:])] if more else []
        args.report.write_text("\n".join(lines) + "\n")


def controls(file: Path) -> list[tuple[str, ...]]:
    """Return each adversary's error and what it explains, with intervals, the best first; empty where none is there."""
    if not file.exists():
        return []
    attacks = sorted(json.loads(file.read_text())["attacks"], key=_mse)
    return [
        ("adversary", "MSE", "explained"),
        *((each["title"], *(_interval(each["figures"][name]) for name in ("mse", "explained"))) for each in attacks),
    ]


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def words(folder: Path, args: argparse.Namespace) -> str:
    """Say what all rows are to be read beside: the networks before them, and the error of the mean image."""
    told = []
    for name, run in (("the unsplit network", "teacher"), ("the split one before any row", "split_8")):
        if (folder / run / "results.json").exists():
            told.append(f"{name} has {percent(reference_accuracy(str(folder / run)))}")
    attacked = place(folder, BASE, args.seeds[0]) / "attack/attack.json"
    if attacked.exists():
        told.append(f"the mean image has an MSE of {json.loads(attacked.read_text())['mean_image_mse']:.4f}")
    return f"Beside them: {'; '.join(told)}."


def _cells(name: str, figures: list[dict[str, Any]], base: list[dict[str, Any]]) -> tuple[str, ...]:
    def of(key: str, form: str, factor: float = 1.0) -> str:
        values = [factor * each[key] for each in figures if each[key] is not None]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    mean = statistics.mean(each["mse"] for each in figures)
    times = mean / statistics.mean(each["mse"] for each in base) if base else None
    return (
        name, str(len(figures)), of("accuracy", ".2f", 100), of("mse", ".4f"), "–" if times is None else f"{times:.2f}",
        of("explained", ".3f"), of("ssim", ".3f"), of("dcor", ".2f"), of("bytes", ".0f"), figures[0]["by"],
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/<class>/*.jpg and test/<class>/*.jpg"
    )
    parser.add_argument("--weights", type=Path, required=True, help="pretrained weights of the CIFAR ResNet-20")
    parser.add_argument("--output", type=Path, default=Path("logs/privacy"))
    parser.add_argument("--form", choices=FORMS, default="replace", help="of the split; a form has its own --output")
    parser.add_argument("--only", nargs="+", choices=[*RAW, *ROWS], metavar="ROW", help=", ".join([*RAW, *ROWS]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=3, help="of each row, behind the split network's")
    parser.add_argument("--attack-images", type=int, default=4_000)
    parser.add_argument("--attack-epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--report", type=Path, help="write the table as Markdown to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
