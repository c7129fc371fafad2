"""Every field a recipe can set, with its default; reading recipes; and saving the config of a run."""

import difflib
import functools
import inspect
import itertools
import json
import logging
import pathlib
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from pspnet_jax import files
from pspnet_jax.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)


def base_config() -> ConfigDict:
    """Returns the configuration every recipe starts from: PSPNet-50 with the authors' training and evaluation settings."""
    config = ConfigDict()
    config.name = "base"  # names the default workdir, runs/<name>
    config.seed = 0  # determines initial weights, order of examples, augmentation and dropout
    config.batch_size = 16  # images per optimizer step, over all devices; BatchNorm sees batch_size / optimizer.accumulate
    config.total_steps = 150_000  # optimizer steps; the learning rate reaches 0 at the end
    config.patience = 0  # stops early, after this many evaluations without a better eval.best_metric; 0: off
    config.track = ""  # also sends numbers, pictures and the config to an experiment tracker: wandb or mlflow; empty: none
    config.init_from = ""  # a run's workdir or third-party weights to start from: a file, or a name such as
    # hf://timm/resnet50s.gluon_in1k; empty: random

    config.model = model = ConfigDict()
    model.channels = 3  # of the images, 1 to 16; normalize needs as many values
    model.depth = 50  # ResNet depth: 18, 34, 50, 101, 152 or 269
    model.width = 64  # channels in the first stage's bottlenecks; 64 is the standard ResNet, a smaller value a thinner one
    model.stem = "deep"  # first convolutions: deep (three 3x3 with 64, 64, 128 channels: Caffe, semseg), deep32 (three 3x3 with
    # 32, 32, 64: mmseg V1c) or conv7 (one 7x7 with 64: torchvision)
    model.stride_in = "conv3x3"  # strided convolution of a bottleneck: conv3x3 (semseg, Caffe's R101) or conv1x1 (Caffe's R50)
    model.first_block_dilation = "full"  # dilation of the first block in a dilated stage: full (Caffe, semseg) or half (mmseg)
    model.output_stride = 8  # input size / feature map size: 8 (paper), 16 or 32
    model.bins = (1, 2, 3, 6)  # bins per side of each pyramid level; (): no pyramid (the paper's dilated FCN baseline)
    model.pool = "average"  # pooling in the pyramid: average or max
    model.reduce_channels = True  # the paper's DR: a 1x1 convolution reduces each of N levels to C/N channels; False keeps C
    model.head_kernel = 3  # kernel size of the head's first convolution: 3 or 1
    model.factored_head = True  # computes the same head faster, without the concatenated feature map
    model.align_corners = True  # bilinear resizing convention: True (Caffe, semseg), False (mmseg)
    model.auxiliary = True  # auxiliary head on the third stage, in training only
    model.dropout = 0.1  # rate of channel dropout before each classifier
    model.remat = "none"  # stores less in training and computes it again: norm (BatchNorm and ReLU) or block (whole blocks)
    model.norm = "batch"  # batch: statistics of the global batch; frozen: running statistics, also in training
    model.dtype = "float32"  # of convolutions and activations: float32 or bfloat16; the loss and all else stay float32.
    # GPUs and TPUs multiply float32 in TF32 or bfloat16 unless JAX_DEFAULT_MATMUL_PRECISION=highest

    config.parallel = parallel = ConfigDict()
    parallel.spatial = 1  # devices that share the height of each image, so that larger images fit into their memory

    config.normalize = normalize = ConfigDict()  # (pixel - mean) / std, on the scale of the files, such as 0..255
    normalize.mean = (123.675, 116.28, 103.53)  # one value per channel: red, green and blue, of ImageNet
    normalize.std = (58.395, 57.12, 57.375)  # --mode check --write_statistics measures both in the training data
    normalize.order = "RGB"  # channel order of the network's input: RGB, or BGR (Caffe)

    config.dataset = dataset = ConfigDict()
    dataset.name = "folder"  # folder, ade20k, voc2012, cityscapes, pascal_context, coco_stuff, loveda, potsdam, scenes (built
    # in) or tfds
    dataset.root = ""  # local directory or gs:// path
    dataset.extra_root = ""  # voc2012: SBD's folder, with img/, cls/, train.txt and val.txt; empty: searched for next to root
    dataset.tfds_name = ""  # for name="tfds": name of the builder; root is its data_dir
    dataset.train_split = "train"  # join several with +: "train+train_extra"
    dataset.image_dtype = "uint8"  # of the pixels in image files: uint8, uint16 or float32
    dataset.images = "images/{split}/{name}.*"  # folder: pattern of the images' paths below root; {name} is what an image and
    # its label share (a folder such as a/b too), {split} is optional, and * is any other part of a name;
    # {name}_road{tail}: the name has a word inside, um_road_1 in labels and um_1 in images
    dataset.labels = "labels/{split}/{name}.*"  # folder: of the labels; {name}.json: labelme's; a .json without {name}: COCO's
    dataset.split_file = ""  # folder: list of a split's images, or of images and labels: "lists/{split}.txt", or a CSV with a
    # header, such as image,label,split
    dataset.split_fraction = 0.0  # folder, without {split} and split_file: share of the files in the split val; the others are
    # in train. New files do not move the old ones
    dataset.split_seed = 0  # for split_fraction
    dataset.label_map = ""  # folder: classes of the values or colors in label files, "{0: 'cell', (255, 0, 0): 'road'}", where
    # None is ignored, of polygons "{'tree': 'tree', 'background': None}", or a CSV; empty: the values are class indices
    dataset.ignore_index = 255  # folder, without label_map: label value that is ignored
    dataset.class_names = ()  # empty: the dataset's own, or those in a folder's classes.txt
    dataset.colors = ()  # one (R, G, B) per class; empty: as for class_names
    dataset.palette = ()  # (value, R, G, B) in label files with a palette: filled in by training, compared in evaluation
    dataset.on_error = "stop"  # when the file check finds a damaged or unexpected file: stop, or skip it with a warning
    dataset.cache = ""  # cache of decoded images: memory (one per process), disk (one per machine) or empty (none)
    dataset.cache_dir = ""  # for the disk cache and the results of file checks; empty: TMPDIR/pspnet_jax
    dataset.balance = 0.0  # share of examples sampled by class: a class is chosen uniformly, then an image that contains it
    dataset.mixture = ()  # more training data: tuples ("name", "root", "split", weight); the dataset above has weight 1, so
    # --config.dataset.mixture="(('folder', 'more/data', 'train', 0.5),)" takes a third of the examples from more/data

    config.augment = augment = ConfigDict()  # applied in this order; scale (1.0, 1.0) or a probability of 0.0 turns a step off
    augment.scale = (0.5, 2.0)  # range of the scale, sampled uniformly
    augment.rotate_degrees = 10.0  # the angle is sampled uniformly from -rotate_degrees to rotate_degrees, about the center
    augment.rotate_probability = 0.5  # that an image is rotated
    augment.blur_probability = 0.5  # that an image is blurred, with (1, 4, 6, 4, 1) / 16 along both axes
    augment.flip_probability = 0.5  # that an image is flipped horizontally
    augment.brightness = 0.0  # up to so many gray levels are added or subtracted, with probability 1/2; mmsegmentation has 32
    augment.contrast = (1.0, 1.0)  # range of a factor of all values, applied with probability 1/2; mmsegmentation: (0.5, 1.5)
    augment.saturation = (1.0, 1.0)  # the same for the saturation; mmsegmentation: (0.5, 1.5)
    augment.hue = 0  # up to so many steps of 2 degrees change the hue, with probability 1/2; mmsegmentation: 18
    augment.crop = (473, 473)  # height, width of a training crop
    augment.extra = ""  # "module:function" of yours: called with each crop, its label and a random generator; returns both

    config.loss = loss = ConfigDict()
    loss.terms = "cross_entropy"  # cross_entropy, ohem, focal or dice; "cross_entropy+dice" is their sum
    loss.class_weights = ()  # one per class, for all terms but dice; empty: equal weights
    loss.class_weighting = ""  # computes class_weights from the training data: inverse or median (frequency); empty: off
    loss.label_smoothing = 0.0  # cross_entropy, ohem: share of the target probability that is spread evenly over all classes
    loss.ohem_threshold = 0.7  # ohem: keeps pixels whose true class has a lower probability than this
    loss.ohem_min_kept = 100_000  # ohem: keeps at least this many pixels of each image
    loss.focal_gamma = 2.0  # focal: the exponent that reduces the loss of well-classified pixels
    loss.auxiliary_weight = 0.4  # weight of the auxiliary head's loss; the main head's is 1
    loss.auxiliary_schedule = "constant"  # constant, or linear: from auxiliary_weight at step 0 to 0 at total_steps

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd, adamw or lars
    optimizer.learning_rate = 0.01  # initial rate, which decays as (1 - step / total_steps)^power
    optimizer.power = 0.9  # exponent of the poly schedule
    optimizer.end_rate = 0.0  # learning rate with which it ends; mmsegmentation's is 1e-4
    optimizer.warmup_steps = 0  # the rate is multiplied by min(1, (step + 1) / warmup_steps)
    optimizer.head_multiplier = 10.0  # learning rate of pyramid and heads relative to the backbone's
    optimizer.layer_decay = 1.0  # factor of the rate from each stage to the one below, for fine-tuning: with 0.8, layer4 learns
    # at 0.8 times the rate, layer3 at 0.64, ..., the stem at 0.33
    optimizer.freeze = ""  # keeps the stages up to this one as init_from has them, with BatchNorm's statistics: stem, layer1,
    # layer2, layer3 or layer4; empty: none
    optimizer.momentum = 0.9  # sgd, lars: momentum; adamw: beta 1
    optimizer.beta2 = 0.999  # adamw: beta 2
    optimizer.trust_coefficient = 0.001  # lars: trust coefficient
    optimizer.weight_decay = 1e-4  # sgd, lars: added to the gradient before momentum; adamw: decoupled, added to the update
    optimizer.decay_norm = False  # whether BatchNorm's scale and bias decay (semseg: True; Caffe and the paper: False)
    optimizer.clip_norm = 0.0  # maximum global norm of the gradient; 0: no clipping
    optimizer.accumulate = 1  # gradient accumulation: number of parts the batch is split into
    optimizer.ema_decay = 0.0  # decay of the exponential moving average of the weights, which is evaluated; 0: off

    config.eval = evaluation = ConfigDict()
    evaluation.split = "val"  # the split to evaluate
    evaluation.protocol = "semseg"  # reproduces the resizing, padding, flipping and averaging of semseg, caffe or mmseg
    evaluation.inference = "windows"  # windows (overlapping crops) or whole (the whole image at once)
    evaluation.crop = (473, 473)  # window height, width
    evaluation.stride = (0, 0)  # height, width from one window to the next; 0: two thirds of the crop, rounded up
    evaluation.base_size = 512  # long side in pixels at scale 1; 0: the original size
    evaluation.short_size = 0  # mmseg: largest short side in pixels at scale 1; 0: unlimited (or the original size)
    evaluation.scales = (1.0,)  # the paper's multi-scale: (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    evaluation.flip = True  # average the predictions with those of the flipped image
    evaluation.batch_size = 0  # windows (or whole images) per forward pass over all devices; 0: as many as half of a device's
    # memory holds, up to 2 million pixels per device (8 windows of 473x473); on CPUs 4 in total
    evaluation.best_metric = "mean_iou"  # selects the best checkpoint: mean_iou, mean_accuracy, mean_precision, mean_f1 or
    # pixel_accuracy; or, of a class, iou/NAME, accuracy/NAME (its recall), precision/NAME or f1/NAME (its Dice coefficient)

    config.every = every = ConfigDict()  # intervals, in steps; all are also due at the last step
    every.log = 50  # logs the means since the previous log
    every.eval = 5_000  # evaluates; 0: only at the end
    every.save = 1_000  # saves a checkpoint

    return config.lock()  # a misspelled field is an error, not a new field


