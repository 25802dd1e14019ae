"""The whole way on real digits: a teacher, three split students, early exits, two bundles, and what it all measures."""

from __future__ import annotations

if __name__ == "__main__":  # it takes no options; to say so needs nothing of what is imported below
    import argparse

    argparse.ArgumentParser(description=__doc__).parse_args()

import statistics
from pathlib import Path
from tempfile import mkdtemp

from cleave.datamodules import Digits
from cleave.deployment import ImageInput, Pipeline, Result, load_bundle
from cleave.reports.terminal import console, say_next, table
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.bundling import parity_words
from cleave.scripts.assembly.hints import command
from cleave.scripts.assembly.restoring import restore
from cleave.scripts.assembly.starting.terminal import heed_signals, quiet, start
from cleave.scripts.exits_report import POLICY, exits_report
from cleave.scripts.export import export
from cleave.scripts.train import train

SEEDS = (0, 1, 2)


def main() -> None:
    """Run the demonstration and print its table."""
    heed_signals()
    quiet()
    logs = Path("logs/demo")
    logs.mkdir(parents=True, exist_ok=True)
    # Relative, so that no folder above this one can upset the grammar of overrides.
    root = logs / Path(mkdtemp(prefix="run-", dir=logs)).name
    console.rule("1/4 teacher: cross entropy")
    teacher = run("digits_teacher", root / "teacher")
    teacher_file = root / "teacher/checkpoints/best.ckpt"
    students = []
    for seed in SEEDS:
        console.rule(f"2/4 split model, seed {seed}: head-network distillation")
        students.append(run("digits_hnd", root / f"split-{seed}", f"base.ckpt_path={teacher_file}", f"seed={seed}"))
    console.rule("3/4 early exits around a split: joint training")
    run("digits_exits", root / "exits", f"base.ckpt_path={teacher_file}")
    exits_file = root / "exits/checkpoints/best.ckpt"
    # Half a point of accuracy may go, as judged on the validation images.
    options = [f"ckpt_path={exits_file}", "policies=[confidence]", "choose.budget=null", "choose.drop=0.005"]
    written = exits_report(compose_config("exits_report", options, root / "exits/report"))
    console.rule("4/4 export and run")
    student_file = root / f"split-{SEEDS[0]}/checkpoints/best.ckpt"
    bundle = exported(student_file, root / "bundle")
    early = exported(exits_file, root / "bundle-exits", f"exits.policy_file={written[POLICY]}")
    report(teacher, students, student_file, bundle, early)


def run(experiment: str, directory: Path, *overrides: str) -> dict[str, float]:
    """Train one experiment and return its metrics."""
    return train(compose_config("train", [f"experiment={experiment}", "trainer=cpu", *overrides], directory))


def exported(checkpoint: Path, bundle: Path, *options: str) -> Path:
    """Export a checkpoint and return the bundle's folder."""
    options = (f"ckpt_path={checkpoint}", f"bundle={bundle}", *options)
    return export(compose_config("export", options, bundle.with_name(f"{bundle.name}-export")))


def run_bundle(bundle: Path) -> tuple[Result, float]:
    """Run a bundle over all test images; return what it gave and its accuracy."""
    loaded = load_bundle(bundle)
    data = Digits()
    if isinstance(loaded.input, ImageInput):
        data.configure_input(loaded.input)
    data.setup("test")
    batch = data.sample_batch("test", 10**6)
    result = Pipeline(loaded).run(batch["images"])
    return result, (result.logits.argmax(1) == batch["labels"]).double().mean().item()


def report(
    teacher: dict[str, float], students: list[dict[str, float]], student_file: Path, bundle: Path, early: Path
) -> None:
    """Print what was measured, beside what it is compared against."""
    (result, accuracy), (result_exits, accuracy_exits) = run_bundle(bundle), run_bundle(early)
    loaded, data = load_bundle(bundle), Digits()
    costs = {f"{cost.kind} {cost.name}": cost for cost in restore(student_file).network.costs()}
    encoder = costs.pop("encoder layer2")
    accuracies = [metrics["test/acc"] for metrics in students]
    sent = result_exits.payload_bytes
    rows = [
        ("teacher accuracy", percent(teacher["test/acc"])),
        (f"split accuracy, mean of seeds {', '.join(map(str, SEEDS))}", percent(statistics.mean(accuracies))),
        ("  spread (standard deviation)", f"{100 * statistics.stdev(accuracies):.2f} points"),
        ("  each seed", ", ".join(map(percent, accuracies))),
        ("bundle accuracy, through real bytes", percent(accuracy)),
        ("payload", f"{statistics.mean(result.payload_bytes):.0f} bytes"),
        ("  the 8×8 image, raw", f"{data.raw_image_bytes():.0f} bytes"),
        ("  the 8×8 image, PNG", f"{data.image_file_bytes('test'):.0f} bytes"),
        ("encoder", f"{encoder.macs:,} MACs, {encoder.params:,} parameters"),
        ("  the server's part", f"{sum(cost.macs for cost in costs.values()):,} MACs"),
        ("parity of the exported pair", parity_words(loaded)),
        ("bundle with early exits: accuracy", percent(accuracy_exits)),
        ("  answered on the device, 0 bytes", percent(sent.count(0) / len(sent))),
        ("  payload, mean over all images", f"{statistics.mean(sent):.1f} bytes"),
    ]
    table("Cleave on handwritten digits", rows)
    say_next(f".venv/bin/{command('infer', {'bundle': early, 'input': 'digits'})}")


def percent(share: float) -> str:
    """Format a share of 1."""
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    start(main)
