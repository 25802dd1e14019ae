"""Looking into a TorchScript file before PyTorch unpacks it: a small file can claim to hold more than memory does."""

from __future__ import annotations

import io
import zipfile

from .files import BundleError

# TorchScript compresses the code alone, which is text; a network's has a few megabytes at the most.
MAX_CODE_BYTES = 64 * 2**20
MAX_MEMBERS = 2**17


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
            # PyTorch does not look at checksums.
            if (damaged := archive.testzip()) is not None:
                raise BundleError(f"{what} is damaged: {damaged!a:.200} is not what its checksum says")
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
