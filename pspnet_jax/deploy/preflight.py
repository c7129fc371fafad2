"""Compiles a recipe for TPU pods, without a TPU: memory, work and collectives of a chip, and the speed that these allow.

The programs are those of training and evaluation, compiled by the TPU compiler for all chips of a pod. `preflight` returns one
`Row` for each topology; nothing in it is measured on a TPU.
"""

import dataclasses
import functools
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import hlo, losses, models, optimizers, parallel, scoring
from pspnet_jax.deploy import chips
from pspnet_jax.errors import UserError
from pspnet_jax.infer import memory
from pspnet_jax.infer.plan import ceil_div
from pspnet_jax.train.step import make_init_state, make_train_step

logger = logging.getLogger("pspnet_jax")
TRIES = 4  # compilations to find the largest batch


@dataclasses.dataclass(frozen=True)
class Program:
    """What a chip needs for one run of a compiled program."""

    state_bytes: int  # weights, statistics and, in training, the optimizer's state
    temporary_bytes: int  # memory for everything that is computed
    total_bytes: int  # state, inputs, outputs, temporary memory and the program itself
    flops: int  # floating-point operations of convolutions and matrix products, see `hlo.flops`
    traffic_bytes: int  # read from and written to the main memory, see `hlo.hbm_traffic`
    collectives: dict[str, tuple[int, int]]  # kind -> (number, bytes), see `hlo.collectives`
    compile_seconds: float  # time to trace and compile it on this machine

    def roofline_seconds(self, chip: chips.Chip) -> float:
        """Returns the least time that the chip's products and its memory allow, without waiting for other chips."""
        return max(self.flops / chip.flops, self.traffic_bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Row:
    """Results for one topology."""

    topology: str  # such as "v5e:4x4"
    cloud_name: str  # of the accelerator type on Google Cloud
    chips: int  # number of chips
    hbm_bytes: float  # main memory of a chip
    images: int  # images per step, over all chips
    train: Program
    evaluate: Program
    windows: int  # that a pass of `evaluate` takes on each chip
    largest: int  # most images per group of `parallel.spatial` chips for which the train step was compiled and fits

    @property
    def step_seconds(self) -> float:
        """The roofline of a train step."""
        return self.train.roofline_seconds(chips.CHIPS[self.topology.partition(":")[0]])

    def to_json(self) -> dict[str, Any]:
        rates = {"roofline_step_seconds": self.step_seconds, "roofline_images_per_second": self.images / self.step_seconds}
        return dataclasses.asdict(self) | rates


class DoesNotFitError(UserError):
    """A program needs more memory than a chip has."""


def preflight(config: ConfigDict, topologies: Sequence[tuple[str, str]], images_per_chip: int = 0) -> Iterator[Row]:
    """Compiles a recipe for each topology.

    The largest batch and the evaluation, which a host does alone, are those of the first topology of each generation.

    Args:
      config: a complete recipe, with its class names.
      topologies: see `chips.parse`.
      images_per_chip: if above 0, batch_size is this times the number of chips divided by parallel.spatial.

    Raises:
      UserError: the batch cannot be divided among the chips; or the recipe does not fit, with what would make it fit.
    """
    of_generation: dict[str, tuple[int, Program, int]] = {}
    configs_by_name = {f"{g}:{t}": _sized(config, images_per_chip, f"{g}:{t}", chips.chips(t)) for g, t in topologies}
    for (generation, topology), (name, sized) in zip(topologies, configs_by_name.items(), strict=True):
        chip, devices = chips.CHIPS[generation], chips.devices(generation, topology)
        logger.info(f"compiling for {name}, {len(devices)} chips")
        mesh = parallel.make_mesh(devices, config.parallel.spatial)
        try:
            train = compile_train(sized, mesh, chip)
        except DoesNotFitError as error:
            raise UserError(f"{name}: {'; '.join([str(error), *_remedies(sized, devices, chip)])}") from error
        if generation not in of_generation:
            host = [device for device in devices if device.process_index == devices[0].process_index]
            try:
                of_generation[generation] = largest_batch(sized, mesh, chip, train), *compile_evaluation(sized, host, chip)
            except DoesNotFitError as error:
                raise UserError(f"{name}: {error}; set a smaller eval.batch_size, or eval.crop") from error
        largest, evaluate, windows = of_generation[generation]
        yield Row(name, chip.cloud_name(topology), mesh.size, chip.hbm, sized.batch_size, train, evaluate, windows, largest)


def _sized(config: ConfigDict, images_per_chip: int, name: str, count: int) -> ConfigDict:
    """Returns the config with the batch size for a number of chips."""
    if count % (spatial := config.parallel.spatial):
        raise UserError(f"{name}: parallel.spatial={spatial}: expected a divisor of the number of chips, {count}")
    groups = count // spatial
    return _with_batch(config, images_per_chip * groups or config.batch_size, groups, name)


def _with_batch(config: ConfigDict, batch_size: int, groups: int, name: str) -> ConfigDict:
    if batch_size % (groups * config.optimizer.accumulate):
        each = groups * config.optimizer.accumulate
        raise UserError(
            f"{name}: batch_size={batch_size}: expected a multiple of {each}, so that each chip gets as many images; set "
            f"--config.batch_size={each}, or choose --images_per_chip"
        )
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    return config


def compile_train(config: ConfigDict, mesh: Mesh, chip: chips.Chip) -> Program:
    """Compiles the train step. Raises DoesNotFitError if it does not fit."""
    num_classes, shape = len(config.dataset.class_names), (config.batch_size, *config.augment.crop)
    model = models.build(config.model, num_classes, config.optimizer.freeze)
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    init = make_init_state(config, model, optimizer, mesh, (*config.augment.crop, config.model.channels))
    state, shared = _replicated(jax.eval_shape(init), mesh), parallel.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, config.model.channels), config.dataset.image_dtype, sharding=shared),
        "label": jax.ShapeDtypeStruct(shape, np.uint8, sharding=shared),
    }
    step = make_train_step(config, model, losses.build(config), optimizer, mesh)
    per_group = config.batch_size // mesh.shape["data"]
    return _compile(
        f"train step, {per_group} image(s) per {_group(mesh)}", lambda: step.lower(state, batch).compile(), state, chip
    )