RECIPES = [pathlib.Path(__file__).parent / "configs", pathlib.Path(__file__).parents[1] / "configs"]  # installed, in a clone


def load_recipe(path: str) -> ConfigDict:
    """Returns the config of a recipe, or of a run's config.json.

    Args:
      path: a file, or the name of a recipe in configs/, such as "cityscapes"; in "cityscapes:ARG", ARG is passed to
        `get_config`.

    Raises:
      MissingFileError: the file does not exist; lists the recipes.
      UserError: the recipe is not valid Python, raises an exception, rejects ARG, or does not return a `base_config`.
    """
    if path.endswith(".json"):
        if not (saved := files.absolute(path)).exists():
            raise MissingFileError(f"--config {saved}: no such file")
        return read(saved)
    of_file = re.fullmatch(r"(.+\.py)(?::(.*))?", path)  # a file's path may contain colons
    if of_file and pathlib.Path(of_file[1]).expanduser().is_file():
        name, argument = of_file[1], of_file[2]
    else:
        name, _, argument = path.partition(":")
    file = find_recipe(name)
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        config = get_config and (get_config(argument) if argument else get_config())
        config = ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
        if isinstance(config, ConfigDict):
            list(leaves(config))  # raises an exception for a placeholder without a value
    except (Exception, SystemExit) as error:  # user code may raise anything
        lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename == str(file)]
        where = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
        reason = re.sub(r" Other fields present: .*?}\"(?=\nDid|'?$)", "", str(error), flags=re.DOTALL)  # lists every field
        raise UserError(f"--config {path}: {where}{type(error).__name__}: {reason}") from error
    if get_config is None:
        raise UserError(f"--config {name}: it defines no function get_config(); add one that returns a config")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config() returns {type(config).__name__}; expected one made by base_config()")
    return check(config, f"--config {path}")


