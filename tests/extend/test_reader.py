"""Another dataset reader: images and labels in one .npz file, with our augmentation, batching and resuming."""

import numpy as np

from pspnet_jax import losses, optimizers
from pspnet_jax.data import pipeline, sources
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config, small_model


class Archive(sources.Source):
    num_classes = 3

    def __init__(self, path):
        self.arrays = dict(np.load(path))  # images uint8[N, H, W, 3], labels uint8[N, H, W]
        self.names = [f"{i:05d}" for i in range(len(self.arrays["labels"]))]

    def load(self, index):
        return self.arrays["images"][index], self.arrays["labels"][index]


def test_an_archive_is_trained_on_and_read_in_full(tmp_path, logged):
    batch = next(noise(0))
    np.savez(tmp_path / "train.npz", images=batch["image"], labels=batch["label"])
    config, source = small_config(steps=12), Archive(tmp_path / "train.npz")
    data = pipeline.open_training(config, source)
    fit(
        config,
        model=small_model(),
        loss=losses.build(config),
        optimizer=optimizers.build(config.optimizer, config.total_steps),
        batches=lambda start: pipeline.as_numpy(pipeline.train_dataset(config, start_step=start, data=data)),
        evaluate=None,
        workdir=tmp_path,
        examples_per_epoch=data.examples_per_epoch,
    )
    assert sum(logged("loss")[-3:]) < 0.7 * sum(logged("loss")[:3])
    examples = list(pipeline.as_numpy(pipeline.eval_dataset(config, source=source)))
    np.testing.assert_array_equal([example["label"] for example in examples], batch["label"])
