"""Originals above what attacks rebuilt of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from torch import Tensor

from cleave.reports.plotting import matplotlib_defaults, new_figure, png

_INCHES = 1.0


def grid(rows: Mapping[str, Tensor]) -> bytes:
    """Return a PNG of rows of images (N, C, H, W) from 0 to 1, each under its name at the left."""
    with matplotlib_defaults():
        figure = new_figure(_INCHES * len(rows))
        columns = len(next(iter(rows.values())))
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for place, image in zip(line, images, strict=True):
                pixels = image.permute(1, 2, 0).cpu().numpy()
                grey = pixels.shape[2] == 1
                place.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                place.set_xticks([])
                place.set_yticks([])
            words = textwrap.fill(name, 18)
            line[0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=7, parse_math=False)
        return png(figure)
