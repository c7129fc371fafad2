"""TFDS datasets as sources, and the built-in scenes as a TFDS dataset: `tfds.builder("pspnet_scenes")`."""

import os
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from pspnet_jax.data import scenes
from pspnet_jax.data.reader import Example, Source, decode_image, numbered
from pspnet_jax.errors import UserError


class Tfds(Source):
    """A TFDS dataset with the features image and label, stored as array_record, which can be read in any order."""

    def __init__(self, dataset: ConfigDict, split: str, num_classes: int):
        builder = prepared_builder(dataset.tfds_name, os.path.expanduser(dataset.root).rstrip("/"))
        where, features = f"dataset.tfds_name={dataset.tfds_name!r} at {builder.data_path}", builder.info.features
        kinds = {key: (len(feature.shape), feature.shape[2:], feature.np_dtype) for key, feature in features.items()}
        if (kinds.get("image"), kinds.get("label")) != ((3, (3,), np.uint8), (3, (1,), np.uint8)):
            raise UserError(f"{where}: has features {', '.join(features)}; expected image uint8[H,W,3] and label uint8[H,W,1]")
        try:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except ValueError as error:
            raise UserError(f"{where}: has no split {split!r}; expected one of {', '.join(builder.info.splits)}") from error
        # Examples of a slice or sum of splits have the same names as in the whole split, so that overlap.py recognizes them.
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
        wholes = [numbered(part.splitname, builder.info.splits[part.splitname].num_examples) for part in parts]
        self.names = [name for part, whole in zip(parts, wholes, strict=True) for name in whole[part.from_ : part.to]]
        self.num_classes = num_classes
        self.fingerprint = f"{builder.info.full_name}/{split}, {len(self.names)} examples"
        self._files = (f"{builder.data_path}/dataset_info.json",)  # written again whenever the records are

        def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            example = features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
            return decode_image(example["image"]), example["label"][..., 0]

        self._parse = tf.function(parse, autograph=False).get_concrete_function(tf.TensorSpec([], tf.string))

    in_graph = True

    def load(self, index: int) -> Example:
        image, label = self._parse(tf.constant(self._records[index]))
        return np.asarray(image), np.asarray(label)

    def tensors(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        record = tf.numpy_function(lambda i: self._records[i], [index], tf.string, stateful=False)
        image, label = self._parse(tf.ensure_shape(record, []))
        return image, label

    def files(self, index: int) -> Sequence[str]:
        return self._files


def prepared_builder(name: str, root: str) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=root or None)
        if name == "pspnet_scenes" and not builder.is_prepared():
            builder = tfds.builder(name, data_dir=root or None, file_format="array_record")
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(
            f"dataset.tfds_name={name!r}: TFDS knows no dataset of this name, and there is none at {root!r}; datasets named "
            "pspnet_... must be prepared first, see pspnet_jax/data/builders.py"
        ) from error
    where = f"dataset.tfds_name={name!r} at {builder.data_path}"
    if not builder.is_prepared():
        raise UserError(f"{where}: not prepared; run `tfds build {name} --file_format=array_record --data_dir={root or 'DIR'}`")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{where}: is stored as {builder.info.file_format.value}, which cannot be read in random order; build it again in "
            "another directory with --file_format=array_record"
        )
    return builder


def dataset_info(builder: tfds.core.DatasetBuilder, description: str | None) -> tfds.core.DatasetInfo:
    """Returns a builder's info: images, labels as class indices, and no shuffling."""
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": image, "label": label}),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )


class PspnetScenes(tfds.core.GeneratorBasedBuilder):
    """The built-in scenes as a TFDS dataset, available as `tfds.builder("pspnet_scenes")` after importing this module."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self, scenes.__doc__)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in scenes.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for index in range(scenes.SPLITS[split]):
            image, label = scenes.scene(split, index)
            yield index, {"image": image, "label": label[..., None]}
