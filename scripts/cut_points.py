"""List where a backbone can be cut: every point that a single tensor crosses."""

from __future__ import annotations

if __name__ == "__main__":  # the config comes first: --help and a misspelt key need nothing of what is imported below
    from cleave.scripts.assembly.starting.terminal import run

    run("cut_points")

import dataclasses
import math
import shlex

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cleave.architectures import cut_points
from cleave.reports.terminal import console, short, table
from cleave.scripts.assembly.hints import next_command
from cleave.scripts.assembly.networks import build_backbone


def main(cfg: DictConfig) -> None:
    """Print the cut points of a backbone and mark those that send less than the image."""
    side = cfg.image_size
    backbone = build_backbone(cfg.backbone, cfg.num_classes, None if side is None else (side, side))
    image_input = backbone.input
    if cfg.image_size is not None:
        image_input = dataclasses.replace(image_input, height=cfg.image_size, width=cfg.image_size, resize=None)
    points = cut_points(backbone.network, torch.randn(2, *image_input.shape))
    image_bytes = math.prod(image_input.shape)
    rows = []
    for point in points:
        # At one byte a value, as an 8-bit representation would be sent.
        codes = math.prod(point.shape)
        mark = "<" if codes < image_bytes else ""
        shape = "×".join(map(str, point.shape))
        rows.append(
            (
                point.name,
                shape,
                point.layout,
                f"{point.bytes:,}",
                f"{codes:,} {mark:1}",
                short(point.macs),
                short(point.params),
            )
        )
    header = ("layer", "shape", "layout", "float32 bytes", "8-bit bytes", "MACs so far", "parameters")
    size = "×".join(map(str, image_input.shape))
    table(f"{len(points)} cut points of {cfg.backbone.name} at {size}", rows, header)
    console.print(
        f"< an 8-bit representation here is smaller than the uint8 image of {image_bytes:,} bytes", highlight=False
    )
    chosen = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = " ".join(shlex.quote(word) for word in chosen if word.startswith("backbone"))
    settings = {"method": "head_distillation", "split.at": "LAYER", "base.ckpt_path": "FILE"}
    next_command("train", settings, f"{kept} …".strip())
