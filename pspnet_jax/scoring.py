"""Builds the segmenter that a config describes, and scores it on a split."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from pspnet_jax import datasets, files, models, parallel
from pspnet_jax.errors import UserError
from pspnet_jax.infer import evaluate as evaluation
from pspnet_jax.infer.predictor import Predictor
from pspnet_jax.infer.segmenter import Segmenter
from pspnet_jax.report import Report

PICTURES = 4  # of the validation split, made in each evaluation


def segmenter(config: ConfigDict, variables: Any, devices: Sequence[jax.Device] | None = None) -> Segmenter:
    """Returns the segmenter of the network that a config describes, on these devices of this process, by default all."""
    info = datasets.describe(config.dataset)
    return Segmenter(build_predictor(config, models.build(config.model, info.num_classes), devices), variables, info)


def build_predictor(config: ConfigDict, model: nn.Module, devices: Sequence[jax.Device] | None = None) -> Predictor:
    """Returns the predictor of a model, which maps normalized images f32[N, H, W, 3] to logits [N, H, W, K]."""

    def apply(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, train=False)

    return Predictor(apply, config, datasets.describe(config.dataset).num_classes, devices)


def open_split(config: ConfigDict, saved: ConfigDict) -> Any:
    """Opens config.eval.split to score a run, whose own config is `saved`, and warns about images that it was trained on.

    Raises:
      UserError: the split cannot be opened, or its labels have other colors than those of the training data.
    """
    from pspnet_jax.data import overlap, palettes, sources

    source = sources.open_source(config.dataset, config.eval.split, channels=config.model.channels)
    parallel.require_same({"validation data": source.fingerprint})
    with contextlib.suppress(UserError):  # the training data is not available
        parts = list(sources.training_parts(saved.copy_and_resolve_references().dataset))
        if not any(files.is_remote(dataset.root) for dataset, _ in parts):  # too slow in a bucket
            overlap.warn_shared([sources.open_source(*part, check=False) for part in parts], source)
    palettes.require_agreement([palettes.training_colors(saved.dataset), source.palette])
    return source


def sort_by_size(predictor: Predictor, source: Any) -> Any:
    """Returns the source sorted by image size for whole-image inference, otherwise unchanged; logs the number of sizes."""
    if predictor.settings.inference != "whole":
        return source
    from pspnet_jax.data.by_size import BySize

    ordered = BySize(source)
    predictor.log_compilations(ordered.sizes)
    return ordered


def score(
    network: Segmenter, config: ConfigDict, source: Any, pictures: int = PICTURES, observe: evaluation.Observe | None = None
) -> tuple[Report, Mapping[str, Any]]:
    """Evaluates config.eval.split, opened as `source`; see `evaluation.evaluate`."""
    from pspnet_jax.data import pipeline

    dataset = pipeline.eval_dataset(config, host=jax.process_index(), hosts=jax.process_count(), source=source)
    return evaluation.evaluate(network, pipeline.as_numpy(dataset), len(source), config.eval.split, pictures, observe)
