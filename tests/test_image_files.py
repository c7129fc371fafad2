"""Training and prediction read the same pixels, and turn images as Pillow does, for every kind of orientation metadata."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from pspnet_jax import image_files
from pspnet_jax.data import reader
from pspnet_jax.errors import UserError
from tests import fakes

decode_image = tf.function(reader.decode_image, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'

XMP_KEY, BIG_ENDIAN = b"XML:com.adobe.xmp\0\0\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"


def exif(tag):
    found = Image.Exif()
    found[0x0112] = tag
    return found


def saved(format, pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def with_chunk(png, kind, data, late):
    """Inserts a chunk before or after the pixels of a PNG."""
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    place = png.index(b"IEND" if late else b"IDAT") - 4
    return png[:place] + chunk + png[place:]


def raw_profile(tag):
    data = b"Exif\0\0" + exif(tag).tobytes().removeprefix(b"Exif\0\0")
    return b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(data):8}\n{data.hex()}\n".encode())


CARRIERS = {
    "exif.jpg": lambda tag: saved("JPEG", exif=exif(tag), quality=95),
    "xmp.jpg": lambda tag: saved("JPEG", xmp=XMP.format(tag).encode()),
    "big-endian.jpg": lambda tag: saved("JPEG", exif=BIG_ENDIAN + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, tag, 0, 0)),
    "mpo.jpg": lambda tag: saved("MPO", exif=exif(tag), save_all=True, append_images=[Image.fromarray(PIXELS[:20])]),
    "exif.png": lambda tag: saved("PNG", exif=exif(tag)),
    "late.png": lambda tag: with_chunk(saved("PNG"), b"eXIf", exif(tag).tobytes().removeprefix(b"Exif\0\0"), late=True),
    "raw.png": lambda tag: with_chunk(saved("PNG"), b"zTXt", raw_profile(tag), late=False),
    "late-raw.png": lambda tag: with_chunk(saved("PNG"), b"zTXt", raw_profile(tag), late=True),
    "xmp.png": lambda tag: with_chunk(saved("PNG"), b"iTXt", XMP_KEY + XMP.format(tag).encode(), late=False),
    "gray.jpg": lambda tag: saved("JPEG", PIXELS[..., 0], exif=exif(tag)),
    "exif.webp": lambda tag: saved("WEBP", exif=exif(tag), lossless=True),
    "tag.tif": lambda tag: saved("TIFF", exif=exif(tag)),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_an_image_is_turned_as_pillow_turns_it(tmp_path, name):
    """TensorFlow's decoder gives exactly the same pixels."""
    for tag in range(1, 9):
        contents = CARRIERS[name](tag)
        with Image.open(io.BytesIO(contents)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert expected.shape[:2] == ((56, 40) if tag >= 5 else (40, 56))
        (tmp_path / name).write_bytes(contents)
        np.testing.assert_array_equal(image_files.read(tmp_path / name), expected)
        assert image_files.sizes([tmp_path / name]) == [expected.shape[:2]]
        if name.endswith(("jpg", "png")):
            np.testing.assert_array_equal(decode_image(contents), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("data", [b"", b"II", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\x7f", b"nonsense" * 9])
def test_malformed_exif_is_ignored(tmp_path, data, late):
    for name, contents in (
        ("a.png", with_chunk(saved("PNG"), b"eXIf", data, late)),
        ("a.jpg", saved("JPEG", quality=95, exif=b"Exif\0\0" + data)),
        ("b.jpg", saved("JPEG", quality=95, exif=exif(9))),
    ):
        (tmp_path / name).write_bytes(contents)
        with Image.open(io.BytesIO(contents)) as image:
            expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(image_files.read(tmp_path / name), expected)
        np.testing.assert_array_equal(decode_image(contents), expected)


@pytest.mark.parametrize("quality", [30, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_of_a_jpeg_give_the_same_pixels(quality, subsampling, progressive):
    smooth = np.asarray(Image.fromarray(PIXELS[:5, :7]).resize((73, 61), Image.Resampling.BICUBIC))
    for pixels in (PIXELS, smooth):
        contents = saved("JPEG", pixels, quality=quality, subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(io.BytesIO(contents)))
        np.testing.assert_array_equal(decode_image(contents), expected)


def test_unsupported_images_are_errors(tmp_path, monkeypatch):
    files = {
        "cmyk.jpg": (lambda p: Image.fromarray(PIXELS).convert("CMYK").save(p), "is a CMYK image; convert it to RGB"),
        "deep.png": (
            lambda p: Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save(p),
            "has uint16 pixels, but dataset.image_dtype=.uint8.",
        ),
        "text.png": (lambda p: p.write_text("hello"), "its contents are not an image"),
        "empty.png": (lambda p: p.write_bytes(b""), "its contents are not an image"),
        "large.png": (
            lambda p: p.write_bytes(saved("PNG", np.zeros((80, 80), np.uint8))),
            "larger than the limit of 0 million pixels",
        ),
    }
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    for name, (write, expected) in files.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match=expected) as error:
            image_files.read(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path}/{name}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deep.png", "deep.jp2"])
def test_images_of_pillow_do_not_lose_bits_in_silence(tmp_path, name):
    cv2.imwrite(str(tmp_path / name), PIXELS.astype(np.uint16) * 257)
    deep = image_files.PixelFormat(3, "uint16")
    assert image_files.read(tmp_path / name, deep).max() > 255
    with (
        Image.open(tmp_path / name) as opened,
        pytest.raises(UserError, match="loses 8 of its 16 bits in Pillow; pass"),
    ):
        image_files.pixels(opened, name, deep)


def test_missing_pixels_are_an_error(tmp_path):
    for palette in (False, True):
        picture = Image.fromarray(PIXELS).quantize(9) if palette else Image.fromarray(PIXELS)
        picture.save(tmp_path / "a.png")
        image_files.read(tmp_path / "a.png")
        fakes.cut_pixels(tmp_path / "a.png")
        with pytest.raises(UserError, match=r"a.png: cannot be read as an image \(its pixels are damaged or end early"):
            image_files.read(tmp_path / "a.png")


SEVERAL = {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1])]}
ALPHA = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 9, np.uint8)])
INDEXED = Image.fromarray(PIXELS).quantize(4)
REMARKS = {
    "pages.tif": (lambda p: Image.fromarray(PIXELS).save(p, **SEVERAL), "contains several images"),
    "frames.gif": (lambda p: Image.fromarray(PIXELS).save(p, **SEVERAL), "contains several images"),
    "frames.webp": (lambda p: Image.fromarray(PIXELS).save(p, **SEVERAL), "contains several images"),
    "frames.png": (lambda p: Image.fromarray(PIXELS).save(p, **SEVERAL), "contains several images"),
    "phone.jpg": (lambda p: Image.fromarray(PIXELS).save(p, "MPO", **SEVERAL), ""),
    "alpha.png": (lambda p: Image.fromarray(ALPHA).save(p), "has a fourth channel"),
    "infrared.tif": (lambda p: Image.fromarray(ALPHA).save(p), "has a fourth channel"),
    "index.png": (lambda p: INDEXED.save(p, transparency=1), "has a fourth channel"),
    "opaque.png": (lambda p: Image.fromarray(PIXELS).convert("RGBA").save(p), ""),
    "plain.tif": (lambda p: Image.fromarray(PIXELS).save(p), ""),
}


@pytest.mark.parametrize("name", REMARKS)
def test_ignored_content_is_reported_once(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(image_files, "_warned", set())
    write, remark = REMARKS[name]
    write(tmp_path / name)
    with caplog.at_level("WARNING", "pspnet_jax"):
        images = [image_files.read(tmp_path / name) for _ in range(2)]
    assert [message.startswith(f"{tmp_path}/{name}: {remark}") for message in caplog.messages] == [True] * bool(remark)
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(images, [np.asarray(image.convert("RGB"))] * 2)
