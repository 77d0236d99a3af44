"""What headers of H.264 and HEVC say that FFmpeg keeps to itself (ITU-T H.264 and H.265, 7.3.2)."""

import re

H264_SPS, HEVC_PPS = 7, 34
# Profiles of H.264 whose headers tell of chroma, depth and scaling.
HIGH = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


class Bits:
    """The bits of a header from its first on; past its end they are 0."""

    def __init__(self, unit: bytes):
        content = unit.replace(b"\0\0\3", b"\0\0")
        self._number, self._left = int.from_bytes(content, "big"), len(content) * 8

    def read(self, count: int = 1) -> int:
        """The next bits as a number."""
        self._left -= count
        return self._number >> self._left & ((1 << count) - 1) if self._left >= 0 else 0

    def read_golomb(self) -> int:
        """The next Exp-Golomb number, ue(v); a signed one takes as many bits."""
        zeros = 0
        while not self.read() and self._left > 0:
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def allows_gaps(extradata: bytes) -> bool:
    """Whether an H.264 stream may lack frames, as one does whose upper layers were taken out."""
    for unit in _units(extradata, 6):
        if unit[0] & 31 != H264_SPS or len(unit) < 5:
            continue
        bits = Bits(unit[4:])
        bits.read_golomb()
        if unit[1] in HIGH:
            chroma = bits.read_golomb()
            bits.read(1 if chroma == 3 else 0)
            bits.read_golomb()
            bits.read_golomb()
            bits.read()
            if bits.read():
                return True  # what comes after scaling lists is not looked for
        bits.read_golomb()
        if (order := bits.read_golomb()) == 0:
            bits.read_golomb()
        elif order == 1:
            return True
        bits.read_golomb()
        return bool(bits.read())
    return True


def is_wavefront(extradata: bytes) -> bool:
    """Whether the rows of an HEVC stream are coded side by side, and found by their places."""
    for unit in _units(extradata, 23):
        if unit[0] >> 1 & 63 != HEVC_PPS:
            continue
        bits = Bits(unit[2:])
        bits.read_golomb()
        bits.read_golomb()
        bits.read(7)
        for _ in range(3):
            bits.read_golomb()
        bits.read(2)
        if bits.read():
            bits.read_golomb()
        bits.read_golomb()
        bits.read_golomb()
        bits.read(5)
        return bool(bits.read())
    return False


def length_bytes(codec: str, extradata: bytes) -> int | None:
    """How many bytes tell the length of each unit in a packet; None: start codes part them."""
    at = {"h264": 4, "hevc": 21}.get(codec)
    return None if at is None or extradata[:1] != b"\1" else (extradata[at] & 3) + 1


def holds_zeros(packet: bytes, length_bytes: int) -> bool:
    """Whether a unit of a packet holds three zeros, which no encoder writes but at its end."""
    at = 0
    while at + length_bytes <= len(packet):
        begin = at + length_bytes
        at = begin + int.from_bytes(packet[at:begin], "big")
        if b"\0\0\0" in packet[begin:at].rstrip(b"\0"):
            return True
    return False


def _units(extradata: bytes, first: int) -> list[bytes]:
    """The headers that a container keeps: behind start codes, or from a place on with their
    lengths, between a few bytes that count them."""
    if extradata[:1] != b"\1":
        return [unit for unit in re.split(rb"\x00{2,}\x01", extradata) if unit]
    if first == 6:  # of H.264: the first of its sequences is asked for
        size = int.from_bytes(extradata[6:8], "big")
        return [extradata[8 : 8 + size]] if size else []
    units, at = [], first
    while at + 3 <= len(extradata):
        count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : at + 2 + size])
            at += 2 + size
    return [unit for unit in units if unit]
