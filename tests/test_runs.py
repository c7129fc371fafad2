"""What a run needs before it starts: the network that it trains."""

import jax
import pytest

from pspnet_jax import runs
from pspnet_jax.config import base_config


@pytest.mark.parametrize("remat", ["none", "norm", "block"])
def test_remat_is_left_out_on_cpus(monkeypatch, remat):
    """`tests/models/test_norm.py` shows what stores less there; with remat, a train step of ADE20K needs half as much again."""
    config = base_config()
    config.model.remat = remat
    assert runs.build_model(config, 3).backbone.remat == "none"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert runs.build_model(config, 3).backbone.remat == config.model.remat == remat
