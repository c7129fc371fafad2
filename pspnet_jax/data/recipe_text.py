"""The recipe for a folder that survey_folder.py has looked at: every guess is a line with a comment."""

import collections
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from pspnet_jax import config as configs
from pspnet_jax import image_files, large_files
from pspnet_jax.data import discover, label_values
from pspnet_jax.data.survey_folder import Folder, Found
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import RGB8, PixelFormat

Line = tuple[str, Any, str]  # a field of the config, its value, and a comment
MEASURED = 20  # images whose pixels are read
BATCH, EPOCHS, STEPS = 8, 50, (200, 20_000)
CROPS = 49, 321  # smallest and largest side of a crop
PART = 4096  # height and width of what is measured of a large TIFF
LARGE = 1024  # long side in pixels beyond which photos are reduced
MAPS = (".tif", ".tiff", ".jp2")  # formats of images that are not photos, so that small objects are not reduced
TEMPLATE = '''"""Written by --mode check --input {root}

python -m pspnet_jax.main --config {file}

The comments say what was found, and how it was understood. Check the lines with GUESS first.
"""

from ml_collections import ConfigDict

from pspnet_jax.config import base_config

LABELS = {{  # in the label files: class, or None for pixels that are ignored
{labels}
}}


def get_config() -> ConfigDict:
    config = base_config()
{fields}
    config.dataset.label_map = {label_map}
    return config
'''


