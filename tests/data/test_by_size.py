"""Whole-image inference sorts a split by size, with each example once and with its own label."""

import numpy as np
from PIL import Image

from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, sources
from pspnet_jax.data.by_size import BySize
from tests import fakes


def folder(root, sizes):
    for index, size in enumerate(sizes):
        image, label = fakes.pair("val", index, size)
        for kind, array in (("images", image), ("labels", label)):
            (root / kind / "val").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / "val" / f"{index}.png")
    config = base_config()
    config.dataset.update(name="folder", root=str(root), class_names=("a", "b", "c", "d"), colors=((0, 0, 0),) * 4)
    return config


def test_the_examples_are_the_same_with_the_smallest_first(tmp_path):
    sizes = [(40, 48), (16, 20), (40, 48), (16, 20), (16, 18)]
    config = folder(tmp_path, sizes)
    source = sources.open_source(config.dataset, "val")
    plain = {example["name"]: example for example in pipeline.as_numpy(pipeline.eval_dataset(config, source=source))}
    ordered = BySize(source)
    assert ordered.sizes == sorted(sizes)
    found = list(pipeline.as_numpy(pipeline.eval_dataset(config, source=ordered)))
    assert [example["name"] for example in found] == ["4", "1", "3", "0", "2"]
    for example in found:
        for field in ("image", "label"):
            np.testing.assert_array_equal(example[field], plain[example["name"]][field])
    assert [ordered.where(i) for i in (0, 4)] == [source.where(i) for i in (4, 2)]
    image, label = ordered.read(0)
    np.testing.assert_array_equal(image, plain["4"]["image"])
    np.testing.assert_array_equal(label, plain["4"]["label"])


def test_examples_without_image_files_keep_their_order():
    config = base_config()
    config.dataset.name = "scenes"
    source = sources.open_source(config.dataset, "validation")
    ordered = BySize(source)
    assert ordered.names == source.names
    assert set(ordered.sizes) == {(0, 0)}
