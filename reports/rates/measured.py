"""What a run of train.py measured, as points of bytes and accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cleave.reports.rates.results import Point


def measured_points(
    cfg: Mapping[str, Any],
    method: str,
    metrics: Mapping[str, Any],
    cost: Mapping[str, Mapping[str, int]],
    *,
    epochs: int | None,
    seconds: float | None,
    checkpoint: str | None,
    image_bytes: int | None = None,
) -> list[Point]:
    """Return one point for each width of a split network; none where nothing was tested.

    An unsplit network is the baseline that whole images are sent to. One with exits is left to the exits' report.

    Args:
        cfg: The run's config.
        method: The method in words.
        metrics: What was measured on the test images.
        cost: MACs and parameters of each part.
        epochs: Epochs trained, over all stages.
        seconds: Wall-clock seconds of training, validation included.
        checkpoint: The checkpoint that was tested.
        image_bytes: Bytes of the uint8 input, which an unsplit network needs; ``None`` leaves that one out.
    """
    known: dict[str, Any] = {
        "epochs": epochs,
        "train_seconds": seconds,
        "seed": cfg["seed"],
        "backbone": cfg["backbone"].get("name"),
        "checkpoint": checkpoint,
    }
    if "test/acc_exits" in metrics:
        return []
    if "test/payload_bytes" not in metrics:
        if image_bytes is None or "test/acc" not in metrics:
            return []
        sent: dict[str, Any] = {
            "accuracy": float(metrics["test/acc"]),
            "payload_bytes": float(image_bytes),
            "encoder_macs": 0,
        }
        return [Point(method, "raw uint8 input", **sent, encoder_params=0, kind="baseline", **known)]
    device = [cost[part] for part in ("head", "encoder") if part in cost]
    widths = sorted({int(key.split("/")[1].removeprefix("bits")) for key in metrics if key.startswith("test/bits")})
    keys = [(f"test/bits{bits}/", bits) for bits in widths]
    if (tested := cfg["codec"].get("bits")) not in widths:
        keys.append(("test/", tested))
    found = []
    for prefix, bits in keys:
        zstd = metrics.get(f"{prefix}payload_zstd_bytes")
        found.append(
            Point(
                method=method,
                label=_label(cfg, bits),
                accuracy=float(metrics[f"{prefix}acc"]),
                payload_bytes=float(metrics[f"{prefix}payload_bytes"]),
                payload_zstd_bytes=None if zstd is None else float(zstd),
                encoder_macs=sum(part["macs"] for part in device),
                encoder_params=sum(part["params"] for part in device),
                bits=bits,
                **known,
            )
        )
    return found


def in_words(target: str) -> str:
    """Return the name of a class in words."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", str(target).rpartition(".")[2]).capitalize()


def _label(cfg: Mapping[str, Any], bits: int | None) -> str:
    channels = (cfg.get("bottleneck") or {}).get("channels")
    words = [
        cfg["split"]["at"],
        f"{channels} channels" if channels else "no bottleneck",
        f"{bits} bits" if bits else "prior",
    ]
    if (beta := cfg.get("beta") or cfg["method"].get("beta")) is not None:
        words.append(f"β {beta:g}")
    return ", ".join(words)
