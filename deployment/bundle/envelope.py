"""What stands in front of a payload, so that nobody decodes it as what it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib

from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from .canonical_json import canonical

ENVELOPE_BYTES = 12
VERSION = 1
_HEAD = struct.Struct(">BB3s3s")
_CHECK = struct.Struct(">I")


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The 12 bytes in front of each payload of a tensor, by which a reader knows what it has before it decodes it.

    They are the format's version, the width of the codes (0 where there is none), the first 3 bytes of the bundle's
    digest and of the edge's, and the CRC-32 of all that and of the payload. The edge's digest covers the tensor's name,
    where it goes, and its codec, so that a payload of another shape, range or coding is found out too.

    Args:
        bundle: The manifest's digest, 64 hexadecimal digits.
        tensor: Name of the tensor.
        target: The placement that it goes to.
        codec: How it becomes bytes.

    Example:
        >>> from cleave.deployment import FloatCodec
        >>> envelope = Envelope("ab" * 32, "layer2", "server", FloatCodec((4,)))
        >>> sealed = envelope.seal(b"payload")
        >>> len(sealed) - len(b"payload"), envelope.opened(sealed)
        (12, b'payload')
    """

    bundle: str
    tensor: str
    target: str
    codec: Codec
    head: bytes = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        edge = {"codec": self.codec.to_dict(), "target": self.target, "tensor": self.tensor}
        digest = hashlib.sha256(canonical(edge)).digest()
        head = _HEAD.pack(VERSION, self._bits, bytes.fromhex(self.bundle)[:3], digest[:3])
        object.__setattr__(self, "head", head)

    @property
    def _bits(self) -> int:
        try:
            return self.codec.bits if 0 < self.codec.bits < 256 else 0
        except CodecError:  # entropy-coded: no width
            return 0

    def seal(self, payload: bytes) -> bytes:
        """Return a payload in its envelope."""
        return b"".join((self.head, _CHECK.pack(zlib.crc32(payload, zlib.crc32(self.head))), payload))

    def opened(self, sealed: bytes, index: int = 0) -> bytes:
        """Return what is in an envelope.

        Args:
            sealed: What arrived.
            index: Which sample's it is, for messages.

        Raises:
            CodecError: It is damaged, or sound and of another version, bundle, width or edge.
        """
        if not isinstance(sealed, bytes | bytearray | memoryview):
            raise CodecError(f"payload {index} must be bytes, got {type(sealed).__name__}")
        sealed = bytes(sealed)
        if len(sealed) < ENVELOPE_BYTES:
            raise CodecError(
                f"payload {index} has {len(sealed)} bytes, its envelope alone {ENVELOPE_BYTES}: cut short, or sent "
                "without one; both sides need the same envelope"
            )
        head, payload = sealed[: _HEAD.size], sealed[ENVELOPE_BYTES:]
        if sealed[_HEAD.size : ENVELOPE_BYTES] != _CHECK.pack(zlib.crc32(payload, zlib.crc32(head))):
            raise CodecError(
                f"payload {index} of {len(sealed)} bytes is damaged: the CRC of its envelope does not fit; or it was "
                "sent without one, which both sides must agree on"
            )
        if head != self.head:
            raise CodecError(f"payload {index} {self._difference(head)}")
        return payload

    def _difference(self, head: bytes) -> str:
        """Say what a sound envelope differs in from this one."""
        (version, bits, bundle, edge), own = _HEAD.unpack(head), _HEAD.unpack(self.head)
        if version != VERSION:
            return f"has an envelope of version {version}, this reader knows {VERSION}: update the older side"
        if bundle != own[2]:
            return (
                f"was made with another bundle: its digest begins with {bundle.hex()}, this one's with "
                f"{own[2].hex()}; give both sides the same bundle"
            )
        if bits != own[1]:
            return f"was made at {_width(bits)}, this side reads {_width(own[1])}; give both sides the same bits"
        return (
            f"was made for another edge: its digest begins with {edge.hex()}, that of {self.tensor} to {self.target} "
            f"by this side's {self.codec.kind} codec with {own[3].hex()}"
        )


def _width(bits: int) -> str:
    return f"{bits} bits" if bits else "no width of codes"
