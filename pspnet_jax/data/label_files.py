"""Label files in any supported form as class indices, according to dataset.label_map.

| file | values |
| --- | --- |
| PNG, TIFF, GIF, BMP | gray values as stored, palette indices, or colors; 1-bit files have 0 and 1 |
| .npy, .mat | whole numbers [H,W], or colors uint8[H,W,3]; the only such array of a .mat, or its only struct's Segmentation |
| labelme's or COCO's .json | categories of polygons, see polygons.py |

The value v and the color (v, v, v) are the same. If a map has colors, the colors of a palette count, and not its indices.
"""

import functools
import io
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
import scipy.io
from ml_collections import ConfigDict
from PIL import ExifTags, Image, UnidentifiedImageError

from pspnet_jax import datasets, image_files, label_maps, polygons
from pspnet_jax.datasets import IGNORE, WRONG
from pspnet_jax.errors import UserError

SMALL_GRAYS = {"L;2": 85, "L;4": 17}  # Pillow multiplies the values of these pixel formats
_DEEP_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
# Bit depth and color type in the headers of PNGs that OpenCV decodes: 8-bit gray and RGB, in half of Pillow's time, and 16-bit
# RGB, RGBA and gray with alpha, of which Pillow drops bits.
BY_OPENCV = {b"\x08\x00": cv2.IMREAD_GRAYSCALE, b"\x08\x02": cv2.IMREAD_COLOR_RGB}
BY_OPENCV |= {b"\x10\x02": _DEEP_RGB, b"\x10\x06": _DEEP_RGB, b"\x10\x04": cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH}
PIECES = ExifTags.Base.StripByteCounts, ExifTags.Base.TileByteCounts
MAX_LISTED = 8  # keys of a map in a message


class WrongValues(UserError):
    """A label has values that are no classes. If one file has them, probably all do."""


class LabelReader:
    """Reads label files as classes.

    Attributes:
      classes: the class, or IGNORE, of each value, (R, G, B) color, and polygon category.
      keep_indices: whether the values of a label with a palette are its indices, and not its colors.
    """

    def __init__(self, classes: Mapping[label_maps.Key, int], num_classes: int = 0):
        """Prepares tables. `num_classes` is K if there is no map, as the values are class indices; then messages differ."""
        self.classes, self._num_classes = classes, num_classes
        self._values = np.full(2**16, WRONG, np.uint8)
        values = {key[0]: found for key, found in classes.items() if isinstance(key, tuple) and len(set(key)) == 1}
        values |= {key: found for key, found in classes.items() if isinstance(key, int) and 0 <= key < 2**16}
        self._values[[*values]] = [*values.values()]
        self.keep_indices = not any(isinstance(key, tuple) for key in classes)

    @functools.cached_property
    def _colors(self) -> np.ndarray:
        """uint8[2**24], the class of each color (B << 16) + (G << 8) + R."""
        table = np.full(2**24, WRONG, np.uint8)
        table[np.arange(256) * 0x010101] = self._values[:256]
        for color in (key for key in self.classes if isinstance(key, tuple)):
            table[color[0] + (color[1] << 8) + (color[2] << 16)] = self.classes[color]
        return table

    def read(self, label_file: str | bytes, image_file: str | bytes, contents: bytes) -> np.ndarray:
        """Returns uint8[H,W]: class indices and IGNORE.

        Args:
          label_file, image_file: paths.
          contents: of the label file; unused for .json.

        Raises:
          WrongValues: the map lacks a value, color or category.
          Exception: whatever a decoder raises for a damaged file.
        """
        label_file, image_file = (path.decode() if isinstance(path, bytes) else path for path in (label_file, image_file))
        if label_file.lower().endswith(".json"):
            return polygons.read(label_file, image_file).paint(self._class_of_category)
        return self.to_classes(decode(label_file, contents, self.keep_indices))

    def _class_of_category(self, category: str) -> int:
        if category not in self.classes and category != polygons.BACKGROUND:
            raise WrongValues(f"has polygons of {category!r}, which is not in {self._known(str)}")
        return self.classes.get(category, IGNORE)

    def to_classes(self, label: np.ndarray) -> np.ndarray:
        """Returns uint8[H,W], as `read` does, of whole numbers [H,W] or colors uint8[H,W,3]."""
        classes = self._look_up(label)
        if (wrong := classes == WRONG).any():
            raise WrongValues(self._problem(label[wrong]))
        return classes

    def _look_up(self, label: np.ndarray) -> np.ndarray:
        if label.ndim == 3:
            return self._colors.take(cv2.cvtColor(label, cv2.COLOR_RGB2RGBA).view("<u4")[..., 0] & 0xFFFFFF)
        if label.dtype == np.uint8:
            return cv2.LUT(label, self._values[:256])
        if label.size and label.min() >= 0 and label.max() < 2**16:
            return self._values[label]
        values, inverse = np.unique(label, return_inverse=True)
        return np.array([self.classes.get(int(value), WRONG) for value in values], np.uint8)[inverse].reshape(label.shape)

    def _problem(self, label: np.ndarray) -> str:
        """Returns a sentence about the first of some pixels, values [n] or colors [n,3] that the map lacks."""
        if self._num_classes and label.ndim == 1 and (values := label[(label >= 0) & (label < IGNORE)]).size:
            return str(datasets.label_problem(np.bincount(values.astype(np.uint8), minlength=256), self._num_classes))
        first = label[0].tolist()
        what, kind = (f"color RGB {tuple(first)}", tuple) if label.ndim == 2 else (f"value {first}", int)
        count = int((label == label[0]).reshape(len(label), -1).all(axis=1).sum())
        return f"label {what} at {count} pixels is not in {self._known(kind)}"

    def _known(self, kind: type) -> str:
        keys = [key for key in self.classes if isinstance(key, kind)] or list(self.classes)
        more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
        listed = f"{', '.join(map(repr, keys[:MAX_LISTED]))}{more}"
        if self._num_classes:
            return f"the classes, {listed}; set dataset.label_map, with the class of each, or None (ignored)"
        return f"dataset.label_map, which has {listed}; add it, with its class or None (ignored)"


