"""open_image: every kind of picture comes out as upright 8-bit RGB, or as one line that says why not."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from minilora.data.pictures.images import MAX_PIXELS, PNG, BadImage, open_image
from minilora.data.pictures.transforms import Resize, build_transform
from minilora.errors import UserError

RED = (255, 0, 0)
PREPROCESS = {
    "image_size": 32,
    "resize": "squash",
    "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2] * 3,
}


def chunk(kind: bytes, body: bytes, sound: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not sound))


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header of that size with hardly any pixel data behind it."""
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return PNG + size + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "mode, suffix, value, expected",
    [
        ("RGB", ".png", RED, RED),
        ("RGB", ".bmp", RED, RED),
        ("RGB", ".webp", RED, RED),
        ("L", ".jpg", 128, (128, 128, 128)),
        ("1", ".png", 1, (255, 255, 255)),
        ("LA", ".png", (100, 255), (100, 100, 100)),
        ("LA", ".png", (0, 0), (255, 255, 255)),
        ("RGBA", ".png", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", ".png", (0, 0, 0, 51), (204, 204, 204)),
        ("CMYK", ".tif", (0, 255, 255, 0), RED),
        ("CMYK", ".jpg", (0, 255, 255, 0), (254, 0, 0)),
        ("YCbCr", ".jpg", (76, 85, 255), (254, 0, 0)),
        ("HSV", ".png", (0, 255, 255), RED),
        ("LAB", ".tif", (0, 128, 128), (0, 0, 0)),
        ("I;16", ".png", 0x8040, (128, 128, 128)),
        ("I;16", ".tif", 0xFFFF, (255, 255, 255)),
        ("I", ".tif", 200, (200, 200, 200)),
        ("F", ".tif", 0.5, (127, 127, 127)),
        ("F", ".tif", 130.0, (130, 130, 130)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, value, expected):
    path = tmp_path / f"picture{suffix}"
    image = Image.new("RGB", (9, 7), RED).convert("HSV") if mode == "HSV" else Image.new(mode, (9, 7), value)
    (image.convert("RGB") if mode == "HSV" else image).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (9, 7))
    assert np.abs(np.asarray(opened)[3, 4].astype(int) - expected).max() <= 2


def test_palette_transparency_becomes_white_and_opaque_palette_keeps_its_colour(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert open_image(tmp_path / "opaque.png").getpixel((0, 0)) == RED
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(np.array(open_image(tmp_path / f"a{suffix}").getpixel((4, 4))) - RED).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == ((10, 20) if orientation >= 5 else (20, 10))


def test_broken_exif_and_wrong_extension_do_no_harm(tmp_path):
    Image.new("RGB", (20, 10), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    Image.new("RGB", (20, 10), RED).save(tmp_path / "b.png")
    os.rename(tmp_path / "b.png", tmp_path / "b.jpg")
    assert open_image(tmp_path / "a.jpg").size == open_image(tmp_path / "b.jpg").size == (20, 10)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
        (png_header(40, 40), "cannot be decoded"),
        (png_header(60_000, 60_000), "was not decoded"),
        (png_header(MAX_PIXELS + 1, 1), "was not decoded"),
    ],
)
def test_bad_content_says_why(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(tmp_path / "a.jpg")
    assert isinstance(caught.value, UserError) and str(tmp_path / "a.jpg") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif"])
def test_a_file_cut_anywhere_is_a_picture_or_a_bad_image(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole{suffix}")
    content = (tmp_path / f"whole{suffix}").read_bytes()
    refused = 0
    for length in range(0, len(content), max(1, len(content) // 60)):
        (tmp_path / f"cut{suffix}").write_bytes(content[:length])
        try:
            assert open_image(tmp_path / f"cut{suffix}").size == (24, 24)
        except BadImage:
            refused += 1
    assert refused > 30


def test_paths_that_leave_the_root_are_refused_unopened(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "secret.png"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(outside)
    os.symlink(outside, root / "link.png")
    os.symlink(tmp_path, root / "folder")
    (root / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(root / "sub" / "fine.png")
    os.symlink(root / "sub" / "fine.png", root / "inner.png")
    for path in (outside, root / ".." / "secret.png", root / "link.png", root / "folder" / "secret.png"):
        with pytest.raises(BadImage, match="outside the data folder"):
            open_image(path, root)
    assert open_image(root / "inner.png", root).size == (4, 4)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("pipe.jpg", "not a file"), ("folder.jpg", "not a file"), ("none.jpg", "no such file")):
        with pytest.raises(BadImage, match=reason):
            open_image(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (33, 700), (32, 32), (640, 480)])
@pytest.mark.parametrize("resize", ["squash", "shortest"])
def test_any_size_becomes_the_square_that_the_model_wants(size, resize):
    image = Image.new("RGB", size, (51, 102, 204))
    preprocess = PREPROCESS | {"resize": resize, "resize_to": 36}
    for augment in ("none", "basic", "rand"):
        x = build_transform(preprocess, augment)(image)
        assert x.shape == (3, 32, 32) and x.dtype == torch.float32
    pixels = Resize(preprocess)(image)
    assert pixels.dtype == torch.uint8 and (pixels == torch.tensor([51, 102, 204]).view(3, 1, 1)).all()
    expected = (torch.tensor([51, 102, 204]) / 255 - torch.tensor(PREPROCESS["mean"])) / 0.2
    assert torch.allclose(build_transform(preprocess)(image)[:, 5, 5], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (64, 64), (300, 201), (101, 333)])
def test_shortest_edge_and_centre_crop_equal_torchvision(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    ours = Resize(PREPROCESS | {"resize": "shortest", "resize_to": 37})(image)
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose([v2.Resize(37, interpolation=bicubic), v2.CenterCrop(32), v2.PILToTensor()])(image)
    assert torch.equal(ours, theirs)


def test_unknown_names_list_the_choices():
    with pytest.raises(UserError, match="none, basic, rand"):
        build_transform(PREPROCESS, "strong")
    with pytest.raises(UserError, match="bilinear"):
        build_transform(PREPROCESS | {"interpolation": "best"})


def test_a_picture_in_memory_is_read_like_its_file_and_refused_in_the_same_words(tmp_path):
    Image.linear_gradient("L").rotate(30).convert("RGB").save(tmp_path / "a.jpg", exif=Image.Exif())
    (tmp_path / "b.jpg").write_bytes(b"<!doctype html>")
    (tmp_path / "c.png").write_bytes(png_header(100_000, 100_000))
    memory = {name: io.BytesIO((tmp_path / name).read_bytes()) for name in ("a.jpg", "b.jpg", "c.png")}
    assert open_image(memory["a.jpg"]).tobytes() == open_image(tmp_path / "a.jpg").tobytes()
    for name in ("b.jpg", "c.png"):
        with pytest.raises(BadImage) as here:
            open_image(memory[name])
        with pytest.raises(BadImage) as there:
            open_image(tmp_path / name)
        assert here.value.reason == there.value.reason
    with pytest.raises(BadImage, match="known format"):
        open_image(io.BytesIO())


def endless(kind: str) -> bytes:
    """A picture whose header goes on to the end of 30 MB."""
    n = 30_000_000
    chunk = b"\0\0\0\1tEXta" + zlib.crc32(b"tEXta").to_bytes(4, "big")
    return {
        "comment of ppm": b"P6 #" + b"x" * n,
        "spaces of ppm": b"P5" + b" " * n,
        "markers of jpeg": b"\xff\xd8\xff" + b"\xff" * n,
        "text of png": png_header(40, 40)[:33] + chunk * (n // len(chunk)),
        "blocks of gif": b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1x" * (n // 2),
    }[kind]


@pytest.mark.parametrize("kind", ["comment of ppm", "spaces of ppm", "markers of jpeg", "text of png", "blocks of gif"])
def test_a_header_without_end_is_given_up_after_bounded_work(tmp_path, kind):
    import time

    (tmp_path / "a.jpg").write_bytes(endless(kind))
    started = time.process_time()
    with pytest.raises(BadImage):
        open_image(tmp_path / "a.jpg")
    assert time.process_time() - started < 5, "one such file of many must not stop a run"


def test_what_a_header_may_take_is_counted_by_bytes_and_by_reads(tmp_path, monkeypatch):
    from minilora.data.pictures import images

    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_HEADER", 2 * images.STEP)
    with pytest.raises(BadImage, match="its header has no end"):
        open_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_HEADER", 60 * images.STEP)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)
    (tmp_path / "big.png").touch()
    os.truncate(tmp_path / "big.png", images.MAX_BYTES + 1)
    with pytest.raises(BadImage, match="the file has 1024 MiB"):
        open_image(tmp_path / "big.png")


def png(pixels, bits=8, colour=2, extra=b"") -> bytes:
    """A PNG written by hand: (H, W, bands) values, and chunks before the pixels."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


METADATA = {
    "a text of 3 MB": chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 3_000_000)),
    "many texts": 70 * chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000)),
    "a long international text": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    "a text with a wrong checksum": chunk(b"tEXt", b"k\0hello", sound=False),
    "an unknown chunk with a wrong checksum": chunk(b"prVt", b"x", sound=False),
    "a name of no letters": chunk(b"\1abc", b"x"),
    "a long profile": chunk(b"iCCP", b"k\0\0" + zlib.compress(b"x" * 3_000_000)),
    "a profile of unknown compression": chunk(b"iCCP", b"k\0\7x"),
    "a short gamma": chunk(b"gAMA", b"x"),
    "a short resolution": chunk(b"pHYs", b"x"),
    "a short animation": chunk(b"fcTL", b"x"),
}


@pytest.mark.parametrize("what", METADATA)
def test_pixels_are_read_whatever_the_metadata_say(tmp_path, what):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3))
    (tmp_path / "x.png").write_bytes(png(pixels, extra=METADATA[what]))
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), pixels)
    assert np.array_equal(np.asarray(open_image(io.BytesIO((tmp_path / "x.png").read_bytes()))), pixels)


def test_damaged_pixels_stay_an_error_beside_damaged_texts(tmp_path):
    data = png(np.zeros((50, 50, 3), int), extra=METADATA["a text with a wrong checksum"])
    (tmp_path / "x.png").write_bytes(data[:-60])
    with pytest.raises(BadImage):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("colour, bands", [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_16_bit_files_of_8_bit_values_are_not_black(tmp_path, colour, bands):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, bands))
    if bands in (2, 4):
        pixels[..., -1] = 255
    expected = np.repeat(pixels[..., :1], 3, -1) if bands < 3 else pixels[..., :3]
    for scale in (1, 257):  # 8-bit values, and all 16 bits
        (tmp_path / "x.png").write_bytes(png(pixels * scale, 16, colour))
        assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), expected)
    if bands in (1, 3):
        (tmp_path / "x.png").write_bytes(png(np.zeros_like(pixels), 16, colour))
        assert not np.asarray(open_image(tmp_path / "x.png")).any()


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_of_8_bit_values_is_not_black(tmp_path, order):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3))
    for scale in (1, 257):
        (tmp_path / "x.tif").write_bytes(tiff(pixels * scale, order))
        assert np.array_equal(np.asarray(open_image(tmp_path / "x.tif")), pixels)


def tiff(pixels, order: str) -> bytes:
    """An uncompressed TIFF of three 16-bit colours, written by hand."""
    height, width, _ = pixels.shape
    data = pixels.astype(order + "u2").tobytes()
    values = {256: width, 257: height, 258: None, 259: 1, 262: 2, 273: None, 277: 3, 278: height, 279: len(data)}
    after = 8 + 2 + 12 * len(values) + 4
    values |= {258: after, 273: after + 6}
    fields = b""
    for tag, value in values.items():
        kind, count = (3, 3) if tag == 258 else (4, 1)
        fields += struct.pack(order + "HHII", tag, kind, count, value)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(values)) + fields + struct.pack(order + "IHHH", 0, 16, 16, 16) + data
