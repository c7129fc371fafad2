"""Image classification on one folder per class instead of a TFDS dataset, to pretrain a backbone for `init_from`."""

import pathlib

import jax
import numpy as np
from PIL import Image

from pspnet_jax import losses, models, optimizers
from pspnet_jax.pretrain import cross_entropy
from pspnet_jax.train.loop import fit
from tests.extend import noise, small_config


class ClassFolder:
    """Images ROOT/CLASS/NAME.png, resized to one size and sampled at random in every step."""

    def __init__(self, root: pathlib.Path, size: tuple[int, int], batch_size: int):
        self.classes = sorted(path.name for path in root.iterdir())
        self._files = [(file, self.classes.index(file.parent.name)) for file in sorted(root.glob("*/*.png"))]
        self._size, self._batch_size = size, batch_size

    def __call__(self, start: int):
        while True:
            chosen = np.random.default_rng(start).integers(len(self._files), size=self._batch_size)
            files, labels = zip(*(self._files[i] for i in chosen), strict=True)
            images = [np.asarray(Image.open(file).convert("RGB").resize(self._size)) for file in files]
            yield {"image": np.stack(images), "label": np.array(labels, np.int32)}
            start += 1


def write_images(root):
    for color in ("red", "green", "blue"):
        (root / color).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[..., ("red", "green", "blue").index(color)] += 160
            Image.fromarray(pixels).save(root / color / f"{i}.png")


def test_a_backbone_is_pretrained_and_then_segments(tmp_path, logged):
    write_images(tmp_path / "images")
    config = small_config(steps=12)
    config.optimizer.learning_rate = 0.1
    data = ClassFolder(tmp_path / "images", (33, 33), config.batch_size)
    model = models.ImageClassifier(models.ResNet(depth=18, width=8), len(data.classes))
    optimizer = optimizers.build(config.optimizer, config.total_steps)
    trained = fit(config, model=model, loss=cross_entropy(), optimizer=optimizer, batches=data, evaluate=None, workdir=tmp_path)
    assert logged("accuracy")[-1] > logged("accuracy")[0]
    assert sum(logged("cross_entropy")[-3:]) < 0.7 * sum(logged("cross_entropy")[:3])

    config = small_config(steps=1)
    config.init_from = str(tmp_path)
    config.optimizer.learning_rate = 1e-30  # weights stay as they are
    parts = {"model": models.build(config.model, 3), "loss": losses.build(config)}
    optimizer = optimizers.build(config.optimizer, 1)
    state = fit(config, **parts, optimizer=optimizer, batches=noise, evaluate=None, workdir=tmp_path / "segmentation")
    jax.tree.map(np.testing.assert_array_equal, state.params["backbone"], trained.params["backbone"])
