"""A report on early exits as tables: in the terminal, and as rows for a CSV file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cleave.reports.terminal import say, short, table

OF = {"macs": "the backbone's MACs", "seconds": "the backbone's seconds", "given": "the last exit's cost"}


def print_report(report: Mapping[str, Any]) -> None:
    """Print what was found: accuracy at each budget, each exit alone, seconds, and which exits to keep."""
    budgets_table(report)
    excess_words(report)
    shares_table(report)
    exits_table(report)
    for each in report["worse_ensembles"]:
        say(
            f"Warning: the ensemble at {each['name']} is worse than its exit on val, {percent(each['ensemble'])} "
            f"against {percent(each['exit'])}: set fit_ensemble=true, or train it by method.fit=lbfgs."
        )
    lost, wasted = 100 * report["overthinking"], 100 * report["wasteful"]
    oracle = report["oracle"]
    say(
        f"Overthinking: {lost:.1f} % of the images are right early and wrong in the end, {wasted:.1f} % right early "
        f"and in the end. An oracle among the exits: {achieved(oracle)}."
    )
    seconds_table(report)
    if report["placement"]:
        print_placement(report["placement"])
    if report["chosen"]:
        chosen = report["chosen"]
        say(
            f"Chosen: {chosen['kind']} at thresholds {thresholds(chosen['thresholds'])}: "
            f"{achieved(chosen)} on test, "
            f"{percent(chosen['val_accuracy'])} at {share(chosen['val_cost'])} on val"
        )


def budgets_table(report: Mapping[str, Any]) -> None:
    """Print the accuracy of each policy at each budget, and of the last exit as if there were no others."""
    last, budgets = report["last_exit"], report["budgets"]
    alone = [achieved(last) if last["cost"] <= budget else "–" for budget in budgets]
    rows = [("last exit alone", *alone, achieved(last))]
    for kind, figures in report["policies"].items():
        kept = [
            f"– (from {share(figures['least'])})" if point["accuracy"] is None else achieved(point)
            for point in figures["points"]
        ]
        rows.append((kind, *kept, achieved(figures["best"])))
    header = ("policy", *(f"budget {share(budget)}" for budget in budgets), "best")
    title = f"Accuracy on {report['images']['test']:,} test images at their mean share of {OF[report['costs']['unit']]}"
    table(title, rows, header)


def excess_words(report: Mapping[str, Any]) -> None:
    """Say how far a budget that is kept on val may be overspent on other images by chance."""
    every = [point for figures in report["policies"].values() for point in figures["points"]]
    points = [point for point in every if point["accuracy"] is not None]
    if not points:
        return
    val, test = (f"{report['images'][split]:,}" for split in ("val", "test"))
    error, excess = (max(point[key] for point in points) for key in ("cost_error", "expected_excess"))
    say(
        f"Budgets are kept on {val} validation images. On {test} others the mean cost differs by chance, by a standard "
        f"error of at most {100 * error:.2f} % of the backbone's; a budget is overspent by at most "
        f"{100 * excess:.2f} % of it in expectation. To keep to it more surely, ask for that much less."
    )


def shares_table(report: Mapping[str, Any]) -> None:
    """Print by which thresholds each budget is kept, and who leaves where."""
    names = [exit["name"] for exit in report["exits"]]
    rows = [
        (
            kind,
            share(point["budget"]),
            thresholds(point["thresholds"]),
            *(f"{100 * left:.1f} %" for left in point["shares"]),
        )
        for kind, figures in report["policies"].items()
        for point in figures["points"]
        if point["accuracy"] is not None
    ]
    if rows:
        table("Test images that leave at each exit", rows, ("policy", "budget", "thresholds", *names))


def exits_table(report: Mapping[str, Any]) -> None:
    """Print what each exit achieves alone, and what the ensemble says there if it is among the policies."""
    ensemble = report["policies"].get("ensemble")
    rows = []
    for i, exit in enumerate(report["exits"]):
        cells = [exit["name"], short(exit["macs"]), share(exit["macs_share"])]
        cells += [share(exit["cost"])] if report["costs"]["unit"] != "macs" else []
        cells += [percent(exit["accuracy"])] + ([percent(ensemble["anytime"][i][1])] if ensemble else [])
        rows.append((*cells, f"{exit['ece']:.3f}", f"{exit['ece_scaled']:.3f}", f"{exit['temperature']:.2f}"))
    header = ["exit", "MACs", "of the backbone"]
    header += [f"of {OF[report['costs']['unit']]}"] if report["costs"]["unit"] != "macs" else []
    header += ["accuracy", *(["ensemble's"] if ensemble else []), "ECE", "ECE at temperature", "temperature"]
    table("If all samples left at one exit", rows, tuple(header))


def seconds_table(report: Mapping[str, Any]) -> None:
    """Print how long the chosen policy takes beside the backbone alone, and what its MACs would let one expect."""
    rows = []
    for timing in filter(None, report["seconds"].values()):
        ratio = timing["ratio"]
        rows.append(
            (
                f"{timing['batch_size']:,}",
                *(f"{1000 * timing[key]['median']:.3f}" for key in ("seconds", "backbone_seconds")),
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{ratio['mean']:.2f}",
                f"{timing['macs_ratio']:.2f}",
            )
        )
    header = ("batch size", "ms an image", "backbone's", "ratio, median and quartiles", "in all", "ratio of MACs")
    table("Wall clock of the chosen policy beside the backbone alone", rows, header)


def print_placement(found: Mapping[str, Any]) -> None:
    """Print which exits to keep, and how to train them."""
    names = ",".join(found["exits"])
    proven = "the best choice for its threshold" if found["exact"] else "found by a heuristic"
    say(
        f"\nOf these exits, keep {names} ({proven}): {achieved(found)} on test, "
        f"{percent(found['val_accuracy'])} at {share(found['val_cost'])} on val. Train them by exits.at=[{names}]"
    )


def csv_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each policy and budget, for each policy's best, and for each point of its curve."""
    names = [exit["name"] for exit in report["exits"]]
    rows = []
    for kind, figures in report["policies"].items():
        curve = zip(figures["curve"], figures["curve_shares"], figures["curve_thresholds"], strict=True)
        points = [("budget", point) for point in figures["points"]] + [("best", figures["best"])]
        points += [
            ("curve", {"cost": cost, "accuracy": accuracy, "shares": left, "thresholds": by})
            for (cost, accuracy), left, by in curve
        ]
        for what, point in points:
            row = {"policy": kind, "point": what}
            row |= {key: point.get(key) for key in ("budget", "accuracy", "cost", "val_accuracy", "val_cost", "scheme")}
            row |= {f"share/{name}": value for name, value in _each(names, point["shares"])}
            rows.append(row | {f"threshold/{name}": value for name, value in _each(names[:-1], point["thresholds"])})
    return rows


def _each(names: list[str], values: list[Any] | None) -> list[tuple[str, Any]]:
    return list(zip(names, values or [None] * len(names), strict=True))


def achieved(point: Mapping[str, Any]) -> str:
    """Format an accuracy and its cost."""
    return f"{percent(point['accuracy'])} at {share(point['cost'])}"


def percent(value: float) -> str:
    """Format an accuracy."""
    return f"{100 * value:.2f} %"


def share(value: float) -> str:
    """Format a cost as a share."""
    return f"{100 * value:.3g} %"


def thresholds(values: list[float | None]) -> str:
    """Format thresholds, one where all are equal."""
    shown = values[:1] if len(set(values)) == 1 else values
    return ", ".join("never" if value is None else f"{value:.4g}" for value in shown)
