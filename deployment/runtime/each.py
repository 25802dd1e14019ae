"""Encoding and decoding of a batch such that what is wrong with one sample does not stop the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.envelope import Envelope
from ..codecs.codec import Codec
from ..codecs.packing import CodecError


def encode_each(
    codec: Codec, envelope: Envelope | None, tensors: Mapping[str, Tensor], rows: Sequence[int]
) -> tuple[list[bytes], dict[int, CodecError]]:
    """Encode B samples.

    Args:
        codec: Encodes them.
        envelope: What each payload is put into, if anything.
        tensors: What the codec sends.
        rows: Which sample of the request each of the B is.

    Returns:
        The payloads of those that did not fail, in order; and what is wrong with the others, by row.

    Raises:
        CodecError: They fail together, but none of them alone.
    """

    def encode(some: Mapping[str, Tensor]) -> list[bytes]:
        payloads = codec.encode(some)
        return payloads if envelope is None else envelope.seal_all(payloads)

    try:
        return encode(tensors), {}
    except CodecError:
        errors = _errors(rows, lambda i: encode({name: tensor[i : i + 1] for name, tensor in tensors.items()}))
        if not errors:
            raise
    places = [place for place, row in enumerate(rows) if row not in errors]
    return encode({name: tensor[places] for name, tensor in tensors.items()}), errors


def decode_each(
    codec: Codec, envelope: Envelope | None, payloads: Sequence[bytes], rows: Sequence[int]
) -> tuple[dict[str, Tensor], dict[int, CodecError]]:
    """Decode B payloads.

    Args:
        codec: Decodes them.
        envelope: What each payload comes in, if anything.
        payloads: One for each sample.
        rows: Which sample of the request each of the B is.

    Returns:
        What the codec delivers, with B rows, of which any stands for a sample that failed, or none where all did; and
        what is wrong, by row.

    Raises:
        CodecError: They fail together, but none of them alone.
    """

    def decode(some: Sequence[bytes]) -> dict[str, Tensor]:
        return codec.decode(some if envelope is None else envelope.opened_all(some))

    try:
        return decode(payloads), {}
    except CodecError:
        errors = _errors(rows, lambda i: decode([payloads[i]]))
        if not errors:
            raise
    good = [place for place, row in enumerate(rows) if row not in errors]
    delivered = decode([payloads[place] for place in good])
    if not good:
        return delivered, errors
    position = {place: index for index, place in enumerate(good)}
    source = torch.tensor([position.get(place, 0) for place in range(len(rows))])
    return {name: tensor[source] if tensor.ndim else tensor for name, tensor in delivered.items()}, errors


def _errors(rows: Sequence[int], alone: Callable[[int], object]) -> dict[int, CodecError]:
    """Return what is wrong with each sample on its own, by row."""
    errors: dict[int, CodecError] = {}
    for place, row in enumerate(rows):
        try:
            alone(place)
        except CodecError as error:
            # Codecs name a sample by its place in what they were given, which was this one alone.
            errors[row] = CodecError(re.sub(r"\b(payload|sample) \d+\b", rf"\1 {row}", str(error), count=1))
    return errors
