"""What is in a zip, member by member, as far as it can be read in parts."""

import struct
import zipfile
from collections.abc import Iterator

from data_pipeline.shards.scan import MAX_MEMBER_BYTES, Refuse, TarFault
from data_pipeline.store import storage

HEADER = struct.Struct("<26x2H")  # of a member; its name and more follow, as long as it tells


def list_zip(path: str, refuse: Refuse) -> Iterator[tuple[str, int, int, int | None]]:
    """(name, offset, size, deflated size or None) of each file of a zip, whose content stays
    unread."""
    try:
        with storage.local_file(path).open("rb") as stream, zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                name = member.filename.replace("\\", "/")  # of Windows
                if member.is_dir():
                    continue
                if why := _fault(name, member):
                    refuse(TarFault(path, name, why))
                    continue
                if member.header_offset < 0:
                    raise zipfile.BadZipFile("a member begins before it does")
                stream.seek(member.header_offset)
                before = HEADER.size + sum(HEADER.unpack(stream.read(HEADER.size)))
                is_packed = member.compress_type == zipfile.ZIP_DEFLATED
                packed = member.compress_size if is_packed else None
                yield name, member.header_offset + before, member.file_size, packed
    # A RuntimeError is of a version that zipfile does not read.
    except (zipfile.BadZipFile, RuntimeError, struct.error, ValueError) as error:
        refuse(TarFault(path, "", "is no readable zip", f" because {error}; fetch it again."))


def _fault(name: str, member: zipfile.ZipInfo) -> str | None:
    """Why a member cannot be read."""
    if name.startswith("/") or ".." in name.split("/"):
        return "leaves the folder"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed by another method than deflate"
    return "is too large" if member.file_size > MAX_MEMBER_BYTES else None
