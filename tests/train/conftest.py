"""Programs compiled once for all tests here, and for the processes that they start."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    """A folder of compiled programs, empty at first; gives the environment with which another process shares it."""
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