def reader(dataset: ConfigDict, class_names: Sequence[str], files: Sequence[str]) -> LabelReader | None:
    """Returns the reader of a folder's label files; None if they are PNGs of class indices, which TensorFlow reads faster.

    Raises:
      UserError: dataset.label_map is not valid, or has other classes.
    """
    entries = label_maps.read(dataset) if dataset.name == "folder" else {}
    plain = not entries and dataset.ignore_index == IGNORE and all(file.lower().endswith(".png") for file in files)
    if dataset.name != "folder" or plain:
        return None
    if len(class_names) > WRONG:
        raise UserError(f"dataset.label_map: expected at most {WRONG} classes, not {len(class_names)}")
    index_of = {name.strip().lower(): index for index, name in enumerate(class_names)}
    if not entries:
        own = {value: value for value in range(len(class_names))} | {dataset.ignore_index: IGNORE}
        return LabelReader(own | {name: index for index, name in enumerate(class_names)}, len(class_names))
    classes = {}
    for key, value in entries.items():
        found = IGNORE if value is None else value if isinstance(value, int) else index_of.get(value.strip().lower(), -1)
        if found != IGNORE and not 0 <= found < len(class_names):
            raise UserError(f"dataset.label_map: {key!r} is class {value!r}, which is none of {', '.join(class_names)}")
        classes[key] = found
    return LabelReader(classes)


def decode(file: str, contents: bytes, keep_indices: bool) -> np.ndarray:
    """Returns whole numbers [H,W], or colors uint8[H,W,3]; the indices of a palette, or its colors."""
    kind = file.lower().rsplit(".", 1)[-1]
    if kind == "npy":
        label = np.load(io.BytesIO(contents), allow_pickle=False)
    elif kind == "mat":
        label = _array_of_mat(contents)
    else:
        label = decode_image(contents, keep_indices)
    return normalize(label)