def compile_evaluation(config: ConfigDict, devices: Sequence[jax.Device], chip: chips.Chip) -> tuple[Program, int]:
    """Compiles a forward pass of evaluation on one host's chips; returns it and the number of windows on each chip.

    With eval.inference="whole", windows are as large as the images; the training crop stands in for their size.
    """
    whole = config.eval.inference == "whole"
    window = tuple(config.augment.crop if whole else config.eval.crop)
    model = models.build(config.model, len(config.dataset.class_names))
    predictor = scoring.build_predictor(config, model, devices)
    mesh = predictor.mesh
    init = functools.partial(model.init, train=False)
    variables = _replicated(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *window, config.model.channels))), mesh)
    groups = mesh.shape["data"]
    windows = ceil_div(config.eval.batch_size, groups)
    if not windows:
        windows = memory.fitting_windows(window, chip.hbm, predictor.bytes_per_pixel(variables, window))
    compile_pass = functools.partial(predictor.compile_network, variables, window, windows)
    return _compile(f"evaluation, {windows} window(s) per {_group(mesh)}", compile_pass, variables, chip), windows


def _compile(what: str, compile_program: Callable[[], Compiled], state: Any, chip: chips.Chip) -> Program:
    """Compiles a program and reads its needs. Raises DoesNotFitError if it does not fit."""
    began = time.perf_counter()
    try:
        compiled = compile_program()
    except jax.errors.JaxRuntimeError as error:
        if not (found := re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", str(error))):
            raise
        raise DoesNotFitError(f"the {what} needs {found[1]} bytes of memory, but a chip has {found[2]}") from error
    seconds, text, stats = time.perf_counter() - began, compiled.as_text() or "", compiled.memory_analysis()
    assert stats is not None, "the TPU compiler reports memory"
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    logger.info(f"{what}: compiled in {seconds:.0f} s, {total / 2**30:.2f} of {chip.hbm / 2**30:.2f} GiB")
    return Program(
        state_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)),
        temporary_bytes=stats.temp_size_in_bytes,
        total_bytes=total,
        flops=hlo.flops(text),
        traffic_bytes=hlo.hbm_traffic(text).total(),
        collectives=hlo.collectives(text),
        compile_seconds=seconds,
    )


def largest_batch(config: ConfigDict, mesh: Mesh, chip: chips.Chip, fitting: Program) -> int:
    """Returns the most images per group of chips for which the train step was compiled and fits.

    Each try follows from the memory per image of the largest batch that fits so far, or is an eighth smaller than one that
    does not fit.
    """
    groups, step = mesh.shape["data"], config.optimizer.accumulate
    most, too_many = config.batch_size // groups, math.inf
    for _ in range(TRIES):
        estimate = (chip.hbm - fitting.total_bytes + fitting.temporary_bytes) * most / fitting.temporary_bytes
        images = int(min(estimate, too_many * 7 / 8)) // step * step
        if images < most * 9 / 8:
            break
        try:
            fitting = compile_train(_with_batch(config, images * groups, groups, ""), mesh, chip)
            most = images
        except DoesNotFitError as error:
            logger.info(str(error))
            too_many = images
    return most


def _remedies(config: ConfigDict, devices: Sequence[jax.Device], chip: chips.Chip) -> list[str]:
    """Tries what lowers the memory of a recipe that does not fit; returns what came of each, in words."""
    groups, accumulate = len(devices) // config.parallel.spatial, config.optimizer.accumulate
    remats = models.CHOICES["remat"]
    tries = [{"model.remat": remat} for remat in remats[remats.index(config.model.remat) + 1 :]]
    images = config.batch_size // groups
    while (images := images // 2) and images % accumulate == 0:
        tries.append({"batch_size": images * groups})
    if config.batch_size // groups == accumulate and groups % 2 == 0:  # images cannot be fewer, but divided among more chips
        tries.append({"parallel.spatial": 2 * config.parallel.spatial, "batch_size": config.batch_size // 2})
    found = []
    for changes in tries:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        if configs.bn_images(changed) == 1:  # batch normalization cannot train
            continue
        words = " with ".join(f"{field}={value}" for field, value in changes.items())
        found.append(f"{words} {(outcome := _outcome(changed, devices, chip))}")
        if "batch_size" in changes and outcome.startswith("needs"):
            break
    return found


def _outcome(config: ConfigDict, devices: Sequence[jax.Device], chip: chips.Chip) -> str:
    try:
        program = compile_train(config, parallel.make_mesh(devices, config.parallel.spatial), chip)
    except DoesNotFitError:
        return "does not fit either"
    return f"needs {program.total_bytes / 2**30:.1f} GiB"


def _replicated(tree: Any, mesh: Mesh) -> Any:
    everywhere = parallel.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def _group(mesh: Mesh) -> str:
    return "chip" if mesh.shape["spatial"] == 1 else f"{mesh.shape['spatial']} chips"
