"""Every field a recipe can set, with its default, and the check that refuses wrong values before anything compiles."""

import importlib.util
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

DEPTHS = (18, 34, 50, 101, 152, 269)
CHOICES = {
    "model.depth": DEPTHS,
    "model.stem": ("deep", "deep32", "conv7"),
    "model.stride_in": ("conv3x3", "conv1x1"),
    "model.first_block_dilation": ("full", "half"),
    "model.output_stride": (8, 16, 32),
    "model.pool": ("average", "max"),
    "model.head_kernel": (3, 1),
    "model.norm": ("batch", "frozen"),
    "model.dtype": ("float32", "bfloat16"),
    "loss.auxiliary_schedule": ("constant", "linear"),
    "dataset.name": ("folder", "scenes", "tfds", "ade20k", "voc2012", "cityscapes"),
    "eval.inference": ("windows", "whole"),
    "eval.protocol": ("semseg", "caffe", "mmseg"),
    "normalize.order": ("RGB", "BGR"),
}
TUPLES = {  # type and number of the values in a tuple; None: any number
    "model.bins": (int, None),
    "normalize.mean": (float, 3),
    "normalize.std": (float, 3),
    "augment.scale": (float, 2),
    "augment.crop": (int, 2),
    "eval.crop": (int, 2),
    "eval.stride": (int, 2),
    "eval.scales": (float, None),
}


def base_config() -> ConfigDict:
    """Returns the configuration every recipe starts from: PSPNet-50 as its authors train and score it."""
    config = ConfigDict()
    config.name = "base"  # names the default workdir, runs/<name>
    config.seed = 0  # initial weights, order, augmentation and dropout all follow from it
    config.batch_size = 16  # images per optimizer step, over all devices; BatchNorm sees batch_size / optimizer.accumulate
    config.total_steps = 150_000  # optimizer steps; the learning rate reaches 0 here
    config.init_from = ""  # start from the weights of this checkpoint (a workdir of ours); empty: random

    config.model = model = ConfigDict()
    model.depth = 50  # ResNet depth
    model.width = 64  # channels of the first stage's bottleneck; 64 is ResNet, less gives a thinner network
    model.stem = (
        "deep"  # deep: 3x3 64, 64, 128 (Caffe, semseg); deep32: 3x3 32, 32, 64 (mmseg V1c); conv7: 7x7 64 (torchvision)
    )
    model.stride_in = "conv3x3"  # where a bottleneck takes its stride: conv3x3 (semseg, torchvision) or conv1x1 (Caffe)
    model.first_block_dilation = (
        "full"  # of a dilated stage's first block: full (Caffe, semseg) or half (mmseg contract_dilation)
    )
    model.output_stride = 8  # input pixels per feature: 8 (paper), 16 or 32
    model.bins = (1, 2, 3, 6)  # pyramid levels; () leaves the pyramid out (the paper's dilated FCN baseline)
    model.pool = "average"  # average or max
    model.reduce_channels = True  # the paper's DR: each level is reduced to C/N channels; False keeps C
    model.head_kernel = 3  # size of the head's first convolution
    model.factored_head = False  # the same function as the plain head without building the concatenation
    model.align_corners = True  # bilinear convention: True (Caffe, semseg), False (mmseg)
    model.auxiliary = True  # auxiliary head on the third stage, in training only
    model.dropout = 0.1  # rate, whole channels, before each classifier
    model.norm = "batch"  # batch: statistics of the whole global batch; frozen: running statistics, also in training
    model.dtype = "float32"  # of convolutions and activations; parameters, statistics, logits and loss stay float32.
    # GPUs and TPUs compute float32 products in TF32 or bfloat16 unless JAX_DEFAULT_MATMUL_PRECISION=highest

    config.normalize = normalize = ConfigDict()  # (pixel - mean) / std, on the 0..255 scale
    normalize.mean = (123.675, 116.28, 103.53)  # of red, green and blue in ImageNet
    normalize.std = (58.395, 57.12, 57.375)
    normalize.order = "RGB"  # in which the network takes the channels: RGB, or BGR (Caffe)

    config.dataset = dataset = ConfigDict()
    dataset.name = "folder"
    dataset.root = ""  # local directory or gs:// path
    dataset.tfds_name = ""  # for name="tfds": the builder's name, root is its data_dir
    dataset.train_split = "train"
    dataset.class_names = ()  # empty: from the dataset's table, or a folder's classes.txt
    dataset.colors = ()  # one (R, G, B) a class; empty: as class_names

    config.augment = augment = ConfigDict()  # in this order; each is off at its neutral value
    augment.scale = (0.5, 2.0)  # uniform
    augment.rotate_degrees = 10.0  # uniform in [-this, this] about the center
    augment.rotate_probability = 0.5
    augment.blur_probability = 0.5  # 5x5 Gaussian, sigma 1.1
    augment.mirror_probability = 0.5
    augment.crop = (473, 473)  # height, width that the network trains on

    config.loss = loss = ConfigDict()
    loss.auxiliary_weight = 0.4
    loss.auxiliary_schedule = "constant"  # or linear: from auxiliary_weight at step 0 to 0 at total_steps

    config.optimizer = optimizer = ConfigDict()  # SGD with momentum, the weight decay added to the gradient before it
    optimizer.learning_rate = 0.01  # base * (1 - step/total_steps)^power
    optimizer.power = 0.9
    optimizer.warmup_steps = 0  # the rate is multiplied by min(1, (step + 1) / warmup_steps)
    optimizer.head_multiplier = 10.0  # learning rate of pyramid, head and auxiliary head over the backbone's
    optimizer.momentum = 0.9
    optimizer.weight_decay = 1e-4
    optimizer.decay_norm = False  # decay BatchNorm's scale and bias too (semseg: True; Caffe and the paper: False)
    optimizer.clip_norm = 0.0  # clip the gradient's global norm; 0: off
    optimizer.accumulate = 1  # split the batch into this many parts, one after the other
    optimizer.ema_decay = 0.0  # evaluate an exponential moving average of the weights; 0: off

    config.eval = evaluation = ConfigDict()
    evaluation.split = "val"
    evaluation.protocol = "semseg"  # whose sizes, resizes, padding, flip and averages: semseg, caffe or mmseg
    evaluation.inference = "windows"  # overlapping crops, or the whole image at once
    evaluation.crop = (473, 473)  # window height, width
    evaluation.stride = (0, 0)  # from window to window; 0: two thirds of the crop, rounded up
    evaluation.base_size = 512  # long side in pixels at scale 1; 0: the image's own
    evaluation.short_size = 0  # mmseg: the most that the short side has at scale 1; 0: no bound
    evaluation.scales = (1.0,)  # the paper's multi-scale: (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    evaluation.flip = True  # average with the mirrored image
    evaluation.batch_size = 8  # windows (or whole images) that go through the network together

    config.every = every = ConfigDict()  # cadence, in steps; the last step always counts
    every.log = 50
    every.eval = 5_000  # 0: only at the end
    every.save = 1_000

    return config.lock()  # a misspelt field is an error, not a new field


