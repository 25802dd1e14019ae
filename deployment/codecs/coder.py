"""The coder behind learned priors, a package of its own that not every device has."""

from __future__ import annotations

import functools
from typing import Any

from .packing import CodecError


def check_coder() -> None:
    """Raise :class:`CodecError` unless the package that codes is installed."""
    stream()


@functools.cache
def stream() -> Any:
    """Return the package's range coder and models; :class:`CodecError` unless it is installed."""
    try:
        import constriction  # type: ignore[import-untyped]
    except ImportError as error:
        raise CodecError(
            "an entropy-coded edge (codec=entropy) needs the package constriction, which is Cleave's extra `entropy`: "
            "pip install constriction, or pip install 'cleave[entropy]'. Where there is no wheel of it, as on ARM "
            "Linux, pip builds it with Rust; or use another codec, such as codec=uniform"
        ) from error
    return constriction.stream
