"""Opening images as they are to be seen: upright, in sRGB, over white, in 8 bits."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from data_pipeline.errors import DataError, NotWanted
from data_pipeline.media.container import MAX_PIXELS

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
SRGB = ImageCms.createProfile("sRGB")
COLOURS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of a mode, as colour profiles name them
# Greys of fewer bits are stretched, the grey that stands for transparency is not.
STRETCHED = {"1": 255, "L;2": 85, "L;4": 17}
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


def open_image(media: bytes) -> Image.Image:
    """An image in RGB; DataError if it is damaged, NotWanted if it is no still image to be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(media), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise NotWanted(f"is too large to read: {image.width}x{image.height}")
                if image.format != "MPO" and getattr(image, "is_animated", False):
                    raise NotWanted("is an animation, no still image")
                depth = str(image.tile[0][3]) if image.tile else ""
                image.load()
                colour, alpha = _split(_upright(image), STRETCHED.get(depth, 1))
                colour = _in_srgb(colour, image.info.get("icc_profile"))
                if alpha is None:
                    return colour
                return Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    except UnidentifiedImageError:
        raise DataError("cannot be decoded (not JPEG, PNG or WebP)") from None
    except Image.DecompressionBombError:
        raise NotWanted(f"is too large to read: more than {MAX_PIXELS} pixels") from None
    except BROKEN as error:
        raise DataError(f"cannot be decoded ({error})") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN:
        return image  # what is broken is the orientation, not the image


def _split(image: Image.Image, stretch: int) -> tuple[Image.Image, Image.Image | None]:
    """Colour in L, RGB or CMYK, and how much of it shows, in L; None: all of it."""
    clear = image.info.get("transparency")  # in PNG, one colour may stand for none
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        alpha = None if clear is None else Image.fromarray((deep != clear).astype(np.uint8) * 255)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)), alpha
    if image.mode in ("1", "L") and isinstance(clear, int):
        grey = image.convert("L")
        return grey, grey.point([0 if value == clear * stretch else 255 for value in range(256)])
    if image.mode == "RGB" and clear is not None:
        clear = [value if max(clear) < 256 else value >> 8 for value in clear]
        shows = (np.asarray(image) != np.array(clear)).any(axis=2)
        return image, Image.fromarray(shows.astype(np.uint8) * 255)
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        full = image.convert("RGBA")
        return full.convert("RGB"), full.getchannel("A")
    return image if image.mode in COLOURS else image.convert("RGB"), None


def _in_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours by their profile; one that is broken or of other colours counts as none."""
    if profile:
        try:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            is_own = found.profile.xcolor_space.strip() == COLOURS[colour.mode]
            if is_own and not ImageCms.getProfileDescription(found).startswith("sRGB"):
                return ImageCms.profileToProfile(colour, found, SRGB, outputMode="RGB") or colour
        except (ImageCms.PyCMSError, *BROKEN):
            pass
    return colour.convert("RGB")
