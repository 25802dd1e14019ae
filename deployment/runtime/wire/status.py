"""What a request may come to, by gRPC's names."""

from __future__ import annotations

from ...codecs.packing import CodecError

_MOST_WORDS = 1000
# What may be right if it is tried again: the server was away or busy, and has computed nothing.
WORTH_RETRYING = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"})


class ServingError(ValueError):
    """A request that was not answered.

    Args:
        code: The name of gRPC's status: ``INVALID_ARGUMENT``, ``UNAVAILABLE``, …
        message: What is wrong; it is cut to what a header can hold.

    Attributes:
        code: As above.
        attempts: How often it was tried.
    """

    attempts: int = 0

    def __init__(self, code: str, message: str) -> None:
        # Half a character, which JSON can hold, cannot be sent.
        text = message.encode("utf-8", "replace").decode()
        super().__init__(text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]} …")
        self.code = code


def invalid(message: str) -> ServingError:
    """Return the error of a request that is wrong by itself."""
    return ServingError("INVALID_ARGUMENT", message)


class RowError(CodecError):
    """What is wrong with one sample, as the other side has said it."""
