"""Checks all values of a config before anything compiles, and lists every wrong one."""

import math
from collections.abc import Callable, Collection
from typing import Any

from ml_collections import ConfigDict

from pspnet_jax import datasets, image_files, losses, models, optimizers
from pspnet_jax.config import base_config, bn_images, leaves
from pspnet_jax.errors import UserError
from pspnet_jax.infer.protocols import PROTOCOLS
from pspnet_jax.polygons import is_coco

CHOICES: dict[str, Collection[str]] = {
    "track": ("", "wandb", "mlflow"),
    "loss.auxiliary_schedule": losses.SCHEDULES,
    "loss.class_weighting": ("", *losses.WEIGHTINGS),
    "optimizer.name": optimizers.OPTIMIZERS,
    "optimizer.freeze": models.FREEZE,
    "dataset.name": datasets.NAMES,
    "dataset.image_dtype": image_files.DTYPES,
    "dataset.on_error": ("stop", "skip"),
    "dataset.cache": ("", "memory", "disk"),
    "eval.inference": ("windows", "whole"),
    "eval.protocol": PROTOCOLS,
    "normalize.order": ("RGB", "BGR"),
}
TUPLES = {  # type and number of values in each tuple; None: any number
    "model.bins": (int, None),
    "loss.class_weights": (float, None),
    "augment.scale": (float, 2),
    "augment.contrast": (float, 2),
    "augment.saturation": (float, 2),
    "augment.crop": (int, 2),
    "eval.crop": (int, 2),
    "eval.stride": (int, 2),
    "eval.scales": (float, None),
}


def validate(config: ConfigDict, num_devices: int = 0) -> None:
    """Refuses invalid values.

    Args:
      config: a recipe with the overrides of the command line.
      num_devices: devices of the whole job, among which training batches are divided; 0: they are not.

    Raises:
      UserError: lists every wrong field with its value and what is allowed, one per line.
    """
    if problems := _tuple_problems(config):
        raise UserError("\n".join(problems))
    problems = models.problems(config.model)
    problems += _choice_problems(config) + _range_problems(config) + _pixel_problems(config)
    problems += _size_problems(config) + _batch_problems(config, num_devices)
    if problems:
        raise UserError("\n".join(problems))


# Fields that are used only if other fields have certain values: (fields, condition in words, condition).
USED_ONLY_WITH: tuple[tuple[str, str, Callable[[ConfigDict], bool]], ...] = (
    ("loss.class_weights loss.class_weighting", "a loss other than dice", lambda c: c.loss.terms != "dice"),
    ("loss.label_smoothing", "cross_entropy or ohem", lambda c: bool({"cross_entropy", "ohem"} & {*c.loss.terms.split("+")})),
    ("loss.focal_gamma", "focal", lambda c: "focal" in c.loss.terms),
    ("loss.ohem_threshold loss.ohem_min_kept", "ohem", lambda c: "ohem" in c.loss.terms),
    ("optimizer.beta2", "adamw", lambda c: c.optimizer.name == "adamw"),
    ("optimizer.trust_coefficient", "lars", lambda c: c.optimizer.name == "lars"),
    ("patience", "every.eval above 0", lambda c: c.every.eval > 0),
    ("dataset.tfds_name", "dataset.name='tfds'", lambda c: c.dataset.name == "tfds"),
    (
        "dataset.images dataset.labels dataset.split_file dataset.split_fraction dataset.label_map dataset.ignore_index",
        "dataset.name='folder'",
        lambda c: c.dataset.name == "folder" or any(part[0] == "folder" for part in c.dataset.mixture),
    ),
    ("dataset.ignore_index", "an empty dataset.label_map", lambda c: not c.dataset.label_map),
    ("dataset.split_seed", "dataset.split_fraction", lambda c: c.dataset.split_fraction > 0),
    ("dataset.extra_root", "dataset.name='voc2012'", lambda c: c.dataset.name == "voc2012"),
)


def unused_fields(config: ConfigDict) -> list[str]:
    """Returns a warning for each field that was set but has no effect because of other fields."""
    values, defaults = dict(leaves(config)), dict(leaves(base_config()))
    warnings = [
        f"{field}={values[field]} has no effect: it is used only with {needed}"
        for fields, needed, holds in USED_ONLY_WITH
        for field in fields.split()
        if values[field] != defaults[field] and not holds(config)
    ]
    if "ohem" in config.loss.terms and config.loss.ohem_min_kept >= (pixels := math.prod(config.augment.crop)):
        warnings.append(f"loss.ohem_min_kept={config.loss.ohem_min_kept}: a crop has {pixels} pixels, so ohem keeps all")
    return warnings


