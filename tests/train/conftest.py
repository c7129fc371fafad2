"""A trained checkpoint."""

import pytest

from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.scores import SCORE
from tests.train import filled_state, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of the tiny network at step 4; all its values are 3, or 6 in the moving average."""
    workdir, config = tmp_path_factory.mktemp("trained"), tiny_config()
    checkpoints = Checkpoints(workdir)
    checkpoints.save(4, filled_state(config, 3), config)
    checkpoints.add_score(4, {SCORE: 0.25}, {})
    checkpoints.close()
    return workdir
