"""Builds the segmenter that a config describes, and scores it on a split."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from pspnet_jax import datasets, models
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


def sort_by_size(predictor: Predictor, source: Any) -> Any:
    """Returns the source sorted by image size for whole-image inference, otherwise unchanged; logs the number of sizes."""
    if predictor.settings.inference != "whole":
        return source
    from pspnet_jax.data.by_size import BySize

    ordered = BySize(source)
    predictor.log_compilations(ordered.sizes)
    return ordered


def score(network: Segmenter, config: ConfigDict, source: Any) -> tuple[Report, Mapping[str, Any]]:
    """Evaluates config.eval.split, opened as `source`."""
    from pspnet_jax.data import pipeline

    dataset = pipeline.eval_dataset(config, host=jax.process_index(), hosts=jax.process_count(), source=source)
    return evaluation.evaluate(network, pipeline.as_numpy(dataset), len(source), config.eval.split, pictures=PICTURES)