def _tuple_problems(config: ConfigDict) -> list[str]:
    problems, values = [], dict(leaves(config))
    if not config.name.isprintable() or not config.name or "/" in config.name or config.name.startswith("."):
        problems.append(
            f"name={config.name!r}: expected the name of a folder in runs/: one line, without a slash or a leading dot"
        )
    if not all(isinstance(name, str) for name in config.dataset.class_names):
        problems.append(f"dataset.class_names={config.dataset.class_names}: expected strings, such as ('road', 'sky')")
    if not all(isinstance(color, tuple | list) for color in config.dataset.colors):
        problems.append(
            f"dataset.colors={config.dataset.colors}: expected (R, G, B) triples, such as ((128, 64, 128), (0, 0, 0))"
        )
    if not all(_is_part(part) for part in config.dataset.mixture):
        problems.append(
            f"dataset.mixture={config.dataset.mixture}: expected tuples ('name', 'root', 'split', weight), where the name "
            f"is one of {', '.join(map(repr, CHOICES['dataset.name']))}, and the weight is above 0 and below 1000"
        )
    images, labels = config.dataset.images, config.dataset.labels
    names = [(images.count(part), labels.count(part)) for part in ("{name}", "{tail}")]
    if names[0] != (1, not is_coco(labels)) or max(names[1]) > 1:
        problems.append(
            f"dataset.images={images!r}, dataset.labels={labels!r}: expected paths below root with one {{name}} each, and at "
            "most one {tail}; only a COCO file, which ends in .json, has no {name}"
        )
    per_channel = {"normalize.mean": (float, config.model.channels), "normalize.std": (float, config.model.channels)}
    for field, (kind, count) in (TUPLES | per_channel).items():
        value, kinds = values[field], (int, float) if kind is float else kind
        if not all(isinstance(v, kinds) for v in value) or len(value) != (count or len(value)):
            hint = " (model.channels); --mode check --write_statistics measures them" if field in per_channel else ""
            problems.append(f"{field}={value}: expected {count or 'any number of'} values of type {kind.__name__}{hint}")
    return problems


def _is_part(part: object) -> bool:
    """Returns whether `part` is a valid entry of dataset.mixture."""
    match part:
        case (str(name), str(), str(), float() | int() as weight) if isinstance(part, tuple):
            return name in CHOICES["dataset.name"] and 0 < weight < 1000
    return False


def _choice_problems(config: ConfigDict) -> list[str]:
    return [
        f"{field}={value!r}: expected one of {', '.join(map(repr, CHOICES[field]))}"
        for field, value in leaves(config)
        if field in CHOICES and value not in CHOICES[field]
    ]


_POSITIVE = """batch_size total_steps parallel.spatial every.log every.save loss.ohem_min_kept
    optimizer.learning_rate optimizer.accumulate optimizer.trust_coefficient"""
_NOT_NEGATIVE = """patience every.eval eval.batch_size eval.base_size eval.short_size augment.rotate_degrees loss.focal_gamma
    loss.auxiliary_weight optimizer.power optimizer.end_rate optimizer.weight_decay optimizer.clip_norm optimizer.warmup_steps
    optimizer.head_multiplier augment.brightness augment.hue"""
_PROBABILITIES = "augment.rotate_probability augment.blur_probability augment.flip_probability dataset.balance"
_SHARES = "optimizer.momentum optimizer.beta2 optimizer.ema_decay loss.label_smoothing dataset.split_fraction"
RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (_POSITIVE, "more than 0", lambda x: x > 0),
    (_NOT_NEGATIVE, "0 or more", lambda x: x >= 0),
    (_PROBABILITIES, "a value from 0 to 1", lambda x: 0 <= x <= 1),
    (_SHARES, "a value from 0 up to, not including, 1", lambda x: 0 <= x < 1),
    ("seed", f"a whole number from {-(2**31)} to {2**32 - 1}", lambda x: -(2**31) <= x < 2**32),  # JAX's keys take 32 bits
    ("loss.ohem_threshold optimizer.layer_decay", "a value above 0 and at most 1", lambda x: 0 < x <= 1),
    ("augment.scale", "(low, high) with 1/16 <= low <= high <= 16; 1.0 keeps the size", lambda x: 1 / 16 <= x[0] <= x[1] <= 16),
    ("augment.contrast augment.saturation", "(low, high) with 0 <= low <= high", lambda x: 0 <= x[0] <= x[1]),
    ("eval.scales", "one or more scales of 1/16 or more; 1.0 keeps the size", lambda x: x and not min(x) < 1 / 16),
    ("eval.base_size", "at least 33 pixels, or 0 for the original size", lambda x: not 0 < x < 33),
)
NEUTRAL_COLORS = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0}