def lines(folder: Folder, found: Found, name: str) -> list[Line]:
    """Returns the fields of the recipe `name` for a folder, with comments; all but the label map."""
    read = [_header(image) for image, _ in label_values.sample([*dict.fromkeys(found.pairs)])]
    headers, damaged = [one for one in read if not isinstance(one, str)], [one for one in read if isinstance(one, str)]
    if not headers:
        raise UserError(damaged[0])
    sizes = sorted(header.upright_size for header in headers)
    steps = int(np.clip(EPOCHS * next(iter(found.counts.values())) / BATCH, *STEPS))
    pixels, expected = _pixel_lines(found, headers, damaged)
    return [
        ("name", name, "runs are saved in runs/<name>"),
        ("dataset.root", folder.root, ""),
        *_file_lines(found, headers),
        *_split_lines(found),
        *_skip_lines(found, headers, damaged, expected),
        *pixels,
        ("model.depth", 18, "50 takes about four times as long, and is better"),
        ("model.stem", "conv7", "torchvision's; with config.init_from = 'hf://timm/resnet18.tv_in1k', less data is needed"),
        ("batch_size", BATCH, "over all devices"),
        ("total_steps", steps, f"about {EPOCHS} epochs, but {STEPS[0]:,} to {STEPS[1]:,} steps"),
        ("optimizer.learning_rate", 0.05, "from random weights; with init_from 0.01, and head_multiplier 10"),
        ("optimizer.head_multiplier", 1.0, ""),
        *_size_lines(found, sizes),
        ("every.log", 20, ""),
        ("every.eval", steps // 5, ""),
        ("every.save", steps // 5, ""),
    ]


def render(folder: Folder, found: Found, fields: Sequence[Line], entries: Sequence[label_values.Entry], file: str) -> str:
    """Returns the text of a recipe, which will be in `file`."""
    label_map = "str(LABELS)"
    if label_values.is_smoothed(found.values.shares):
        label_map = "str({value: LABELS[0 if value < 128 else 255] for value in range(256)})  # the grays between are edges"
    return TEMPLATE.format(
        root=_one_line(folder.root),
        file=_one_line(file),
        label_map=label_map,
        labels="\n".join(f"    {key!r}: {name!r},  # {_one_line(remark)}" for key, name, remark in entries),
        fields="\n".join(
            f"    config.{field} = {value!r}" + f"  # {_one_line(remark)}" * bool(remark) for field, value, remark in fields
        ),
    )


def _one_line(text: str) -> str:
    """Returns a text that cannot end a comment or docstring: names of files may contain anything."""
    return " ".join(text.split()).replace("\\", "/").replace('"', "'")


def _header(file: str) -> image_files.Header | str:
    """Returns the header of an image, or why it cannot be read."""
    try:
        if large_files.is_large(file):
            return large_files.LargeTiff(file, lambda stored: stored).header
        with epath.Path(file).open("rb") as opened:
            return image_files.read_header(opened)
    except Exception as error:  # whatever a decoder raises
        return f"{file}: cannot be read as an image ({image_files.reason(error)})"


def _file_lines(found: Found, headers: Sequence[image_files.Header]) -> list[Line]:
    """Returns the lines about the files of images and labels."""
    values, first = found.values, found.pairs[0][0]
    kinds = collections.Counter((header.kind, *header.stored) for header in headers).most_common()
    images = [f"{number} {kind} of {channels} channel(s), {dtype}" for (kind, channels, dtype), number in kinds]
    labels = [f"{values.read:,} of {values.of:,} labels were read"] if values.read < values.of else []
    labels += found.hints if not found.alone else []  # otherwise with those, see `_skip_lines`
    if found.pairs[0][1].lower().endswith((".jpg", ".jpeg")) and not label_values.is_smoothed(values.shares):
        labels.append("GUESS: JPEG usually changes values; save labels as PNG")
    if (frames := image_files.count_frames(first)) > 1:
        images.append(f"GUESS: only the first of {frames} images in {first} is used")
    for remarks, others in zip((images, labels), found.alternatives, strict=True):
        remarks += [f"GUESS: {', '.join(map(repr, others[:5]))} would fit, too"] if others else []
    dataset, of_images, of_labels = found.dataset, "; ".join(images), "; ".join(labels)
    if dataset.split_file and dataset.images == configs.base_config().dataset.images:  # a list names the files
        return [("dataset.split_file", dataset.split_file, "; ".join(images + labels))]
    return [("dataset.images", dataset.images, of_images), ("dataset.labels", dataset.labels, of_labels)]


def _skip_lines(
    found: Found, headers: Sequence[image_files.Header], damaged: Sequence[str], expected: PixelFormat
) -> list[Line]:
    """Returns a line that leaves out files that cannot be used; none if there are none."""
    misfits = sum(expected.problem(header.stored) is not None for header in headers)
    alone = "; ".join([f"{len(found.alone):,} file(s) without a partner, such as {next(iter(found.alone), '')}", *found.hints])
    reasons = [alone] if found.alone else []
    reasons += [f"{misfits:,} image(s) that are not {expected.dtype} of {expected.channels} channels"] if misfits else []
    for kind, files in (("image(s)", damaged), ("label(s)", found.values.damaged)):
        reasons += [f"{len(files):,} {kind}: {files[0]}"] if files else []
    return [("dataset.on_error", "skip", f"GUESS: leaves out {'; '.join(reasons)}")] if reasons else []


def _split_lines(found: Found) -> list[Line]:
    dataset, pairs = found.dataset, [f"{number:,} pair{'s' * (number > 1)}" for number in found.counts.values()]
    held_out = pairs[1] if len(pairs) > 1 else "GUESS: the training images again, as nothing is left for validation; label more"
    if discover.use_of(found.val_split) == "test":
        held_out += "; GUESS: those for the test, as none are for validation"
    return [
        ("dataset.train_split", dataset.train_split, f"{pairs[0]}; {found.reason}"),
        ("eval.split", found.val_split, held_out),
        *(
            (f"dataset.{field}", dataset[field], "")
            for field in ("split_file", "split_fraction", "split_seed")
            if dataset[field]
        ),
    ]


def _pixel_lines(found: Found, headers: Sequence[image_files.Header], damaged: list[str]) -> tuple[list[Line], PixelFormat]:
    """Returns the lines about channels and their values, none for 8-bit RGB or gray, and the format of the images.

    Adds to `damaged` why images cannot be read.
    """
    channels, dtype = collections.Counter(header.stored for header in headers).most_common(1)[0][0]
    bands = {2: "with 3, the second is ignored", 4: "with 3, the fourth is ignored"}.get(channels, "")
    remark = f"GUESS: all bands; {bands}" if bands else ""
    is_tiff = headers[0].kind == "TIFF"  # others have gray or color, possibly with transparency
    channels = channels if channels > 4 or (bands and is_tiff) else 3
    expected = PixelFormat(channels, dtype)
    if expected == RGB8:
        return [], expected
    sampled = [(image, _header(image)) for image, _ in label_values.sample(found.pairs, MEASURED)]
    fitting = [image for image, header in sampled if not isinstance(header, str) and not expected.problem(header.stored)]
    images = []
    for image in fitting:
        try:
            images.append(_pixels(image, expected).reshape(-1, channels))
        except UserError as error:
            damaged.append(str(error))
    if not images:
        raise UserError(damaged[0])
    pixels = np.concatenate([image[:: 1 + len(image) // 2**16] for image in images]).astype(np.float64)
    mean, std = (tuple(round(float(x), 3) for x in values) for values in (pixels.mean(0), np.maximum(pixels.std(0), 1e-3)))
    found_lines = [
        ("model.channels", channels, remark),
        ("dataset.image_dtype", dtype, ""),
        ("normalize.mean", mean, f"of {len(images)} images"),
        ("normalize.std", std, ""),
    ]
    return found_lines, expected


def _pixels(file: str, expected: PixelFormat) -> np.ndarray:
    """Returns an image, or the upper left part of a large TIFF."""
    if large_files.is_large(file):
        return large_files.open_image(file, expected)[:PART, :PART]
    return image_files.read(file, expected)


def _size_lines(found: Found, sizes: Sequence[tuple[int, int]]) -> list[Line]:
    """Returns the lines about crops and scales for images of these (height, width)."""
    height, width = (int(np.median(side)) for side in zip(*sizes, strict=True))
    reduce = max(height, width) > LARGE and os.path.splitext(found.pairs[0][0])[1].lower() not in MAPS
    factor = max(0.125, round(LARGE / max(height, width), 3)) if reduce else 1.0
    crop = tuple(int(np.clip(side * factor // 8 * 8 + 1, *CROPS)) for side in (height, width))
    smallest, largest = (f"{w}x{h}" for h, w in (sizes[0], sizes[-1]))
    return [
        ("augment.scale", (0.5 * factor, 2 * factor), f"of images of {smallest} to {largest} pixels (width x height)"),
        ("augment.crop", crop, "height, width; larger crops have more context and need more memory: multiples of 8, plus 1"),
        ("eval.crop", crop, ""),
        ("eval.base_size", LARGE, "GUESS: long side in pixels, for photos")
        if reduce
        else ("eval.base_size", 0, "original size"),
    ]
