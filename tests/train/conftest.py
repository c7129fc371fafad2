"""A compilation cache for the tests in this directory, and a trained checkpoint."""

import jax
import pytest

from pspnet_jax.train.checkpoint import SCORE, Checkpoints
from tests.train import filled_state, tiny_config


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    """Enables an empty JAX compilation cache; yields the environment variables with which a subprocess shares it."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in values.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of the tiny network at step 4; all its values are 3, or 6 in the moving average."""
    workdir, config = tmp_path_factory.mktemp("trained"), tiny_config()
    checkpoints = Checkpoints(workdir)
    checkpoints.save(4, filled_state(config, 3), config)
    checkpoints.add_score(4, {SCORE: 0.25}, {})
    checkpoints.close()
    return workdir
