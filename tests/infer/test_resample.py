"""Resizing, against hand-worked numbers and against cv2 and torch where they are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.infer import resample as taps


def resized(line, found):
    return (np.array(line)[found.pixel] * found.weight).sum(1)


def test_bilinear_by_hand():
    """2 -> 4: centers at -0.25, 0.25, 0.75, 1.25 of the source, the outer two held to its edges; 4 -> 2: at 0.5 and 2.5."""
    np.testing.assert_allclose(resized([0.0, 8.0], taps.bilinear(4, 2)), [0, 2, 6, 8])
    np.testing.assert_allclose(resized([0.0, 2.0, 8.0, 100.0], taps.bilinear(2, 4)), [1, 54])
    np.testing.assert_array_equal(taps.bilinear(5, 1).pixel, 0)


def test_bilinear_with_aligned_corners_by_hand():
    np.testing.assert_allclose(resized([0.0, 8.0], taps.bilinear_corners(5, 2)), [0, 2, 4, 6, 8])
    np.testing.assert_allclose(resized([7.0, 1.0, 9.0], taps.bilinear_corners(1, 3)), [7])


def test_antialiased_by_hand():
    """4 -> 2: centers at 0.5 and 2.5, half-width 2, so weights 1/8, 3/8, 3/8, 1/8, of which one falls on the mirror image."""
    half = taps.bilinear_antialiased(2, 4)
    np.testing.assert_array_equal(half.pixel, [[0, 0, 1, 2], [1, 2, 3, 3]])
    np.testing.assert_array_equal(half.weight, [[1 / 8, 3 / 8, 3 / 8, 1 / 8]] * 2)
    np.testing.assert_allclose(resized([0.0, 8.0], taps.bilinear_antialiased(4, 2)), [0, 2, 6, 8])  # larger: as bilinear
    # 5 -> 2: the second center at 3.25 has 0.1, 0.5, 0.9, 0.7 of the last four and 0.3 of the mirror image, together 2.5
    np.testing.assert_allclose(resized([0.0, 0.0, 0.0, 0.0, 5.0], taps.bilinear_antialiased(2, 5)), [0, 2], rtol=1e-6)


def test_gray_levels_are_rounded_after_each_axis():
    """3 x 2 pixels to one: rows first 1/3 -> 0; columns first 1/2 -> 1, which is then 1/3 -> 0 or, of two of them, 2/3 -> 1."""
    to_one = taps.bilinear_antialiased(1, 3), taps.bilinear_antialiased(1, 2)
    image = np.array([[0, 1], [1, 0], [0, 0]], np.uint8)[..., None]
    assert [taps.in_gray_levels(image, *to_one, first).item() for first in (True, False)] == [0, 1]
    np.testing.assert_allclose(taps.exactly(image, *to_one, True), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("size", [(360, 480, 181, 241), (7, 300, 450, 3), (200, 120, 201, 121), (1, 5, 9, 1)])
def test_cv2_resizes_alike(size):
    cv2 = pytest.importorskip("cv2")
    height, width, new_height, new_width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    fixed = [taps.bilinear_fixed_point(new_height, height), taps.bilinear_fixed_point(new_width, width)]
    plain = [taps.bilinear(new_height, height), taps.bilinear(new_width, width)]
    theirs = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(jax.jit(taps.in_fixed_point)(image, *fixed, True), theirs)
    theirs = cv2.resize(image.astype(np.float32), (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    worst = np.abs(jax.jit(taps.exactly)(image, *plain, True) - theirs).max()
    print(f"{size}: {worst:.1e} gray levels")
    assert worst < 1e-3


@pytest.mark.parametrize("align_corners", [True, False])
def test_torch_resizes_alike(align_corners):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(20, 31, 4)).astype(np.float32)
    resize = taps.bilinear_corners if align_corners else taps.bilinear
    ours = taps.along(taps.along(jnp.array(image), resize(47, 20), 0), resize(19, 31), 1)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (47, 19), mode="bilinear", align_corners=align_corners
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), atol=1e-5)