def find_recipe(name: str) -> pathlib.Path:
    """Returns a file of the user's, or a recipe of this package's, such as "cityscapes" or "ablations/pooling".

    Raises:
      MissingFileError: there is neither; lists the recipes.
    """
    if (file := pathlib.Path(name).expanduser()).is_file():
        return file
    folder = next(filter(pathlib.Path.is_dir, RECIPES), RECIPES[0])
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    recipes = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if (stem := name.removeprefix("configs/").removesuffix(".py")) in recipes:
        return recipes[stem]
    raise MissingFileError(f"--config {name}: no such file or recipe; the recipes are {', '.join(recipes)}")


def check(config: ConfigDict, name: str = "config") -> ConfigDict:
    """Locks a config and returns it, after checking that it has the fields of `base_config` with values of their types."""
    values, defaults = dict(leaves(config)), dict(leaves(base_config()))
    if unknown := values.keys() - defaults.keys():
        raise UserError(f"{name}: unknown field {', '.join(sorted(unknown)[:5])}; --help lists all fields")
    if wrong := [f"{field}={value!r}" for field, value in values.items() if not _same_type(value, defaults.get(field, value))]:
        raise UserError(
            f"{name}: {', '.join(wrong[:3])}: expected the types of base_config(), with Python's numbers, not NumPy's"
        )
    if missing := defaults.keys() - values.keys():
        raise UserError(f"{name}: the config lacks {', '.join(sorted(missing)[:5])}; start from base_config()")
    return config.lock()


