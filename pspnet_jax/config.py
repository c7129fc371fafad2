"""Every field a recipe can set, with its default; reading recipes, and saving what a run was made with."""

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
    """Returns the configuration every recipe starts from: PSPNet-50 as its authors train and score it."""
    config = ConfigDict()
    config.name = "base"  # names the default workdir, runs/<name>
    config.seed = 0  # initial weights, order, augmentation and dropout all follow from it
    config.batch_size = 16  # images per optimizer step, over all devices; BatchNorm sees batch_size / optimizer.accumulate
    config.total_steps = 150_000  # optimizer steps; the learning rate reaches 0 here
    config.init_from = ""  # start from the weights of this run (its workdir), or of a file of others'; empty: random

    config.model = model = ConfigDict()
    model.depth = 50  # of the ResNet: 18, 34, 50, 101, 152 or 269
    model.width = 64  # channels of the first stage's bottleneck; 64 is ResNet, less gives a thinner network
    model.stem = "deep"  # first convolutions: deep, 3x3 64, 64, 128 (Caffe, semseg); deep32, 3x3 32, 32, 64 (mmseg V1c);
    # conv7, 7x7 64 (torchvision)
    model.stride_in = "conv3x3"  # where a bottleneck takes its stride: conv3x3 (semseg, Caffe's R101) or conv1x1 (Caffe's R50)
    model.first_block_dilation = "full"  # in a dilated stage's first block: full (Caffe, semseg) or half (mmseg)
    model.output_stride = 8  # input pixels per feature: 8 (paper), 16 or 32
    model.bins = (1, 2, 3, 6)  # pyramid levels; () leaves the pyramid out (the paper's dilated FCN baseline)
    model.pool = "average"  # average or max
    model.reduce_channels = True  # the paper's DR: each level is reduced to C/N channels; False keeps C
    model.head_kernel = 3  # size of the head's first convolution: 3 or 1
    model.factored_head = False  # the same function as the plain head without building the concatenation
    model.align_corners = True  # bilinear convention: True (Caffe, semseg), False (mmseg)
    model.auxiliary = True  # auxiliary head on the third stage, in training only
    model.dropout = 0.1  # rate, whole channels, before each classifier
    model.norm = "batch"  # batch: statistics of the whole global batch; frozen: running statistics, also in training
    model.dtype = "float32"  # of convolutions and activations: float32 or bfloat16; the rest, such as the loss, stays float32.
    # GPUs and TPUs compute float32 products in TF32 or bfloat16 unless JAX_DEFAULT_MATMUL_PRECISION=highest

    config.normalize = normalize = ConfigDict()  # (pixel - mean) / std, on the 0..255 scale
    normalize.mean = (123.675, 116.28, 103.53)  # of red, green and blue in ImageNet
    normalize.std = (58.395, 57.12, 57.375)  # likewise
    normalize.order = "RGB"  # in which the network takes the channels: RGB, or BGR (Caffe)

    config.dataset = dataset = ConfigDict()
    dataset.name = "folder"  # folder, ade20k, voc2012, cityscapes, scenes (built in) or tfds
    dataset.root = ""  # local directory or gs:// path
    dataset.extra_root = ""  # voc2012: SBD's directory, with img/, cls/, train.txt and val.txt; empty: looked for beside root
    dataset.tfds_name = ""  # for name="tfds": the builder's name, root is its data_dir
    dataset.train_split = "train"  # several in the form "train+train_extra"
    dataset.class_names = ()  # empty: from the dataset's table, or a folder's classes.txt
    dataset.colors = ()  # one (R, G, B) a class; empty: as class_names
    dataset.palette = ()  # (value, R, G, B) of palette labels: filled in by training, compared by evaluation
    dataset.on_error = "stop"  # at a damaged file or one of a wrong kind, when files are checked: stop, or skip it and say so
    dataset.cache = ""  # keeps decoded images: memory, in each process; disk, for all processes of a machine; empty: none
    dataset.cache_dir = ""  # for the cache on disk, and what was found out about files; empty: TMPDIR/pspnet_jax
    dataset.balance = 0.0  # share of the examples drawn so that every class comes equally often, from images that have it
    dataset.mixture = ()  # further training data, ("name", "root", "split", weight) each; the dataset above has weight 1:
    # --config.dataset.mixture="(('folder', 'more/data', 'train', 0.5),)" takes a third of the examples from there

    config.augment = augment = ConfigDict()  # in this order; each is off at its neutral value
    augment.scale = (0.5, 2.0)  # uniform
    augment.rotate_degrees = 10.0  # uniform in [-this, this] about the center
    augment.rotate_probability = 0.5  # of an image to be rotated
    augment.blur_probability = 0.5  # 5x5, weights (1, 4, 6, 4, 1) / 16 down and across
    augment.flip_probability = 0.5  # left to right
    augment.crop = (473, 473)  # height, width that the network trains on

    config.loss = loss = ConfigDict()
    loss.terms = "cross_entropy"  # cross_entropy, ohem, focal or dice; several are added up in the form "cross_entropy+dice"
    loss.class_weights = ()  # one a class, for all terms but dice; empty: all alike
    loss.class_weighting = ""  # sets them by the training data: inverse or median (frequency); empty: not
    loss.label_smoothing = 0.0  # share of the target that is spread over all classes; cross_entropy, ohem
    loss.ohem_threshold = 0.7  # ohem: pixels whose class has a lower probability count
    loss.ohem_min_kept = 100_000  # ohem: and at least this many of each image
    loss.focal_gamma = 2.0  # focal: how much less the well classified pixels count
    loss.auxiliary_weight = 0.4  # of the auxiliary head's loss beside the head's
    loss.auxiliary_schedule = "constant"  # or linear: from auxiliary_weight at step 0 to 0 at total_steps

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd, adamw or lars
    optimizer.learning_rate = 0.01  # base * (1 - step/total_steps)^power
    optimizer.power = 0.9  # of the poly schedule
    optimizer.warmup_steps = 0  # the rate is multiplied by min(1, (step + 1) / warmup_steps)
    optimizer.head_multiplier = 10.0  # learning rate of pyramid, head and auxiliary head over the backbone's
    optimizer.momentum = 0.9  # of sgd and lars; adamw's beta 1
    optimizer.beta2 = 0.999  # of adamw
    optimizer.trust_coefficient = 0.001  # of lars
    optimizer.weight_decay = 1e-4  # sgd, lars: added to the gradient before the momentum; adamw: to the update
    optimizer.decay_norm = False  # decay BatchNorm's scale and bias too (semseg: True; Caffe and the paper: False)
    optimizer.clip_norm = 0.0  # clip the gradient's global norm; 0: off
    optimizer.accumulate = 1  # split the batch into this many parts, one after the other
    optimizer.ema_decay = 0.0  # evaluate an exponential moving average of the weights; 0: off

    config.eval = evaluation = ConfigDict()
    evaluation.split = "val"  # that is scored
    evaluation.protocol = "semseg"  # whose sizes, resizes, padding, flip and averages: semseg, caffe or mmseg
    evaluation.inference = "windows"  # overlapping crops, or the whole image at once
    evaluation.crop = (473, 473)  # window height, width
    evaluation.stride = (0, 0)  # from window to window; 0: two thirds of the crop, rounded up
    evaluation.base_size = 512  # long side in pixels at scale 1; 0: the image's own
    evaluation.short_size = 0  # mmseg: the most that the short side has at scale 1; 0: no bound (or its own)
    evaluation.scales = (1.0,)  # the paper's multi-scale: (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    evaluation.flip = True  # average with the flipped image
    evaluation.batch_size = 4  # windows (or whole images) that go through the network together; more may be faster, at 473x473
    # and 150 classes each takes a quarter of a GiB
    evaluation.best_metric = "mean_iou"  # the larger, the better: it decides which checkpoint is the best

    config.every = every = ConfigDict()  # cadence, in steps; the last step always counts
    every.log = 50  # a progress line, with the means since the last one
    every.eval = 5_000  # 0: only at the end
    every.save = 1_000  # a checkpoint
    config.profile_steps = 0  # steps after the tenth that JAX's profiler traces into WORKDIR/profile; 0: none

    return config.lock()  # a misspelt field is an error, not a new field


