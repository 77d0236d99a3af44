"""Images come out as people see them: upright, in sRGB, over white, in 8 bits."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.errors import DataError, NotWanted
from data_pipeline.media.clips import probe, read_clip
from data_pipeline.media.codec import decode_image
from tests.odd_media import QUADRANTS, corners_of, quadrants

WHITE = (255, 255, 255)
EXIF = 0x0112
# EXIF orientation: what undoes it, of rows and columns (TIFF 6.0, tag 274).
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def saved(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(rows: np.ndarray, depth: int, colour: int, clear: bytes = b"", lut: bytes = b"") -> bytes:
    """A PNG by its specification: `rows` are the bytes of each row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    size = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    header = struct.pack(">IIBBBBB", rows.shape[1] * 8 // size, len(rows), depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", header)]
    parts += [chunk(b"PLTE", lut)] if lut else []
    parts += [chunk(b"tRNS", clear)] if clear else []
    parts += [chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_undone(kind, orientation):
    exif = Image.Exif()
    exif[EXIF] = orientation
    quality = {} if kind == "PNG" else {"quality": 100}
    media = saved(Image.fromarray(quadrants()), kind, exif=exif, **quality)
    upright = UPRIGHT[orientation](quadrants())
    read = read_clip(media, "image", (2, *upright.shape[:2]))
    assert (read.original_height, read.original_width) == upright.shape[:2]
    assert abs(corners_of(read.clip[1]) - corners_of(upright)).max() <= 6
    assert abs(corners_of(decode_image(media)) - corners_of(upright)).max() <= 6
    found = probe(media, "image")
    assert (found.height, found.width) == upright.shape[:2]


GREY16 = np.array([[0x4000, 0xBFFF]] * 2, ">u2").repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize(
    ("media", "left", "right"),
    [
        (png(GREY16.view(np.uint8), 16, 0), 64, 191),
        (png(GREY16.view(np.uint8), 16, 0, clear=b"\x40\x00"), 255, 191),
        (png(GREY16.repeat(3, 1).view(np.uint8), 16, 2), 64, 191),
        (png(GREY16.repeat(3, 1).view(np.uint8), 16, 2, clear=b"\x40\x00" * 3), 255, 191),
        (saved(Image.fromarray(GREY16.astype(np.uint16))), 64, 191),
        (png(np.full((16, 2), 0x1B, np.uint8), 2, 0), None, None),
        (png(np.array([[0x44, 0xCC]] * 2, np.uint8), 4, 0, clear=b"\0\x04"), 255, 204),
        (png(np.array([[0x0F]] * 4, np.uint8), 1, 0, clear=b"\0\0"), 255, 255),
        (png(np.array([[0x0F]] * 4, np.uint8), 1, 0), 0, 255),
        (png(np.array([[0, 1]] * 2, np.uint8), 8, 3, lut=bytes([9] * 3 + [191] * 3), clear=b"\0"),
         255, 191),
        (png(np.array([[0, 1]] * 2, np.uint8), 8, 3, lut=bytes([9] * 3 + [191] * 3),
             clear=b"\x80\xff"), 132, 191),
        (png(np.array([[90, 0, 90, 255]] * 2, np.uint8), 8, 4), 255, 90),
        (png(np.array([[0x40, 0, 0, 0, 0x90, 0, 255, 255]] * 2, np.uint8), 16, 4), 255, 144),
    ],
)  # fmt: skip
def test_depths_palettes_and_clear_colours(media, left, right):
    picture = decode_image(media)
    if left is None:
        assert picture[0, :4, 0].tolist() == [0, 85, 170, 255]
        return
    assert abs(picture[0, 0].astype(int) - left).max() <= 1
    assert abs(picture[0, -1].astype(int) - right).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(kind, mode):
    alpha = np.full((48, 80, 1), 255, np.uint8)
    alpha[:, :40] = 0
    image = Image.fromarray(np.concatenate([quadrants(), alpha], axis=2))
    if mode == "P":
        image = image.quantize(8)
    elif mode == "LA":
        image = image.convert("LA")
    if kind == "WEBP":
        media = saved(image.convert("RGBA"), kind, lossless=True)
    else:
        media = saved(image, kind)
    corners = corners_of(decode_image(media))
    assert (corners[:, 0] == 255).all()
    grey = np.array(Image.fromarray(QUADRANTS).convert("L"))[:, 1, None]
    assert abs(corners[:, 1] - (grey if mode == "LA" else QUADRANTS[:, 1].astype(int))).max() <= 4


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    assert abs(decode_image(saved(image))[0, 0].astype(int) - (227, 177, 127)).max() <= 1


def profile_of(red, green, blue, gamma: float) -> bytes:
    """A matrix profile by its primaries' XYZ under D50 (ICC.1, 8.3)."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"a test"
    words = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(79)
    columns = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": (0.9642, 1.0, 0.8249)}
    tags = {name: b"XYZ " + bytes(4) + fixed(*column) for name, column in columns.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"desc"] = words + bytes(-len(words) % 4)
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0" + bytes(3)
    table, at, content = struct.pack(">I", len(tags)), 128 + 4 + 12 * len(tags), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", at + len(content), len(tag))
        content += tag
    head = bytearray(128)
    head[8:12], head[12:24] = b"\2\x10\0\0", b"mntrRGB XYZ "
    head[36:40], head[68:80] = b"acsp", fixed(0.9642, 1.0, 0.8249)
    head[0:4] = struct.pack(">I", 128 + len(table) + len(content))
    return bytes(head) + table + content


# Primaries of sRGB and of Display P3 under D50.
SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def in_srgb(colour: tuple[int, ...], primaries, gamma: float) -> np.ndarray:
    """By hand: to XYZ, to linear sRGB, to the curve of sRGB."""
    light = (np.array(colour) / 255) ** gamma
    linear = (np.linalg.inv(np.array(SRGB).T) @ np.array(primaries).T @ light).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curved


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "RGBA")])
@pytest.mark.parametrize(("primaries", "gamma"), [(P3, 2.2), (SRGB, 1.0), (SRGB, 1.8)])
def test_profiles_are_turned_to_srgb(kind, mode, primaries, gamma):
    colour = (180, 100, 60)
    image = Image.new(mode, (16, 16), colour + (255,) * (mode == "RGBA"))
    settings = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    media = saved(image, kind, icc_profile=profile_of(*primaries, gamma), **settings)
    assert abs(decode_image(media)[8, 8] - in_srgb(colour, primaries, gamma)).max() <= 3


def test_profiles_that_are_broken_or_of_other_colours_count_as_none():
    image = Image.new("RGB", (8, 8), (180, 100, 60))
    grey = Image.new("L", (8, 8), 100)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for other, profile, colour in (
        (image, b"nonsense", (180, 100, 60)),
        (image, lab, (180, 100, 60)),
        (grey, profile_of(*P3, 1.0), (100, 100, 100)),
    ):
        assert decode_image(saved(other, icc_profile=profile))[4, 4].tolist() == list(colour)


def test_inks_become_colours():
    image = Image.fromarray(quadrants()).convert("CMYK")
    corners = corners_of(decode_image(saved(image, "JPEG", quality=100, subsampling=0)))
    assert abs(corners - QUADRANTS).max() <= 6


def test_animations_are_not_wanted_and_damage_is_told():
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 200)]
    for kind in ("PNG", "WEBP"):
        media = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(NotWanted, match="is an animation"):
            decode_image(media)
    for kind in ("PNG", "JPEG", "WEBP"):
        media = saved(Image.fromarray(quadrants()), kind)
        with pytest.raises(DataError, match="cannot be decoded") as error:
            decode_image(media[: len(media) * 2 // 3])
        assert not isinstance(error.value, NotWanted)


@pytest.mark.parametrize("side", [9000, 60000])
def test_an_image_is_not_wanted_however_much_too_large_it_says_it_is(side):
    media = bytearray(saved(Image.fromarray(quadrants()), "PNG"))
    media[16:24] = struct.pack(">II", side, side)
    media[29:33] = struct.pack(">I", zlib.crc32(media[12:29]))
    with pytest.raises(NotWanted, match="is too large to read"):
        decode_image(bytes(media))


def test_a_broken_orientation_does_not_spoil_the_image():
    media = saved(Image.fromarray(quadrants()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(media).shape == (48, 80, 3)