def _same_type(value: object, default: object) -> bool:
    """Returns whether a value has the type of its default. NumPy numbers never do, because JSON cannot hold them."""
    if isinstance(value, tuple | list):
        return isinstance(default, tuple) and all(type(v) in (bool, int, float, str) or _same_type(v, ()) for v in value)
    return type(value) is type(default) or (type(value) is int and isinstance(default, float))


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Applies --config.field=value, --config.field value and --noconfig.field; if a field is set twice, the last wins.

    Raises:
      UserError: a field does not exist, or a value has the wrong type.
    """
    known, given = [field for field, _ in leaves(config)], by_field(arguments)
    for field in given:
        if field not in known:
            close = difflib.get_close_matches(field, known, n=3)
            hint = f"did you mean {' or '.join(close)}" if close else "--help lists all fields"
            raise UserError(f"--config.{field}: unknown field; {hint}")
    values, argv = flags.FlagValues(), ["", *itertools.chain.from_iterable(given.values())]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        _, *rest = values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        reason = re.sub(r"\('(.*)', '.*'\)$", r"\1", str(error))  # absl puts the arguments of the exception in quotes
        raise UserError(reason.removeprefix("flag ")) from error
    if rest:
        raise UserError(f"{rest[0]}: {UNKNOWN_ARGUMENT}")
    return config


UNKNOWN_ARGUMENT = (
    "unknown argument; an option takes one value (FOLDER, not FOLDER/*), and --config.field=value sets a field of the config"
)


def by_field(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Groups arguments by the field they set; later arguments replace earlier ones."""
    groups: dict[str, list[str]] = {}
    group: list[str] = []
    for argument in arguments:
        if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            group = groups[found[1]] = []
        elif not group:
            raise UserError(f"{argument}: {UNKNOWN_ARGUMENT}")
        group.append(argument)
    return groups