def load_recipe(path: str) -> ConfigDict:
    """Runs a recipe's `get_config`, to which "configs/x.py:ARG" passes ARG; or reads a run's config.json.

    Raises:
      MissingFileError: there is no such file.
      UserError: it is no Python, raises something, refuses ARG, or returns no config made by `base_config`.
    """
    if path.endswith(".json"):
        if not (saved := files.absolute(path)).exists():
            raise MissingFileError(f"--config {saved}: no such file")
        return read(saved)
    name, _, argument = path.partition(":")
    file = pathlib.Path(name).expanduser()
    if not file.is_file():
        raise MissingFileError(f"--config {name}: no such file; the recipes are in configs/, for example configs/quickstart.py")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        config = get_config and (get_config(argument) if argument else get_config())
        config = ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
        values = dict(leaves(config)) if isinstance(config, ConfigDict) else {}
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename == str(file)]
        where = f"{lines[-1].filename}, line {lines[-1].lineno}: " if lines else ""
        reason = re.sub(r" Other fields present: .*?}\"(?=\nDid|'?$)", "", str(error), flags=re.DOTALL)  # a whole config
        raise UserError(f"--config {path}: {where}{type(error).__name__}: {reason}") from error
    if get_config is None:
        raise UserError(f"--config {name}: has no function get_config() that returns a config")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {path}: get_config() returns {type(config).__name__}; expected the config of base_config()")
    kinds = dict(leaves(base_config()))
    if unknown := values.keys() - kinds.keys():
        raise UserError(f"--config {path}: there is no field {', '.join(sorted(unknown)[:5])}; --help lists them")
    if wrong := [f"{field}={value!r}" for field, value in values.items() if not _is_like(value, kinds.get(field, value))]:
        raise UserError(
            f"--config {path}: {', '.join(wrong[:3])}: expected what base_config() has there, in Python's own types"
        )
    if missing := kinds.keys() - values.keys():
        raise UserError(f"--config {path}: its config lacks {', '.join(sorted(missing)[:5])}; start from base_config()")
    return config.lock()