def load_recipe(path: str) -> ConfigDict:
    """Runs a recipe's `get_config`; "configs/x.py:ARG" passes ARG.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no get_config, or refuses ARG.
    """
    file, _, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(
            f"--config {file}: no such file; the recipes are in configs/, for example configs/quickstart.py"
        )
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {file}: has no function get_config() that returns a config")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    return config.lock()


def to_json(config: ConfigDict) -> str:
    """One field a line, so that two saved configs can be compared with diff."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_dict(saved: dict) -> ConfigDict:
    """Restores a saved config over base_config(), so that fields added since then have their defaults."""
    config = base_config()
    for field, value in leaves(ConfigDict(saved)):
        *parents, last = field.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = _tuples(value)
    return config.lock()


def read(path: epath.Path) -> ConfigDict:
    """Reads a run's config.json.

    Raises:
      ValueError: it is missing or damaged.
    """
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore it, or choose another --workdir") from error


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("model.depth", 50) and so on, in order."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def bn_images(config: ConfigDict) -> int:
    """Number of images over which one BatchNorm statistic is taken."""
    return config.batch_size // config.optimizer.accumulate


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Refuses impossible values.

    Args:
      config: a recipe with the command line's overrides.
      num_devices: devices of the whole job; the batch is shared out among them.

    Raises:
      ValueError: names every wrong field, its value and what is allowed, one a line.
    """
    if problems := _tuple_problems(config):
        raise ValueError("\n".join(problems))
    problems = model_problems(config.model)
    for section in ("normalize", "loss", "dataset", "eval"):
        problems += _choice_problems(config[section], f"{section}.")
    problems += _range_problems(config) + _size_problems(config) + _batch_problems(config, num_devices)
    if problems:
        raise ValueError("\n".join(problems))


def _tuple_problems(config: ConfigDict) -> list[str]:
    problems, values = [], dict(leaves(config))
    if not all(isinstance(name, str) for name in config.dataset.class_names):
        problems.append(f"dataset.class_names={config.dataset.class_names}: expected names, such as ('road', 'sky')")
    if not all(isinstance(color, tuple | list) for color in config.dataset.colors):
        problems.append(
            f"dataset.colors={config.dataset.colors}: expected (R, G, B) triples, such as ((128, 64, 128), (0, 0, 0))"
        )
    for field, (kind, count) in TUPLES.items():
        value, kinds = values[field], (int, float) if kind is float else int
        if not all(isinstance(v, kinds) for v in value) or len(value) != (count or len(value)):
            problems.append(f"{field}={value}: expected {count or 'any number of'} values of type {kind.__name__}")
    return problems


