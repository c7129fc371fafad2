"""Where compiled programs are kept, and that oneDNN changes results no more than bfloat16's rounding does."""

import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models, parallel, programs
from pspnet_jax.config import base_config

ONEDNN = {"xla_cpu_experimental_onednn_custom_call": True}


def test_programs_are_kept_in_the_cache_of_the_user_unless_another_place_is_set(tmp_path, monkeypatch):
    changed = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    programs.keep()  # conftest has set a directory
    assert changed == {}
    config = types.SimpleNamespace(update=changed.__setitem__, jax_compilation_cache_dir=None)
    monkeypatch.setattr(programs, "jax", types.SimpleNamespace(config=config))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no directory can be made there
    programs.keep()
    assert changed == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs.keep()
    assert Path(changed["jax_compilation_cache_dir"]).parent == tmp_path / "pspnet_jax"


@pytest.mark.parametrize(
    ("dtype", "version", "features", "flags", "expected"),
    [
        ("bfloat16", (0, 12, 0), "flags: avx2 avx512_bf16", "--a=1", ONEDNN),
        ("float32", (0, 12, 0), "flags: avx2 avx512_bf16", "", None),
        ("bfloat16", (0, 12, 0), "flags: avx512_bf16", "--xla_cpu_experimental_onednn_custom_call=false", None),
        ("bfloat16", (0, 12, 0), "flags: avx2", "", None),
        ("bfloat16", (0, 10, 2), "flags: avx2 avx512_bf16", "", None),
    ],
)
def test_onednn_is_used_only_where_it_was_measured(monkeypatch, dtype, version, features, flags, expected):
    mesh = parallel.make_mesh()
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(programs, "cpu_features", lambda: features)
    assert programs.options(dtype, mesh) == expected


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def convolution(dtype):
    """Returns a dilated 3x3 convolution of 512 channels with its gradients, and their arguments."""
    image, kernel, weights = noise(1, 9, 9, 512), noise(3, 3, 512, 512), noise(1, 9, 9, 512, seed=1)

    def outputs(image, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        rounded = image.astype(dtype), kernel.astype(dtype)
        return jax.lax.conv_general_dilated(*rounded, (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=dimensions)

    def program(image, kernel):
        out, gradients = jax.vjp(outputs, image, kernel)
        return {"outputs": out, "gradients": gradients(weights.astype(dtype))}

    return program, (image, kernel)


def pspnet(dtype):
    config = base_config()
    config.model.update(depth=18, width=8, bins=(1, 2), dtype=dtype)
    return models.build(config.model, 5)


@functools.cache
def initial():
    init = functools.partial(pspnet("float32").init, train=False)
    return jax.jit(init)(jax.random.key(0), jnp.zeros((1, 33, 33, 3)))


def network(dtype):
    """Returns a narrow PSPNet with the gradients of its parameters, and its arguments."""
    model, variables = pspnet(dtype), initial()
    images, weights = noise(2, 33, 33, 3), noise(2, 33, 33, 5, seed=1)

    def program(params, images):
        def outputs(params):
            return model.apply(variables | {"params": params}, images, train=False)

        out, gradients = jax.vjp(outputs, params)
        return {"logits": out, "gradients": gradients(weights)}

    return program, (variables["params"], images)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA has oneDNN's convolutions since JAX 0.11")
@pytest.mark.skipif("avx512_bf16" not in programs.cpu_features().split(), reason="this CPU has no bfloat16 products")
@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry")
@pytest.mark.parametrize("make", [convolution, network])
def test_results_with_onednn_agree_within_the_rounding_of_bfloat16(make):
    """Their distance from float32's results is at most 1.5 times that of bfloat16's without oneDNN."""

    def results(dtype, options=None):
        program, arguments = make(dtype)
        compiled = jax.jit(program).lower(*arguments).compile(compiler_options=options)
        assert ("__onednn$convolution" in compiled.as_text()) == (options is not None)
        return {name: flat(tree) for name, tree in compiled(*arguments).items()}

    exact, plain, onednn = results("float32"), results("bfloat16"), results("bfloat16", ONEDNN)
    for name in exact:
        without, with_it = (np.linalg.norm(x[name] - exact[name]) / np.linalg.norm(exact[name]) for x in (plain, onednn))
        print(f"{make.__name__}, {name}: relative error {without:.5f} without oneDNN, {with_it:.5f} with it")
        assert 0 < with_it <= 1.5 * without


def flat(tree):
    return np.concatenate([np.asarray(jnp.ravel(leaf), np.float64) for leaf in jax.tree.leaves(tree)])
