"""The entropy-coded scan of a baseline JPEG: where it begins, and whether it is whole.

libjpeg fills what is missing of a scan with grey and says nothing of it, so a payload that was cut short must be found
by walking its Huffman codes. Sections are those of ITU-T T.81, the JPEG standard.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from .packing import CodecError

END_OF_IMAGE = b"\xff\xd9"
_BASELINE, _HUFFMAN, _SCAN = 0xC0, 0xC4, 0xDA
# An end-of-block code accounts for all coefficients left; so large a sum says that there was one.
_END_OF_BLOCK = 1024
# By the next 16 bits: the bits that a code takes with the value behind it, and the coefficients it accounts for.
_Table = list[tuple[int, int] | None]


def header_length(file: bytes) -> int:
    """Bytes of a JPEG file before its first scan: from the start of the image to the end of the scan's own header."""
    for marker, _, end in _segments(file):
        if marker == _SCAN:
            return end
    raise CodecError("the JPEG file has no scan")


def check_scan(scan: bytes, header: bytes) -> None:
    """Walk the Huffman codes of a scan (T.81, F.2.2) and check that it ends where its last block does.

    Args:
        scan: Entropy-coded data, without the marker that ends the image.
        header: All that stands before it in a baseline file of one scan.

    Raises:
        CodecError: The scan is cut short, goes on after its last block, or holds a code that the tables lack.
    """
    blocks, units = _plan(header)
    data = scan.replace(b"\xff\x00", b"\xff")
    if len(scan) - len(data) != scan.count(b"\xff"):
        raise CodecError("the JPEG scan holds a marker: it is damaged")
    damaged = f"the JPEG scan of {len(scan)} bytes does not end with its last block: it is cut short or damaged"
    position, end = 0, 8 * len(data)
    data += b"\xff\xff\xff"
    for _ in range(units):
        for table, rest in blocks:
            coefficients = 0
            while coefficients < 64:
                byte = position >> 3
                window = (data[byte] << 16 | data[byte + 1] << 8 | data[byte + 2]) >> (8 - (position & 7)) & 0xFFFF
                entry = table[window]
                if entry is None or position + entry[0] > end:
                    raise CodecError(damaged)
                position += entry[0]
                coefficients += entry[1]
                table = rest
            if 64 < coefficients < _END_OF_BLOCK:
                raise CodecError(damaged)
    ones = (1 << end - position) - 1
    if end - position > 7 or (ones and data[position >> 3] & ones != ones):
        raise CodecError(damaged)


def _segments(file: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield marker and content of each segment up to the scan's header, and where the segment ends."""
    position = 2
    while position + 4 <= len(file):
        marker, start = file[position + 1], position + 4
        position += 2 + int.from_bytes(file[position + 2 : start], "big")
        yield marker, file[start:position], position
        if marker == _SCAN:
            return


@functools.lru_cache(maxsize=32)
def _plan(header: bytes) -> tuple[list[tuple[_Table, _Table]], int]:
    """Return the tables (DC, AC) of each block of a minimum coded unit, and how many units the scan has."""
    tables: dict[int, _Table] = {}
    sampling, chosen = {}, {}
    rows = columns = 0
    for marker, content, _ in _segments(header):
        if marker == _HUFFMAN:
            tables |= _huffman_tables(content)
        elif marker == _BASELINE:
            rows, columns = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
            sampling = {content[i]: divmod(content[i + 1], 16) for i in range(6, len(content), 3)}
        elif marker == _SCAN:
            chosen = {content[i]: divmod(content[i + 1], 16) for i in range(1, 1 + 2 * content[0], 2)}
    if not sampling or chosen.keys() != sampling.keys():
        raise CodecError("the JPEG header is not of a baseline file with one scan")
    if len(sampling) == 1:
        # The blocks of a lone component follow each other whatever its sampling factors say (T.81, A.2.2).
        sampling = dict.fromkeys(sampling, (1, 1))
    across, down = (8 * max(factors) for factors in zip(*sampling.values(), strict=True))
    blocks = []
    for name, (horizontal, vertical) in sampling.items():
        dc, ac = chosen[name]
        blocks += [(tables[dc], tables[0x10 | ac])] * (horizontal * vertical)
    return blocks, -(-columns // across) * -(-rows // down)


@functools.lru_cache(maxsize=16)
def _huffman_tables(content: bytes) -> dict[int, _Table]:
    """Read the tables of one segment (T.81, B.2.4.2 and C.2): class and number in one byte to look-up table."""
    tables = {}
    while content:
        kind, counts = content[0], content[1:17]
        symbols = iter(content[17 : 17 + sum(counts)])
        content = content[17 + sum(counts) :]
        table: _Table = []
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                table += [_entry(next(symbols), length, ac=kind >= 0x10)] * (1 << 16 - length)
        tables[kind] = table + [None] * (2**16 - len(table))
    return tables


def _entry(symbol: int, length: int, *, ac: bool) -> tuple[int, int]:
    """What a code of ``length`` bits stands for: a DC difference, or a run of zeros and a value (T.81, F.1.2)."""
    if not ac:
        return length + symbol, 1
    run, size = divmod(symbol, 16)
    if size:
        return length + size, run + 1
    return length, 16 if run == 15 else _END_OF_BLOCK
