"""What is in a tar of samples, member by member: what is used, what is not, and why."""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

from data_pipeline.errors import DataError, InputMissing
from data_pipeline.shards.account import Tally
from data_pipeline.shards.captions import Captions, captions_of, decode_text, parse_object
from data_pipeline.store import storage

PREVIEW = "gif"  # a video only where nothing else of its name is one
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "flv", "ts", "mts", "m2ts", "mpg",
                  "mpeg", "3gp", PREVIEW)  # fmt: skip
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TENSOR_SUFFIXES = ("safetensors",)
SUFFIXES = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES, "tensor": TENSOR_SUFFIXES}
KEY = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$")  # as webdataset splits a member's name
MAX_MEMBER_BYTES = 4 << 30  # a claimed size must not fill the memory
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"\xfd\x37": "xz", b"BZ": "bzip2",
          b"PK": "zip"}  # fmt: skip
CHUNK_BYTES = 1 << 20


class TarFault(DataError):
    """What is wrong with a tar, or with one of its samples or members."""

    inside: str = ""  # the member that a tar ends in

    def __init__(self, path: str, name: str, reason: str, detail: str = ""):
        super().__init__(path, name, reason, detail)  # so that it can be sent between processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        path, name, reason, detail = self.args
        return f"{path}: {f'{name!r} ' if name else ''}{reason}{detail}"


Refuse = Callable[[TarFault], None]


def raise_fault(fault: TarFault) -> None:
    """Refuse at once."""
    raise fault


@dataclass
class Sample:
    """What a scan of a tar knows of one key."""

    base: str  # the key as webdataset has it, up to the first dot
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # offset, size, crc32
    suffixes: dict[str, str] = field(default_factory=dict)
    json_captions: Captions | None = None
    txt_captions: Captions | None = None

    @property
    def captions(self) -> Captions:
        """Those of the json member, or else of the txt member."""
        if self.json_captions and self.json_captions.first:
            return self.json_captions
        return self.txt_captions or Captions()


def parse_metadata(path: str, key: str, content: bytes) -> dict:
    """A sample's json member."""
    try:
        return parse_object(content)
    except DataError as error:
        raise TarFault(path, key, "has a damaged json", f" ({error}).") from None


def scan_samples(
    path: str, kind: str, columns: Mapping[str, float], refuse: Refuse, tally: Tally
) -> dict[str, Sample]:
    """The samples of a tar by key, in the order in which their keys first appear.

    A key ends at the first dot of a name, as webdataset has it; at the last one where that makes a
    sample of what would be none. Whatever is of no use is counted; what could harm a reader (links,
    devices, paths that leave the folder, a name twice, a cut end) is refused. If `refuse` returns,
    samples with a fault are left out, and at a cut the last one, which may be partial.
    """
    samples: dict[str, Sample] = {}
    bad: set[str] = set()
    key = ""
    try:
        for name, offset, content in _members(path, refuse):
            key, base, slot, suffix = _slot(name, kind)
            if not slot:
                tally.add("passed_over", suffix, [f"{PurePosixPath(path).name}: {name}"])
                continue
            sample = samples.setdefault(key, Sample(base))
            before = sample.suffixes.get(slot, suffix)
            if before != suffix:
                tally.add("passed_over", f"second {slot} of a key", [name])
                if before != PREVIEW:
                    continue
                del sample.places[slot]
            try:
                if slot in sample.places:
                    raise TarFault(path, key, "is there twice", f" ({slot}); write it again.")
                if slot == "json":
                    metadata = parse_metadata(path, key, content)
                    sample.json_captions = captions_of(metadata, columns)
                elif slot == "txt":
                    sample.txt_captions = Captions((decode_text(content),))
            except TarFault as error:
                refuse(error)
                bad.add(key)
            except DataError as error:
                refuse(TarFault(path, key, str(error).split(":")[0], f" ({error})"))
                bad.add(key)
            place = offset, len(content), zlib.crc32(content)
            sample.places[slot], sample.suffixes[slot] = place, suffix
    except TarFault as error:
        refuse(error)
        bad.add(_slot(error.inside, kind)[0] if error.inside else key)
    return {k: s for k, s in samples.items() if k not in bad and _whole(k, s, samples, tally)}


