"""What stands in front of a payload, so that nobody decodes it as what it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from collections.abc import Sequence

from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from .canonical_json import canonical

ENVELOPE_BYTES = 12
VERSION = 1
_HEAD = struct.Struct(">BB3s3s")
_CHECK_BYTES = 4


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
    _start: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        edge = {"codec": self.codec.to_dict(), "target": self.target, "tensor": self.tensor}
        digest = hashlib.sha256(canonical(edge)).digest()
        head = _HEAD.pack(VERSION, self._bits, bytes.fromhex(self.bundle)[:3], digest[:3])
        object.__setattr__(self, "head", head)
        object.__setattr__(self, "_start", zlib.crc32(head))

    @property
    def _bits(self) -> int:
        try:
            return self.codec.bits if 0 < self.codec.bits < 256 else 0
        except CodecError:  # entropy-coded: no width
            return 0

    def seal(self, payload: bytes) -> bytes:
        """Return a payload in its envelope."""
        return self.seal_all([payload])[0]

    def seal_all(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Return each payload of a batch in an envelope."""
        head, start, crc = self.head, self._start, zlib.crc32
        return [head + crc(payload, start).to_bytes(_CHECK_BYTES, "big") + payload for payload in payloads]

    def opened_all(self, sealed: Sequence[bytes]) -> list[bytes]:
        """Return what is in the envelopes of a batch; :class:`CodecError` names the first that is not right."""
        head, start, end, crc = self.head, self._start, ENVELOPE_BYTES, zlib.crc32
        payloads = []
        for index, content in enumerate(sealed):
            # The usual case, in as few steps as it takes: all of a batch is here on every request.
            if type(content) is bytes and content.startswith(head):
                payload = content[end:]
                if content[_HEAD.size : end] == crc(payload, start).to_bytes(_CHECK_BYTES, "big"):
                    payloads.append(payload)
                    continue
            payloads.append(self.opened(content, index))
        return payloads

    def opened(self, sealed: bytes, index: int = 0) -> bytes:
        """Return what is in an envelope.

        Args:
            sealed: What arrived.
            index: Which sample's it is, for messages.

        Raises:
            CodecError: It is damaged, or sound and of another version, bundle, width or edge.
        """
        if not isinstance(sealed, (bytes, bytearray, memoryview)):
            raise CodecError(f"payload {index} must be bytes, got {type(sealed).__name__}")
        content = bytes(sealed)
        head, check, payload = content[: _HEAD.size], content[_HEAD.size : ENVELOPE_BYTES], content[ENVELOPE_BYTES:]
        start = self._start if head == self.head else zlib.crc32(head)
        if check != zlib.crc32(payload, start).to_bytes(_CHECK_BYTES, "big"):
            raise CodecError(
                f"payload {index} of {len(content)} bytes is damaged or cut short: the CRC of its envelope does not "
                "fit; or it was sent without an envelope, which both sides must agree on"
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