def normalize(label: np.ndarray) -> np.ndarray:
    """Returns whole numbers [H,W] or colors uint8[H,W,3] of an array that may have another type, alpha or an axis too many."""
    if not label.size:
        raise UserError("has no pixels")
    if label.ndim == 3 and label.shape[2] in (3, 4) and label.dtype in (np.uint8, np.uint16) and label.max(initial=0) < 256:
        return np.ascontiguousarray(label[..., :3], np.uint8)
    if label.ndim == 3 and 1 in (label.shape[0], label.shape[2]):
        label = label[..., 0] if label.shape[2] == 1 else label[0]
    if label.ndim != 2 or label.dtype.kind not in "biuf":
        raise UserError(f"is {label.dtype}{list(label.shape)}; expected whole numbers [H, W] or colors uint8[H, W, 3]")
    if label.dtype.kind == "f":
        if (fractions := label[label != np.rint(label)]).size:
            raise UserError(f"has value {fractions[0]}; expected whole numbers")
        return label.astype(np.int64)
    return label.astype(np.uint8) if label.dtype.kind == "b" else label


def decode_image(contents: bytes, keep_indices: bool) -> np.ndarray:
    """Returns the values [H,W] or colors uint8[H,W,3] of an image file; the indices of a palette, or its colors."""
    if contents.startswith(b"\x89PNG") and (flag := BY_OPENCV.get(contents[24:26])) is not None:
        label = cv2.imdecode(np.frombuffer(contents, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if label is None:
            raise ValueError(image_files.CUT_SHORT)
        return label
    if contents[:4] in image_files.TIFF and needs_tifffile(contents):
        return image_files.decode_tiff(contents, image_files.read_header(io.BytesIO(contents)), "")
    with Image.open(io.BytesIO(contents)) as image:
        varies = [low != high for low, high in image.getextrema()] if image.mode == "RGBA" else []  # type: ignore[misc]
        if varies == [False, False, False, True]:
            raise UserError("has one color, and its shape is in the transparency; save it without transparency")
        if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr") or (image.mode == "P" and not keep_indices):
            return np.asarray(image.convert("RGB"))
        scale = SMALL_GRAYS.get(image_files.raw_mode(image), 1)
        stored: np.ndarray = np.asarray(image.getchannel("L") if image.mode == "LA" else image)
        white_is_0 = image.format == "TIFF" and image.getexif().get(ExifTags.Base.PhotometricInterpretation) == 0
        if white_is_0 and image.mode in ("1", "L"):
            stored = ~stored  # Pillow returns the complement of the stored values
        return stored if scale == 1 else stored // np.uint8(scale)


def needs_tifffile(contents: bytes) -> bool:
    """Returns whether Pillow cannot read a TIFF, drops bits of its colors, or does not fill pieces that are not stored.

    Raises:
      UserError: it has several pages, and not only overviews or a mask of the first.
    """
    try:
        with Image.open(io.BytesIO(contents)) as image:
            tags, size = dict(image.tag_v2), image.size  # type: ignore[attr-defined]
            if (pages := getattr(image, "n_frames", 1)) > 1:
                image.seek(1)
                if image.size == size and not image.tag_v2.get(ExifTags.Base.NewSubfileType, 0):  # type: ignore[attr-defined]
                    raise UserError(f"has {pages} pages; save one label of class indices")
        deep = image.mode in ("RGB", "RGBA") and max(tags[ExifTags.Base.BitsPerSample]) > 8
        return deep or (image.mode != "P" and any(0 in tags.get(code, ()) for code in PIECES))
    except UnidentifiedImageError:
        return True


def palette(image: Image.Image, values: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Returns the colors of some values of an image with a palette; {} without one."""
    colors = image.getpalette() or [] if image.mode == "P" else []
    return {value: tuple(colors[3 * value : 3 * value + 3]) for value in values if 3 * value < len(colors)}


def _array_of_mat(contents: bytes) -> np.ndarray:
    found = scipy.io.loadmat(io.BytesIO(contents))
    structs = [
        value for value in found.values() if isinstance(value, np.ndarray) and "Segmentation" in (value.dtype.names or ())
    ]
    if len(structs) == 1 and structs[0].size == 1:  # as in SBD and CrackForest
        return structs[0].item()[structs[0].dtype.names.index("Segmentation")]
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray) and min(value.shape[:2]) > 1}
    if len(arrays) != 1:
        raise UserError(f"has {len(arrays)} arrays ({', '.join(arrays)}); expected one, the label")
    return next(iter(arrays.values()))
