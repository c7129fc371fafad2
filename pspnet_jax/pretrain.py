"""--mode pretrain: trains the backbone of `config.model` to classify images, so that segmentation can start from it."""

import argparse
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from ml_collections import ConfigDict

from pspnet_jax import config as configs
from pspnet_jax import files, losses, models, optimizers, parallel, runs, validation
from pspnet_jax.errors import UserError
from pspnet_jax.losses import Batch, Loss, Term

logger = logging.getLogger("pspnet_jax")
USED = re.compile(  # fields of the config
    r"(model|normalize|optimizer|every|parallel)\.|augment\.(crop|flip_probability|scale)|loss\.label_smoothing"
    r"|dataset\.(name|root|tfds_name|train_split)|eval\.(best_metric|crop|split)|\w+$"
)


def pretrain(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains a recipe such as configs/imagenet.py, or resumes the run in its workdir."""
    from pspnet_jax.data import classified  # imports TensorFlow, as does clu.metric_writers after it
    from pspnet_jax.train import loop, tracking

    from clu import metric_writers  # isort: skip

    with parallel.fail_together("reading the recipe"):
        if not arguments.config:
            raise UserError("--config is missing; name a recipe, such as --config configs/imagenet.py")
        config = configs.override(configs.load_recipe(arguments.config), overrides)
        default = dict(configs.leaves(configs.base_config()))
        if unused := [field for field, value in configs.leaves(config) if value != default[field] and not USED.match(field)]:
            raise UserError(f"{unused[0]}: --mode pretrain does not use it; leave it out")
        if config.parallel.spatial != 1:
            raise UserError(f"parallel.spatial={config.parallel.spatial}: --mode pretrain needs 1")
        without_pyramid = config.copy_and_resolve_references()
        without_pyramid.model.bins = ()  # the crop may be smaller
        validation.validate(without_pyramid, jax.device_count())
        config.eval.best_metric = "accuracy"
        workdir, dataset = runs.workdir_of(arguments, config.name), config.dataset
        if not dataset.tfds_name:
            raise UserError("dataset.tfds_name='': --mode pretrain needs a TFDS dataset of classified images: imagenet2012")
        dataset.root = dataset.root and str(files.user_path(dataset.root))
        splits = dataset.train_split, config.eval.split
        data, validation_data = (classified.ClassifiedImages(dataset, split) for split in splits)
        tracking.require(config.track)
        if config.init_from:
            runs.check_init_from(config, workdir)
    parallel.require_same({"data": (data.fingerprint, validation_data.fingerprint), **runs.comparable(config)})
    model = models.ImageClassifier(runs.build_model(config, 1).backbone, len(data.class_names))
    host, hosts = parallel.data_share(mesh := parallel.make_mesh())
    logger.info(f"{len(data)} images of {len(data.class_names)} classes to train on, {len(validation_data)} to evaluate on")

    def evaluate(variables: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        batches = parallel.to_devices(classified.eval_batches(config, validation_data, host, hosts), mesh)
        accuracy = count(variables, batches) / len(validation_data)
        logger.info(f"{config.eval.split}: {accuracy:.2%} of {len(validation_data)} images are classified correctly")
        return {"accuracy": accuracy, "data": validation_data.fingerprint}, {}

    count = correct_counter(model, config)
    loop.fit(
        config,
        model=model,
        loss=cross_entropy(config.loss.label_smoothing),
        optimizer=optimizers.build(config.optimizer, config.total_steps),
        batches=lambda start: classified.train_batches(config, data, start, host, hosts),
        evaluate=evaluate,
        workdir=workdir,
        examples_per_epoch=len(data),
        fingerprint=data.fingerprint,
        writer=metric_writers.SummaryWriter,
    )
    logger.info(f"to train from this backbone, add --config.init_from={workdir}")


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Returns the loss of logits f32[N, K] for batches with a label int32[N], and the metric "accuracy".

    `smoothing` is the share of each target that is distributed over all K classes (Szegedy et al. 2016, section 7).
    """

    def compute(logits: jax.Array, batch: Batch, step: jax.Array) -> tuple[dict[str, Term], dict[str, Any]]:
        labels = batch["label"]
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        values, count = optax.softmax_cross_entropy(logits, targets), jnp.float32(len(labels))
        correct = jnp.sum(logits.argmax(-1) == labels, dtype=jnp.float32)
        return {"cross_entropy": losses.Term(values.sum(), count)}, {"accuracy": Average(correct, count)}

    return compute


def correct_counter(model: nn.Module, config: ConfigDict) -> Callable[[Any, Any], int]:
    """Returns a function from variables and batches to the number of images whose class has the highest logit."""

    @jax.jit
    def count(variables: Any, batch: Batch) -> jax.Array:
        logits: Any = model.apply(variables, models.normalize(batch["image"], config.normalize), train=False)
        return jnp.sum(logits.argmax(-1) == batch["label"])

    return lambda variables, batches: sum(int(count(variables, batch)) for batch in batches)
