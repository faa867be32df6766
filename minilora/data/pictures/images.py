"""Open one picture, whatever it is, as 8-bit RGB, or say in one line why it cannot be opened.

Pictures come from strangers, so the order matters: first the path, which must stay inside the data
folder, then the header (format and size: a 50 kB file may unpack to gigabytes), then the pixels.
"""

import contextlib
import io
import math
import os
import sys
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minilora.errors import UserError
from minilora.textfiles import read_bytes

# Formats that Pillow decodes by itself, without those that start other programs (EPS: ghostscript).
Image.init()
FORMATS = tuple(name for name in "JPEG MPO PNG GIF BMP TIFF WEBP PPM AVIF".split() if name in Image.OPEN)
EXTENSIONS = frozenset(".jpg .jpeg .jpe .jfif .png .gif .bmp .dib .tif .tiff .webp .ppm .pgm .pbm .pnm .avif".split())
# Pillow's own limit, 256 MiB as RGB; a file whose header names more is not decoded
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 30  # of a file
MAX_HEADER, STEP = 1 << 28, 1 << 10  # bytes read before the pixels, at least STEP at a time
MAX_CHUNKS = 1 << 16  # of a PNG that is read once more without its metadata
PNG = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112  # the EXIF tag that says how the camera was held
Source = str | os.PathLike | io.BytesIO  # a picture's file, or its bytes in memory


class BadImage(UserError):
    """A picture that cannot be read. `path` names it, `reason` says why."""

    def __init__(self, path: Source, reason: str):
        self.path, self.reason = "the picture" if isinstance(path, io.BytesIO) else str(path), reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self):  # exceptions are rebuilt from `args` when they cross a process boundary
        return BadImage, (self.path, self.reason)


def is_picture(name: str) -> bool:
    """Whether a file name looks like a picture's; hidden files (macOS leaves `._x.jpg`) do not."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith(".")


def inside(path: str | os.PathLike, root: str | os.PathLike) -> bool:
    """Whether `path`, with all symbolic links followed, lies in `root`."""
    real, base = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath((real, base)) == base


def open_image(path: Source, root: str | os.PathLike | None = None) -> Image.Image:
    """The picture at `path`, or in memory, as an RGB image, upright (EXIF orientation applied).

    Animated files give their first frame, transparency becomes white, 16-bit and float greys are
    scaled to 8 bits. With `root`, a path that leaves that folder (through `..` or a symbolic link)
    is refused without being opened. Raises BadImage(path, reason) for whatever cannot be read,
    before decoding where the header tells.
    """
    if root is not None and not inside(path, root):
        raise BadImage(path, f"lies outside the data folder {root}; copy the picture into the folder")
    try:
        if not isinstance(path, io.BytesIO):
            if not os.path.isfile(path):  # a pipe or a device would block for ever
                reason = "is not a file" if os.path.exists(path) else "no such file"
                raise BadImage(path, reason)
            if not 0 < (size := os.path.getsize(path)) <= MAX_BYTES:
                raise BadImage(path, f"the file has {size >> 20} MiB; make it smaller" if size else "the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no news; a bomb is an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return decoded(path, path)
            except BadImage:
                raise
            except (SyntaxError, OSError, ValueError):
                if (bare := without_metadata(path)) is None:
                    raise
                return decoded(bare, path)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(path, _too_large("the picture")) from None
    except UnidentifiedImageError:
        raise BadImage(path, "is not a picture of a known format " + _head(path)) from None
    except MemoryError:
        raise BadImage(path, "not enough memory to decode it") from None
    # OSError, SyntaxError, ValueError, struct.error, zlib.error, by decoder
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadImage(path, f"cannot be decoded: {reason}") from None


class Header(io.BufferedReader):
    """A picture's file, of which `left` may still be read: some headers go on for ever, and Pillow
    reads them byte by byte."""

    def __init__(self, path: Source):
        super().__init__(io.BytesIO(path.getvalue()) if isinstance(path, io.BytesIO) else io.FileIO(path))
        self.left = MAX_HEADER

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= max(len(data), STEP)
        if self.left < 0:
            raise OSError("its header has no end")
        return data


def decoded(source: Source, path: Source, lower: bool = False) -> Image.Image:
    """The picture of a file or of its bytes as RGB, upright; `path` names it in BadImage.

    lower: of 16 bits per colour take the lower 8, which are all that a picture of 8-bit values has.
    """
    with Header(source) as file, Image.open(file, formats=FORMATS) as image:
        file.left = math.inf
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(path, _too_large(f"{width} x {height}"))
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        grey = lower and any("LA;16" in str(tile[3]) for tile in image.tile)
        image.tile = [_exchanged(*tile) for tile in image.tile] if lower else image.tile
        image.load()
        if deep and not lower and not np.max(image.getextrema()):
            with contextlib.suppress(ValueError):  # Pillow cannot read every form in another order
                return decoded(source, path, lower=True)
        image = upright(image)
        return to_rgb(Image.merge("LA", [image.getchannel(band) for band in "GA"]) if grey else image)


def _exchanged(decoder: str, extents: tuple, offset: int, arguments: str | tuple) -> tuple:
    """A tile of Pillow's whose pairs of bytes are taken in the other order; grey and alpha of 16
    bits are the four bytes of a pixel with 8-bit colours."""
    mode, *rest = [arguments] if isinstance(arguments, str) else arguments
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    mode = "RGBA" if mode.startswith("LA") else mode[:-1] + other.get(mode[-1], mode[-1])
    return decoder, extents, offset, mode if isinstance(arguments, str) else (mode, *rest)


def without_metadata(path: Source) -> io.BytesIO | None:
    """A PNG's pixels, transparency and orientation alone: its texts and profiles may be longer than
    Pillow reads, or damaged. None for other files, and for one of more than MAX_CHUNKS pieces."""
    data = path.getvalue() if isinstance(path, io.BytesIO) else read_bytes(path, MAX_BYTES)
    if not data.startswith(PNG):
        return None
    kept, at = [PNG], len(PNG)
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            return io.BytesIO(b"".join(kept))
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + size]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (sound and name in (b"tRNS", b"eXIf")):
            kept.append(chunk)
        at += len(chunk)
    return None


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; broken EXIF counts as none."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
        return ImageOps.exif_transpose(image) if turned in range(2, 9) else image
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode: 1, L, LA, P, PA, RGB(A/a/X), CMYK, YCbCr, LAB, HSV, I, I;16*, F."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey_8bit(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_8bit(image: Image.Image) -> np.ndarray:
    """Deep grey values as uint8. 16-bit: the upper byte; F: [0, 1] or [0, 255] by its maximum."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), posinf=255.0, neginf=0.0)
        return np.clip(values * (255 if values.max(initial=0) <= 1 else 1), 0, 255).astype(np.uint8)
    values = np.clip(values.astype(np.int64), 0, 65535)
    if values.max(initial=0) <= 255:  # a file of 16 or 32 bits that holds 8-bit values
        return values.astype(np.uint8)
    return (values >> 8).astype(np.uint8)


def _too_large(what: str) -> str:
    return f"{what} has more than {MAX_PIXELS:,} pixels and was not decoded; make it smaller"


def _head(path: Source) -> str:
    """What the file starts with: an HTML error page saved as .jpg is then easy to recognise."""
    with io.BytesIO(path.getvalue()) if isinstance(path, io.BytesIO) else open(path, "rb") as file:
        return f"(it starts with {file.read(12)!r})"