def _is_like(value: object, default: object) -> bool:
    """Whether a value has the type of its default; NumPy's numbers, which JSON cannot hold, are of none."""
    if isinstance(value, tuple | list):
        return isinstance(default, tuple) and all(type(v) in (bool, int, float, str) or _is_like(v, ()) for v in value)
    return type(value) is type(default) or (type(value) is int and isinstance(default, float))


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Applies --config.field=value, --config.field value and --noconfig.field; of several for one field, the last counts.

    Raises:
      UserError: a field that does not exist, or a value of the wrong type.
    """
    known, given = [field for field, _ in leaves(config)], _by_field(arguments)
    for field in given:
        if field not in known:
            close = difflib.get_close_matches(field, known, n=3)
            hint = f"did you mean {' or '.join(close)}" if close else "--help lists all fields"
            raise UserError(f"--config.{field}: there is no such field; {hint}")
    values, argv = flags.FlagValues(), ["", *itertools.chain.from_iterable(given.values())]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        _, *rest = values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        reason = re.sub(r"\('(.*)', '.*'\)$", r"\1", str(error))  # absl quotes an exception's arguments
        raise UserError(reason.removeprefix("flag ")) from error
    if rest:
        raise UserError(f"{rest[0]}: {UNKNOWN}")
    return config


UNKNOWN = (
    "unknown argument; an option takes one value (a folder, not FOLDER/*), and a field of the config is set by "
    "--config.field=value"
)


def _by_field(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Groups arguments by the field that they set; later ones replace earlier ones."""
    groups: dict[str, list[str]] = {}
    group: list[str] = []
    for argument in arguments:
        if found := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            group = groups[found[1]] = []
        elif not group:
            raise UserError(f"{argument}: {UNKNOWN}")
        group.append(argument)
    return groups


def describe_fields() -> str:
    """Returns a line for each field, with its default and what `base_config` says about it, for --help."""
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
    """One field a line, so that two saved configs can be compared with diff."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


RENAMED = {"augment.mirror_probability": "augment.flip_probability"}  # since version 0.1


def from_dict(saved: Mapping[str, Any]) -> ConfigDict:
    """Restores a saved config over base_config(), so that fields added since then have their defaults.

    A field that is no longer known, or of another type now, is reported and left out.
    """
    config = base_config()
    if not isinstance(saved, Mapping):
        raise ValueError("it is no JSON object")
    for field, value in leaves(ConfigDict(saved)):
        *parents, last = RENAMED.get(field, field).split(".")
        try:
            node = functools.reduce(getattr, parents, config)
            node[last] = _tuples(value)
        except (AttributeError, KeyError):
            logger.warning("the saved config has %s=%r, which this version does not know; it is left out", field, value)
        except TypeError:
            logger.warning("the saved config has %s=%r, of another type than %r; it is left out", field, value, node[last])
    return config.lock()


def read(path: epath.Path) -> ConfigDict:
    """Reads a run's config.json.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a saved config ({error}); restore it, or take a recipe") from error


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
