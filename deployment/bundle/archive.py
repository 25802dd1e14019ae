"""Looking into a TorchScript file before PyTorch unpacks it: a small file can claim to hold more than memory does."""

from __future__ import annotations

import io
import zipfile
import zlib

from .files import BundleError

# TorchScript compresses the code alone, which is text; a network's has a few megabytes at the most.
MAX_CODE_BYTES = 64 * 2**20
MAX_MEMBERS = 2**17
_CHUNK = 2**20


def check_archive(content: bytes, what: str) -> None:
    """Check that a TorchScript file holds no more than it has bytes, but for its code, and that nothing is damaged.

    Args:
        content: Bytes of the file.
        what: Whose file it is, for messages.

    Raises:
        BundleError: It is no zip file, has too many members, compresses something other than code or more code than
            ``MAX_CODE_BYTES``, or a member's checksum fails.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_members(archive.infolist(), len(content), what)
            for member in archive.infolist():
                _check_content(archive, member, what)
    except BundleError:
        raise
    # The module answers broken archives with almost any exception: BadZipFile, NotImplementedError, struct.error, …
    except Exception as error:
        raise BundleError(f"{what} cannot be loaded by torch: it is damaged or no TorchScript file: {error}") from error


def _check_members(members: list[zipfile.ZipInfo], length: int, what: str) -> None:
    if len(members) > MAX_MEMBERS:
        raise BundleError(f"{what} has {len(members)} members, more than the {MAX_MEMBERS} allowed")
    names = {member.filename for member in members}
    if len(names) < len(members):
        raise BundleError(f"{what} has two members of one name")
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    for member in packed:
        folders = member.filename.split("/")
        if len(folders) < 3 or folders[1] != "code" or member.compress_type != zipfile.ZIP_DEFLATED:
            raise BundleError(
                f"{what} compresses {member.filename!a:.200}, which could unpack to any size; TorchScript stores all "
                "but its code as it is"
            )
    code = sum(member.file_size for member in packed)
    if code > MAX_CODE_BYTES:
        raise BundleError(f"{what} would unpack to {code} bytes of code, more than the {MAX_CODE_BYTES} allowed")
    stored = sum(member.file_size for member in members) - code
    if stored > length:
        raise BundleError(f"{what} of {length} bytes claims to hold {stored} bytes, more than itself")


def _check_content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, what: str) -> None:
    """Check a member's length and checksum, which PyTorch does not look at; nothing is kept of it."""
    length = check = 0
    with archive.open(member) as file:
        while chunk := file.read(_CHUNK):
            length, check = length + len(chunk), zlib.crc32(chunk, check)
    if (length, check) != (member.file_size, member.CRC):
        raise BundleError(f"{what} is damaged: {member.filename!a:.200} is not what its checksum says")
