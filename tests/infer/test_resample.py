"""Resampling against hand-worked numbers and, if it is installed, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.infer.resample import bilinear, bilinear_antialiased, bilinear_corners, resample


def resized(line, weights):
    return (np.array(line)[weights.indices] * weights.weight).sum(1)


def test_bilinear_by_hand():
    """2 -> 4: centers at -0.25, 0.25, 0.75, 1.25 in the source, clamped to its edges; 4 -> 2: at 0.5 and 2.5."""
    np.testing.assert_allclose(resized([0.0, 8.0], bilinear(4, 2)), [0, 2, 6, 8])
    np.testing.assert_allclose(resized([0.0, 2.0, 8.0, 100.0], bilinear(2, 4)), [1, 54])
    np.testing.assert_array_equal(bilinear(5, 1).indices, 0)


def test_bilinear_with_aligned_corners_by_hand():
    np.testing.assert_allclose(resized([0.0, 8.0], bilinear_corners(5, 2)), [0, 2, 4, 6, 8])
    np.testing.assert_allclose(resized([7.0, 1.0, 9.0], bilinear_corners(1, 3)), [7])


def test_antialiased_by_hand():
    """4 -> 2: centers at 0.5 and 2.5, half-width 2, so weights 1/8, 3/8, 3/8, 1/8, one of them on a reflected pixel."""
    half = bilinear_antialiased(2, 4)
    np.testing.assert_array_equal(half.indices, [[0, 0, 1, 2], [1, 2, 3, 3]])
    np.testing.assert_array_equal(half.weight, [[1 / 8, 3 / 8, 3 / 8, 1 / 8]] * 2)
    np.testing.assert_allclose(resized([0.0, 8.0], bilinear_antialiased(4, 2)), [0, 2, 6, 8])  # larger: as bilinear
    # 5 -> 2: the second center, 3.25, has weights 0.1, 0.5, 0.9, 0.7 of the last four and 0.3 of a reflected pixel, sum 2.5
    np.testing.assert_allclose(resized([0.0, 0.0, 0.0, 0.0, 5.0], bilinear_antialiased(2, 5)), [0, 2], rtol=1e-6)


def test_numpy_and_jax_arrays_are_resampled_equally():
    """Up to float32 rounding."""
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3), dtype=np.uint8)
    weights = bilinear_antialiased(5, 13)
    host, device = resample(image, weights, 0), jax.jit(lambda x: resample(x, weights, 0))(image)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, device, atol=1e-4)


@pytest.mark.parametrize("align_corners", [True, False])
def test_resampling_equals_torch(align_corners):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(20, 31, 4)).astype(np.float32)
    weights = bilinear_corners if align_corners else bilinear
    ours = resample(resample(jnp.array(image), weights(47, 20), 0), weights(19, 31), 1)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (47, 19), mode="bilinear", align_corners=align_corners
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), atol=1e-5)
