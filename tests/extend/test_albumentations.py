"""Another augmentation: transforms of albumentations on each crop, after ours, seeded by the example's generator."""

import os
import threading

import numpy as np
import pytest

from pspnet_jax.data import pipeline
from tests import fakes
from tests.extend import small_config

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks PyPI for a newer version when imported
albumentations = pytest.importorskip("albumentations", reason="needs pip install albumentations")
OF_THREAD = threading.local()  # transforms keep their random state, and the input pipeline has several threads


def augment(image, label, random):
    """What a recipe names: config.augment.extra = "my_module:augment"."""
    if not hasattr(OF_THREAD, "transform"):
        OF_THREAD.transform = albumentations.Compose([albumentations.CLAHE(), albumentations.RandomRotate90()])
    OF_THREAD.transform.set_random_seed(int(random.integers(2**32)))
    result = OF_THREAD.transform(image=image, mask=label)
    return result["image"], result["mask"]


def test_batches_depend_only_on_seed_and_step(tmp_path):
    config = small_config(steps=4)
    config.dataset.root, config.dataset.class_names = str(fakes.write_folder(tmp_path, {"train": 8})), ()
    config.augment.extra = f"{__name__}:augment"

    def batches(start_step):
        return list(pipeline.as_numpy(pipeline.train_dataset(config, start_step=start_step)))

    found = batches(0)
    for batch, again in zip(found[2:], batches(2), strict=True):  # as in a resumed run
        np.testing.assert_array_equal(batch["image"], again["image"])
        np.testing.assert_array_equal(batch["label"], again["label"])
    config.augment.extra = ""
    plain = batches(0)
    for key in ("image", "label"):
        assert sum((x != y).any() for a, b in zip(found, plain, strict=True) for x, y in zip(a[key], b[key], strict=True)) > 8
