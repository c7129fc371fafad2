"""Every file format, pixel type and number of channels is read exactly as it was written, or refused in one sentence."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from tifffile import _imagecodecs

from pspnet_jax import image_files, large_files
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import PixelFormat


def array(channels, dtype):
    """Returns random pixels [40,56,channels] over the whole range of an integer type, or normally distributed ones."""
    generator = np.random.default_rng(channels)
    if dtype == "float32":
        return generator.standard_normal((40, 56, channels), np.float32)
    return generator.integers(0, np.iinfo(dtype).max, (40, 56, channels), dtype, endpoint=True)


def with_pillow(kind, image, **options):
    file = io.BytesIO()
    Image.fromarray(image if image.shape[2] > 1 else image[..., 0]).save(file, kind, **options)
    return file.getvalue()


def with_opencv(ending, image, *options):
    done, contents = cv2.imencode(ending, image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] > 1 else image, options)
    assert done
    return np.asarray(contents).tobytes()


def with_tifffile(image, planes=False, **options):
    file = io.BytesIO()
    layout = {"planarconfig": "separate" if planes else "contig"} if image.shape[2] > 1 else {}
    pixels = np.moveaxis(image, -1, 0) if planes else image
    tifffile.imwrite(file, pixels if layout else image[..., 0], photometric="minisblack", **layout, **options)
    return file.getvalue()


def hide_imagecodecs(monkeypatch):
    """Makes tifffile do without this optional package."""
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", _imagecodecs)
    for codecs in (tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS):
        monkeypatch.setattr(codecs, "_codecs", {1: codecs[1]})


LOSSLESS_JP2 = (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000)
WRITERS = {  # by format: (writer, numbers of channels, pixel types)
    "png": (lambda image: with_opencv(".png", image), (1, 3, 4), ("uint8", "uint16")),
    "jp2": (lambda image: with_opencv(".jp2", image, *LOSSLESS_JP2), (1, 3, 4), ("uint8", "uint16")),
    "lzw.tif": (lambda image: with_opencv(".tif", image), (1, 3, 4), ("uint8", "uint16", "float32")),
    "webp": (lambda image: with_pillow("WEBP", image, lossless=True, exact=True), (3, 4), ("uint8",)),
    "bmp": (lambda image: with_pillow("BMP", image), (1, 3), ("uint8",)),
    "la.png": (lambda image: with_pillow("PNG", image), (2,), ("uint8",)),
    "rgb.tif": (lambda image: with_pillow("TIFF", image, compression="tiff_lzw"), (1, 3), ("uint8",)),
    "bands.tif": (with_tifffile, range(1, 17), image_files.DTYPES),
    "planes.tif": (lambda image: with_tifffile(image, planes=True), (2, 3, 4, 5), image_files.DTYPES),
    "zlib.tif": (lambda image: with_tifffile(image, compression="zlib"), (1, 4, 5), image_files.DTYPES),
}


@pytest.mark.parametrize("imagecodecs", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_pixels_are_read_as_they_were_written(monkeypatch, name, imagecodecs):
    if not imagecodecs:
        hide_imagecodecs(monkeypatch)
    write, channels, dtypes = WRITERS[name]
    for expected in (PixelFormat(c, dtype) for c in channels for dtype in dtypes):
        image = array(*expected)
        contents = write(image)
        assert image_files.read_header(io.BytesIO(contents))[1:4] == ((40, 56), 1, expected)
        found = image_files.decode(contents, name, expected)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, image, f"{name} {expected}")


@pytest.mark.parametrize("dtype", image_files.DTYPES)
def test_alpha_does_not_change_the_other_channels_of_an_lzw_tiff(dtype):
    """OpenCV would multiply them by it if they have 8 bits."""
    image, file = array(4, dtype), io.BytesIO()
    tifffile.imwrite(file, image, photometric="rgb", extrasamples=["unassalpha"], compression="lzw")
    np.testing.assert_array_equal(image_files.decode(file.getvalue(), "lzw.tif", PixelFormat(4, dtype)), image)


def test_a_gif_is_read_in_its_colors():
    colors, indices = array(1, "uint8")[:3, :16, 0].T, array(1, "uint8")[..., 0] % 16
    picture = Image.fromarray(indices)
    picture.putpalette(colors.tobytes())
    file = io.BytesIO()
    picture.save(file, "GIF")
    np.testing.assert_array_equal(image_files.decode(file.getvalue(), "a.gif"), colors[indices])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_gray_is_repeated_and_a_fourth_channel_ignored_for_three_channels(dtype):
    for name in ("png", "bands.tif"):
        write, rgb = WRITERS[name][0], PixelFormat(3, dtype)
        gray, four = array(1, dtype), array(4, dtype)
        np.testing.assert_array_equal(image_files.decode(write(gray), name, rgb), gray.repeat(3, 2))
        np.testing.assert_array_equal(image_files.decode(write(four), name, rgb), four[..., :3])
    if dtype == "uint8":
        gray = image_files.decode(WRITERS["la.png"][0](array(2, dtype)), "la.png", PixelFormat(1))
        np.testing.assert_array_equal(gray, array(2, dtype)[..., :1])


def test_an_orientation_tag_turns_images_of_every_type(monkeypatch):
    """Also where tifffile cannot read the compression, and OpenCV would turn the image by itself."""
    for dtype in image_files.DTYPES:
        image = array(4, dtype)
        contents = with_tifffile(image, extratags=[(274, "H", 1, 6, True)])
        np.testing.assert_array_equal(image_files.decode(contents, "a.tif", PixelFormat(4, dtype)), np.rot90(image, -1))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(array(1, "uint16")[..., 0]).save(file, "PNG", exif=exif)
    found = image_files.decode(file.getvalue(), "a.png", PixelFormat(1, "uint16"))
    np.testing.assert_array_equal(found, np.rot90(array(1, "uint16"), -1))
    hide_imagecodecs(monkeypatch)
    file = io.BytesIO()
    Image.fromarray(array(1, "uint16")[..., 0]).save(file, "TIFF", compression="tiff_lzw", tiffinfo={274: 3})
    with pytest.raises(UserError, match="is compressed by LZW, which needs one more package: pip install"):
        image_files.decode(file.getvalue(), "a.tif", PixelFormat(1, "uint16"))


def test_a_compression_that_needs_another_package_is_named(tmp_path, monkeypatch):
    bands = with_tifffile(np.repeat(array(1, "uint16"), 5, 2), compression="zstd")
    (tmp_path / "a.tif").write_bytes(bands)
    hide_imagecodecs(monkeypatch)
    sentence = r'is compressed by ZSTD, which needs one more package: pip install "pspnet_jax\[tiff\]"'
    with pytest.raises(UserError, match=sentence):
        image_files.decode(bands, "a.tif", PixelFormat(5, "uint16"))
    large = large_files.LargeTiff(tmp_path / "a.tif", lambda stored: stored, (5,), "uint16")
    with pytest.raises(UserError, match=rf"a.tif: {sentence}"):
        large[:4, :4]


REFUSED = [  # expected format, contents, sentence
    (
        (3, "uint8"),
        lambda: with_tifffile(array(3, "uint16")),
        "it has uint16 pixels, but dataset.image_dtype='uint8'; convert it, or train with dataset.image_dtype='uint16'",
    ),
    ((3, "uint8"), lambda: with_opencv(".jp2", array(3, "uint16")), "it has uint16 pixels, but"),
    ((3, "uint16"), lambda: with_opencv(".png", array(3, "uint8")), "it has uint8 pixels, but dataset.image_dtype='uint16'"),
    (
        (3, "uint8"),
        lambda: with_tifffile(array(3, "uint8").astype(np.int16)),
        "it has int16 pixels, but dataset.image_dtype='uint8'; convert it)",
    ),
    (
        (4, "uint8"),
        lambda: with_pillow("JPEG", array(3, "uint8")),
        "it has 3 channels, but model.channels=4; convert it, or train with model.channels=3",
    ),
    ((1, "uint8"), lambda: with_pillow("BMP", array(3, "uint8")), "it has 3 channels, but model.channels=1"),
    ((3, "uint8"), lambda: with_tifffile(array(5, "uint8")), "it has 5 channels, but model.channels=3"),
    ((2, "uint16"), lambda: with_tifffile(array(1, "uint16")), "it has 1 channel, but model.channels=2"),
    ((1, "float32"), lambda: with_tifffile(np.full((4, 5, 1), np.nan, np.float32)), "it has pixels that are not finite (NaN)"),
    ((4, "uint16"), lambda: with_tifffile(array(4, "uint16"))[:9000], ""),
    ((4, "uint16"), lambda: with_opencv(".png", array(4, "uint16"))[:9000], "its pixels are damaged or end early"),
    ((5, "uint8"), lambda: b"II*\0", ""),
]


@pytest.mark.parametrize(("expected", "contents", "sentence"), REFUSED)
def test_other_pixels_are_refused(tmp_path, expected, contents, sentence):
    (tmp_path / "a.img").write_bytes(contents())
    with pytest.raises(UserError) as error:
        image_files.read(tmp_path / "a.img", PixelFormat(*expected))
    assert str(error.value).startswith(f"{tmp_path}/a.img: cannot be read as an image ({sentence}")
    assert "\n" not in str(error.value)


def test_a_big_endian_image_in_memory_is_read_as_its_file(tmp_path):
    image = array(1, "uint16")
    (tmp_path / "a.tif").write_bytes(with_tifffile(image, byteorder=">"))
    with Image.open(tmp_path / "a.tif") as opened:
        found = image_files.pixels(opened, "a.tif", PixelFormat(1, "uint16"))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, image)