def _whole(key: str, sample: Sample, samples: dict[str, Sample], tally: Tally) -> bool:
    """Whether a key is a sample: it has media, and is no second name beside a plain one."""
    plain = samples.get(sample.base)
    if "media" not in sample.places:
        tally.add("passed_over", "text without media", [key])
        return False
    if key != sample.base and plain and "media" in plain.places:
        tally.add("passed_over", "media of a dotted key beside the plain one", [key])
        return False
    return True


def _slot(name: str, kind: str) -> tuple[str, str, str, str]:
    """(key, key up to the first dot, what of a sample the member is, suffix); nothing and the
    reason where it is of no use."""
    match = KEY.match(name)
    if not match:
        hidden = PurePosixPath(name).name.startswith(".")
        return "", "", "", "hidden file" if hidden else "member without a type"
    base, suffix = match.group(1), match.group(2).lower()
    head, _, last = suffix.rpartition(".")
    key = f"{base}.{match.group(2)[: len(head)]}" if head else base
    slots = {**dict.fromkeys(SUFFIXES[kind], "media"), "json": "json", "txt": "txt"}
    return key, base, slots.get(last, ""), last if last in slots else f"member of type .{last}"


def list_members(path: str, refuse: Refuse) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file of a tar, whose content stays unread; at a cut, of
    those that are whole."""
    try:
        with _opened(path) as stream:
            end = stream.seek(0, 2)
            for member in _plain_members(path, stream, refuse):
                if member.offset_data + member.size > end:
                    raise _cut(path, member.name)
                yield member.name, member.offset_data, member.size
    except TarFault as error:
        refuse(error)


def _members(path: str, refuse: Refuse) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset, content) of each plain file; TarFault where nothing after it can be read."""
    with _opened(path) as stream:
        for member in _plain_members(path, stream, refuse):
            stream.seek(member.offset_data)
            content = stream.read(member.size)
            if len(content) != member.size:
                raise _cut(path, member.name)
            yield member.name, member.offset_data, content


def _opened(path: str) -> BinaryIO:
    try:
        return storage.local_file(path).open("rb")
    except FileNotFoundError:
        raise InputMissing(f"{path}: no such file; check the folder.") from None


def _cut(path: str, inside: str) -> TarFault:
    fault = TarFault(path, "", "ends early", f", inside '{inside}'; fetch it again.")
    fault.inside = inside
    return fault


def _plain_members(path: str, stream: BinaryIO, refuse: Refuse) -> Iterator[tarfile.TarInfo]:
    begin: int | None = 0
    while begin is not None:
        yield from _archive(path, stream, begin, refuse)
        begin = _next_archive(stream)


def _archive(path: str, stream: BinaryIO, begin: int, refuse: Refuse) -> Iterator[tarfile.TarInfo]:
    stream.seek(begin)
    mark = stream.read(2)
    if mark in PACKED:
        raise TarFault(path, "", "is compressed", f" ({PACKED[mark]}); unpack it first.")
    stream.seek(begin)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                try:
                    if _is_plain(path, member):
                        yield member
                except TarFault as error:
                    refuse(error)
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                lost = f" at byte {tar.offset}, so samples are lost; fetch it again."
                raise TarFault(path, "", "is damaged or cut", lost)
    except tarfile.TarError as error:
        reason = f" because {error}; fetch it again."
        raise TarFault(path, "", "is no readable tar", reason) from None


def _next_archive(stream: BinaryIO) -> int | None:
    """Where behind the end of an archive another one begins: `cat a.tar b.tar` makes such files."""
    at = stream.tell()
    while chunk := stream.read(CHUNK_BYTES):
        if rest := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(chunk)
    return None


def _is_plain(path: str, member: tarfile.TarInfo) -> bool:
    """Whether a member is a plain file, not a folder; TarFault for what could do harm."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise TarFault(path, member.name, "leaves the folder", "; do not use this tar.")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise TarFault(path, member.name, "is no plain file", "; do not use this tar.")
    if member.size > MAX_MEMBER_BYTES:
        told = f": {member.size} bytes are more than {MAX_MEMBER_BYTES}; cut it up."
        raise TarFault(path, member.name, "is too large", told)
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise TarFault(path, ascii(member.name), "is no UTF-8", "; rename it.") from None
    return True
