"""Predicts in a process that cannot import what only other jobs need: python tests/base_install.py DIRECTORY

A test runs this, and CI in an environment into which only the wheel and what it requires are installed.
"""

import pathlib
import sys
from typing import Any

BLOCKED = ("tensorflow", "tensorflow_datasets", "clu.metric_writers", "tensorboard", "torch", "matplotlib")
if __name__ == "__main__":
    sys.modules |= dict.fromkeys(BLOCKED)  # importing them fails

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import pspnet_jax  # noqa: E402
from pspnet_jax import config as configs  # noqa: E402
from pspnet_jax import main, models, optimizers, parallel  # noqa: E402
from pspnet_jax.train import checkpoint, step  # noqa: E402


def write_run(workdir: pathlib.Path, num_classes: int = 3) -> None:
    """Creates a run of a small network with random weights."""
    config = configs.base_config()
    config.model.update(depth=18, width=8, output_stride=32, bins=(1, 2))
    config.eval.update(crop=(40, 48), base_size=60, batch_size=2)
    config.dataset.class_names = tuple(f"class {i}" for i in range(num_classes))
    model, generator = models.build(config.model, num_classes), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32), train=False))
    kinds = {"bias": np.zeros, "scale": np.ones, "var": np.ones}

    def make(path: Any, array: Any) -> np.ndarray:
        return kinds.get(path[-1].key, generator.standard_normal)(array.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(make, shapes)
    state = step.new_state(config, optimizers.build(config.optimizer, 1), variables)
    checkpoint.create_run(workdir, config, jax.device_put(state, parallel.replicated(parallel.make_mesh())))


def run(folder: pathlib.Path) -> None:
    """Segments an image in Python and with the command line, which have to agree."""
    write_run(folder / "run")
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (2, 2, 3)), np.ones((25, 30, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    result = pspnet_jax.load(folder / "run")(folder / "image.png")
    assert len(np.unique(result.labels)) > 1
    np.testing.assert_array_equal(result.labels, result.probabilities().argmax(-1))
    result.overlay().save(folder / "overlay.png")
    arguments = [f"--workdir={folder}/run", f"--input={folder}/image.png", f"--output={folder}/predictions"]
    assert main.main(["--mode=predict", *arguments]) == 0
    with Image.open(folder / "predictions/index/image.png") as written:
        np.testing.assert_array_equal(np.asarray(written), result.labels)
    imported = [name for name in BLOCKED if sys.modules.get(name)]
    assert not imported, imported


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]))
