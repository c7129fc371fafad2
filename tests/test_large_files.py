"""Windows of TIFFs equal those of the whole image, and labels are written by tiles, with the georeference."""

import itertools
import warnings

import numpy as np
import pytest
import tifffile

from pspnet_jax import image_files, large_files
from pspnet_jax.data import label_files
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import PixelFormat
from pspnet_jax.large_files import LargeTiff, open_image, write_labels

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 217, 3), dtype=np.uint8)
WINDOWS = [np.s_[0:300, 0:217], np.s_[37:161, 64:65], np.s_[64:128, 200:217], np.s_[5:5, 0:9]]


def unchanged(pixels):
    return pixels


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (64, 64)},
        {"tile": (32, 64), "compression": "zlib", "predictor": 2},
        {"tile": (64, 64), "planarconfig": "separate"},
        {"rowsperstrip": 50, "compression": "lzw"},
        {},  # one strip
    ],
)
def test_windows_equal_those_of_the_whole_image(tmp_path, options):
    stored = np.moveaxis(PIXELS, -1, 0) if "planarconfig" in options else PIXELS
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", bigtiff=True, **options)
    image = LargeTiff(tmp_path / "a.tif", unchanged, (3,))
    assert (image.shape, image.dtype, image.ndim) == (PIXELS.shape, np.uint8, 3)
    for window in WINDOWS:
        np.testing.assert_array_equal(image[window], PIXELS[window])
    np.testing.assert_array_equal(np.asarray(image), PIXELS)
    np.testing.assert_array_equal(np.concatenate(list(image.strips())), PIXELS)


def test_jpeg_tiles_are_those_that_tifffile_decodes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="ycbcr", tile=(64, 64), compression="jpeg")
    whole = tifffile.imread(tmp_path / "a.tif")
    for window in WINDOWS:
        np.testing.assert_array_equal(LargeTiff(tmp_path / "a.tif", unchanged, (3,))[window], whole[window])


def test_windows_are_converted(tmp_path):
    """A label of one channel, whose values are replaced; tiles that are not stored are 0."""
    values = np.arange(256, dtype=np.uint8)[::-1]
    label = np.where(np.arange(300)[:, None] // 64 == 1, 0, PIXELS[..., 0]).astype(np.uint8)
    padded = np.pad(label, ((0, 20), (0, 39)))
    corners = itertools.product(range(0, 300, 64), range(0, 217, 64))
    tiles = (None if y == 64 else padded[y : y + 64, x : x + 64] for y, x in corners)
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=label.shape, dtype=np.uint8, tile=(64, 64), compression="zlib")
    found = LargeTiff(tmp_path / "a.tif", lambda stored: values[stored[..., 0]])
    assert found.shape == label.shape
    np.testing.assert_array_equal(found[10:290, 3:], 255 - label[10:290, 3:])


def test_what_cannot_be_read_by_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(large_files, "MAX_PIECE", 30_000)
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", rowsperstrip=200)
    with pytest.raises(UserError, match=r"a.tif: is stored in strips of 200 rows, .* with gdal_translate -co TILED=YES"):
        LargeTiff(tmp_path / "a.tif", unchanged, (3,))
    tifffile.imwrite(tmp_path / "b.tif", PIXELS, photometric="rgb", tile=(64, 64), extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(UserError, match=r"b.tif: is not upright; turn it"):
        LargeTiff(tmp_path / "b.tif", unchanged)


def test_pixels_that_are_not_finite_are_refused_where_they_are_read(tmp_path):
    pixels = np.zeros((128, 128), np.float32)
    pixels[100, 100] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64))
    image = large_files.open_image(tmp_path / "a.tif", PixelFormat(1, "float32"))
    assert not image[:64, :64].any()
    with pytest.raises(UserError, match=r"a.tif: has pixels that are not finite"):
        image[64:, 64:]


def test_large_files_are_tiffs_with_more_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.TIF", PIXELS, photometric="rgb")
    (tmp_path / "b.tif").write_bytes(b"II*\0")
    assert large_files.is_large(tmp_path / "a.TIF", 300 * 217 - 1)
    assert not large_files.is_large(tmp_path / "a.TIF", 300 * 217)
    assert not large_files.is_large(tmp_path / "b.tif", 0)
    assert not large_files.is_large(tmp_path / "c.png", 0)


def test_labels_are_written_in_tiles(tmp_path):
    """1,100 x 700 labels in bands of uneven heights; the palette has the colors; nothing is left of a failed attempt."""
    label = np.random.default_rng(1).integers(0, 3, (1100, 700), dtype=np.uint8)
    bands = np.split(label, [3, 600, 601, 1099])
    colors = [(255, 0, 1), (2, 3, 4), (0, 128, 0)]
    write_labels(tmp_path / "a.tif", bands, label.shape, colors, "made by me", [])
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        page = tiff.pages.first
        assert (tiff.is_bigtiff, page.tile, page.compression, page.description) == (True, (512, 512), 8, "made by me")
        np.testing.assert_array_equal(page.asarray(), label)
        np.testing.assert_array_equal(page.colormap[:, :3].T // 257, colors)

    def fail():
        yield bands[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_labels(tmp_path / "b.tif", fail(), label.shape, colors, "", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_the_georeference_is_kept(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 400_000, 0, -0.5, 5_800_000)}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=217, height=300, count=3, dtype="uint8", tiled=True, **place
    ) as file:
        file.write(np.moveaxis(PIXELS, -1, 0))
    image = LargeTiff(tmp_path / "a.tif", unchanged, (3,))
    np.testing.assert_array_equal(image[10:200, 30:90], PIXELS[10:200, 30:90])
    write_labels(tmp_path / "b.tif", [PIXELS[..., 0]], (300, 217), [(1, 2, 3)], "", image.georeference)
    with rasterio.open(tmp_path / "b.tif") as file:
        assert (file.crs, file.transform) == (rasterio.CRS.from_string(place["crs"]), place["transform"])
        np.testing.assert_array_equal(file.read(1), PIXELS[..., 0])


@pytest.mark.parametrize("compression", ["none", "deflate", "lzw"])
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("uint16", 4)])
def test_pieces_that_a_sparse_file_does_not_store_have_its_nodata_value(tmp_path, compression, dtype, channels):
    """As GDAL writes it with SPARSE_OK=TRUE, and reads it."""
    rasterio = pytest.importorskip("rasterio")
    stored = np.random.default_rng(0).integers(0, 256, (16, 16, channels), dtype)
    stored = stored[..., 0] if channels == 1 else stored
    shape = (32, 32, *stored.shape[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no georeference
        kind = {
            "driver": "GTiff",
            "height": 32,
            "width": 32,
            "count": channels,
            "dtype": dtype,
            "nodata": 7,
            "compress": compression,
        }
        with rasterio.open(tmp_path / "a.tif", "w", tiled=True, blockxsize=16, blockysize=16, SPARSE_OK=True, **kind) as file:
            file.write(np.moveaxis(np.atleast_3d(stored), -1, 0), window=rasterio.windows.Window(16, 0, 16, 16))
    expected = np.full(shape, 7, dtype)
    expected[:16, 16:] = stored
    pixel_format = PixelFormat(channels, dtype)
    assert np.array_equal(image_files.read(tmp_path / "a.tif", pixel_format), pixel_format.fit(expected))
    assert np.array_equal(open_image(tmp_path / "a.tif", pixel_format)[:, :], pixel_format.fit(expected))
    if dtype == "uint8":
        assert np.array_equal(label_files.decode("a.tif", (tmp_path / "a.tif").read_bytes(), True), expected)