def describe_fields() -> str:
    """Returns the fields for --help, one per line: the default and the comment in `base_config`."""
    sections, lines = {"config": ""}, []
    for line in inspect.getsource(base_config).splitlines():
        if found := re.fullmatch(r"    config\.(\w+) = (\w+) = ConfigDict\(\)(?:  # (.*))?", line):
            sections[found[2]] = f"{found[1]}."
        elif found := re.fullmatch(r"    (\w+)\.(\w+) = (.*?)(?:  # (.*))?", line):
            lines.append(f"--config.{sections[found[1]]}{found[2]}={found[3]}" + (f"  {found[4]}" if found[4] else ""))
        elif found := re.fullmatch(r"    # (.*)", line):
            lines[-1] += f" {found[1]}"
    return "\n".join(lines)


def to_json(config: ConfigDict) -> str:
    """Returns JSON with one field per line, so that diff can compare two saved configs."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


RENAMED_FIELDS = {"augment.mirror_probability": "augment.flip_probability"}  # since version 0.1


def from_dict(saved: Mapping[str, Any]) -> ConfigDict:
    """Restores a saved config on top of base_config(), so that fields that it lacks get their defaults.

    A field that no longer exists or has another type now is ignored with a warning.
    """
    config = base_config()
    if not isinstance(saved, Mapping):
        raise ValueError("not a JSON object")
    for field, value in leaves(ConfigDict(saved)):
        *parents, last = RENAMED_FIELDS.get(field, field).split(".")
        try:
            node = functools.reduce(getattr, parents, config)
            node[last] = _tuples(value)
        except (AttributeError, KeyError):
            logger.warning("the saved config has %s=%r, which this version does not know; the field is ignored", field, value)
        except TypeError:
            logger.warning("the saved config has %s=%r, not of the type of %r; the field is ignored", field, value, node[last])
    return config.lock()


def read(path: epath.Path) -> ConfigDict:
    """Reads a run's config.json; raises UserError if it is missing or damaged."""
    try:
        return from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a saved config ({error}); restore the file, or use a recipe") from error


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (field, value) pairs in order, such as ("model.depth", 50)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def bn_images(config: ConfigDict) -> int:
    """Returns the number of images that BatchNorm computes one set of statistics over."""
    return config.batch_size // config.optimizer.accumulate