def _range_problems(config: ConfigDict) -> list[str]:
    values = dict(leaves(config))
    problems = [
        f"{field}={values[field]}: expected {expected}"
        for fields, expected, holds in RANGES
        for field in fields.split()
        if not holds(values[field])
    ]
    for field, value in values.items():
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
        if field != "seed" and not all(abs(number) < 2**31 for number in numbers):  # False for inf and nan too
            problems.append(f"{field}={value}: expected finite numbers below {2**31}")
    problems += losses.problems(config.loss)
    if models.FREEZE.get(config.optimizer.freeze) and not config.init_from:
        problems.append(f"optimizer.freeze={config.optimizer.freeze!r}: expected init_from, whose weights are kept")
    if config.optimizer.warmup_steps > config.total_steps:
        problems.append(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}: expected at most total_steps={config.total_steps}"
        )
    if not all(0 <= stride <= crop for stride, crop in zip(config.eval.stride, config.eval.crop, strict=True)):
        problems.append(f"eval.stride={config.eval.stride}: expected values from 0 to eval.crop={config.eval.crop}")
    if config.eval.short_size > config.eval.base_size > 0:
        problems.append(f"eval.short_size={config.eval.short_size}: expected at most eval.base_size={config.eval.base_size}")
    if config.eval.short_size and config.eval.protocol != "mmseg":
        problems.append(
            f"eval.short_size={config.eval.short_size}: expected 0, or eval.protocol='mmseg', the only one that uses it"
        )
    return problems


def _pixel_problems(config: ConfigDict) -> list[str]:
    problems = []
    if (config.model.channels, config.dataset.image_dtype) != image_files.RGB8:
        problems += [
            f"augment.{field}={config.augment[field]}: expected {neutral}, which keeps the colors; it changes only images with "
            "model.channels=3 and dataset.image_dtype='uint8'"
            for field, neutral in NEUTRAL_COLORS.items()
            if config.augment[field] != neutral
        ]
    if config.normalize.order != "RGB" and config.model.channels != 3:
        problems.append(f"normalize.order={config.normalize.order!r}: expected 'RGB', the order of the files, or 3 channels")
    if config.dataset.image_dtype == "uint16" and config.normalize.mean == base_config().normalize.mean:
        problems.append(
            f"normalize.mean={config.normalize.mean}: is that of 8-bit images, but dataset.image_dtype='uint16'; measure it "
            "with --mode check --write_statistics"
        )
    if config.dataset.image_dtype != "uint8" and min(config.normalize.std) <= 0:
        problems.append(f"normalize.std={config.normalize.std}: expected values above 0")
    if config.dataset.image_dtype == "uint8" and min(config.normalize.std) < 1:
        problems.append(
            f"normalize.std={config.normalize.std}: expected values of 1 or more, on the 0..255 scale; multiply mean and "
            "std by 255 if they are on the 0..1 scale"
        )
    return problems


def _size_problems(config: ConfigDict) -> list[str]:
    problems, crops = [], {"augment.crop": config.augment.crop}
    if config.eval.inference == "windows":
        crops["eval.crop"] = config.eval.crop
    for field, crop in crops.items():
        if min(crop) < 33:
            problems.append(f"{field}={crop}: expected (height, width), each at least 33 pixels")
            continue
        if config.model.output_stride not in models.CHOICES["output_stride"]:
            continue
        features = -(-min(crop) // config.model.output_stride)
        if max(config.model.bins, default=1) > features:
            problems.append(
                f"model.bins={config.model.bins}: the largest bin exceeds the feature map of {features} rows or columns "
                f"({field}={crop} / model.output_stride={config.model.output_stride})"
            )
    return problems


def _batch_problems(config: ConfigDict, num_devices: int) -> list[str]:
    accumulate, batch, spatial = config.optimizer.accumulate, config.batch_size, config.parallel.spatial
    if accumulate < 1 or spatial < 1:
        return []
    if num_devices % spatial:
        return [f"parallel.spatial={spatial}: expected a divisor of the number of devices, {num_devices}"]
    groups = num_devices // spatial or 1
    if batch % (groups * accumulate):
        devices = f"{num_devices or 1} device(s)" + (f" / parallel.spatial={spatial}" if spatial > 1 else "")
        return [
            f"batch_size={batch}: expected a multiple of {groups * accumulate} ({devices} x optimizer.accumulate={accumulate})"
        ]
    if bn_images(config) == 1 and 1 in config.model.bins and config.model.norm == "batch":
        return [
            f"batch_size={batch} with optimizer.accumulate={accumulate}: for a single image, the 1x1 pyramid bin has one value "
            "per channel, whose variance is 0, so BatchNorm cannot train; use 2 or more images, model.norm='frozen', or "
            "model.bins without 1"
        ]
    return []
