"""What a run of train.py measured, as points of bytes and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from scripts.results import Point


def measured_points(
    cfg: DictConfig,
    method: str,
    metrics: Mapping[str, Any],
    cost: Mapping[str, Mapping[str, int]],
    *,
    epochs: int | None,
    seconds: float | None,
    checkpoint: str | None,
) -> list[Point]:
    """Return one point for each width of a split network; none where nothing is sent or nothing was tested.

    Args:
        cfg: The run's config.
        method: The method in words.
        metrics: What was measured on the test images.
        cost: MACs and parameters of each part.
        epochs: Epochs trained, over all stages.
        seconds: Wall-clock seconds of training, validation included.
        checkpoint: The checkpoint that was tested.
    """
    if "test/payload_bytes" not in metrics:
        return []
    device = [cost[part] for part in ("head", "encoder") if part in cost]
    widths = sorted({int(key.split("/")[1].removeprefix("bits")) for key in metrics if key.startswith("test/bits")})
    keys = [(f"test/bits{bits}/", bits) for bits in widths]
    if (tested := cfg.codec.get("bits")) not in widths:
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
                epochs=epochs,
                train_seconds=seconds,
                bits=bits,
                seed=cfg.seed,
                backbone=cfg.backbone.get("name"),
                checkpoint=checkpoint,
            )
        )
    return found


def _label(cfg: DictConfig, bits: int | None) -> str:
    channels = (cfg.get("bottleneck") or {}).get("channels")
    words = [cfg.split.at, f"{channels} channels" if channels else "no bottleneck", f"{bits} bits" if bits else "prior"]
    return ", ".join(words)