def _choice_problems(config: ConfigDict, prefix: str) -> list[str]:
    return [
        f"{field}={value!r}: expected one of {', '.join(map(repr, CHOICES[field]))}"
        for field, value in leaves(config, prefix)
        if field in CHOICES and value not in CHOICES[field]
    ]


def model_problems(model: ConfigDict) -> list[str]:
    """What is impossible in `config.model` by itself, one sentence a field; empty when all is well."""
    problems = _choice_problems(model, "model.")
    if model.width < 8 or model.width % 8:
        problems.append(f"model.width={model.width}: expected a multiple of 8 (64 is ResNet's)")
    if any(b < 1 for b in model.bins):
        problems.append(f"model.bins={model.bins}: expected bins of 1 or more")
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout={model.dropout}: expected a value from 0 up to, not including, 1")
    return problems


def _range_problems(config: ConfigDict) -> list[str]:
    positive = "batch_size total_steps optimizer.learning_rate optimizer.accumulate every.log every.save eval.batch_size"
    fractions = "augment.rotate_probability augment.blur_probability augment.mirror_probability"
    values = dict(leaves(config))
    problems = [f"{f}={values[f]}: expected more than 0" for f in positive.split() if not values[f] > 0]
    problems += [f"{f}={values[f]}: expected a value from 0 to 1" for f in fractions.split() if not 0 <= values[f] <= 1]
    for field in ("optimizer.momentum", "optimizer.ema_decay"):
        if not 0 <= values[field] < 1:
            problems.append(f"{field}={values[field]}: expected a value from 0 up to, not including, 1")
    if min(config.normalize.std) <= 0:
        problems.append(f"normalize.std={config.normalize.std}: expected values above 0")
    for field in ("power", "weight_decay", "clip_norm", "warmup_steps", "head_multiplier"):
        if config.optimizer[field] < 0:
            problems.append(f"optimizer.{field}={config.optimizer[field]}: expected 0 or more")
    for field in ("every.eval", "loss.auxiliary_weight", "eval.base_size", "eval.short_size", "augment.rotate_degrees"):
        if values[field] < 0:
            problems.append(f"{field}={values[field]}: expected 0 or more")
    low, high = config.augment.scale
    if not 0 < low <= high:
        problems.append(f"augment.scale={config.augment.scale}: expected (low, high) with 0 < low <= high")
    if not config.eval.scales or min(config.eval.scales) <= 0:
        problems.append(f"eval.scales={config.eval.scales}: expected one or more scales above 0")
    if not all(0 <= stride <= crop for stride, crop in zip(config.eval.stride, config.eval.crop, strict=True)):
        problems.append(f"eval.stride={config.eval.stride}: expected values from 0 to eval.crop={config.eval.crop}")
    if config.eval.short_size and config.eval.protocol != "mmseg":
        problems.append(f"eval.short_size={config.eval.short_size}: expected 0, or eval.protocol='mmseg', whose rule it is")
    return problems


def _size_problems(config: ConfigDict) -> list[str]:
    problems, crops = [], {"augment.crop": config.augment.crop}
    if config.eval.inference == "windows":
        crops["eval.crop"] = config.eval.crop
    for field, crop in crops.items():
        if min(crop) < 33:
            problems.append(f"{field}={crop}: expected (height, width), each at least 33 pixels")
            continue
        if config.model.output_stride not in CHOICES["model.output_stride"]:
            continue
        features = -(-min(crop) // config.model.output_stride)
        if max(config.model.bins, default=1) > features:
            problems.append(
                f"model.bins={config.model.bins}: the largest bin exceeds the feature map of {features} rows or columns "
                f"({field}={crop} / model.output_stride={config.model.output_stride})"
            )
    return problems


def _batch_problems(config: ConfigDict, num_devices: int) -> list[str]:
    accumulate, batch = config.optimizer.accumulate, config.batch_size
    if accumulate < 1:
        return []
    if batch % (num_devices * accumulate):
        return [
            f"batch_size={batch}: expected a multiple of {num_devices * accumulate} "
            f"({num_devices} device(s) x optimizer.accumulate={accumulate})"
        ]
    if bn_images(config) == 1 and 1 in config.model.bins and config.model.norm == "batch":
        return [
            f"batch_size={batch} with optimizer.accumulate={accumulate}: a 1x1 pyramid bin of a single image is one value per "
            "channel, whose variance is 0, so BatchNorm cannot train; use 2 or more images, model.norm='frozen', or model.bins "
            "without 1"
        ]
    return []
