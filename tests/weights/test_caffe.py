"""The authors' .caffemodel files: all forms that protobuf allows are read, and imported networks compute the same."""

import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from pspnet_jax.weights import caffe

pytestmark = pytest.mark.slow

reference_caffe = pytest.importorskip("tests.weights.reference_caffe")  # needs torch
RELEASED = {50: ((3, 4, 6, 3), "1x1_reduce"), 101: ((3, 4, 23, 3), "3x3")}  # blocks, and the convolution with the stride


def small_blobs() -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(0)
    shapes = {"conv5_4": [(4, 3, 3, 3)], "conv5_4/bn": [(1, 4, 1, 1)] * 4, "conv6": [(2, 4, 1, 1), (2,)]}
    return {name: [random.standard_normal(s, np.float32) for s in each] for name, each in shapes.items()}


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (1, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory, request):
    """A network like the release's with 7 classes, and its file."""
    network = reference_caffe.Network(7, *RELEASED[getattr(request, "param", 50)])
    network(random_image(97, 97))
    path = tmp_path_factory.mktemp("caffe") / "pspnet.caffemodel"
    reference_caffe.write(path, network.blobs)
    return network, path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("form", [{}, {"legacy": True}, {"packed": False}, {"double": True}])
def test_reads_every_form_of_the_format(tmp_path, old, form):
    blobs = small_blobs()
    reference_caffe.write(tmp_path / "net.caffemodel", blobs, old, **form)
    values = caffe.read(tmp_path / "net.caffemodel")
    assert list(values) == [f"{name}:{i}" for name, each in blobs.items() for i in range(len(each))]
    for key, value in values.items():
        name, index = key.split(":")
        assert value.dtype == np.float32
        assert value.shape == {"conv5_4:0": (4, 3, 3, 3), "conv6:0": (2, 4, 1, 1), "conv6:1": (2,)}.get(key, (4,))
        np.testing.assert_array_equal(value.ravel(), blobs[name][int(index)].ravel())


def wrong_files() -> dict[str, tuple[bytes, str]]:
    def layer(*blobs: bytes) -> bytes:
        return reference_caffe.field(100, reference_caffe.field(1, b"conv6") + b"".join(map(blob_field, blobs)))

    def blob_field(blob: bytes) -> bytes:
        return reference_caffe.field(7, blob)

    ones = reference_caffe.blob(np.ones((2, 4, 1, 1), np.float32))
    return {
        "empty": (b"", "has no layer with weights"),
        "untrained": (layer(), "has no layer with weights"),
        "truncated": (layer(ones)[:-1], "only a part of one; copy or download it again"),
        "text": (b'name: "PSPNet"\nlayer {}\n', "not a .caffemodel"),
        "zip": (b"PK\x03\x04\x00\x00\x08\x08", "not a .caffemodel"),
        "short": (
            layer(ones, ones + reference_caffe.field(5, b"\x00" * 4)),
            r"blob conv6:1 has 9 values for the shape \(2, 4, 1, 1\)",
        ),
        "negative": (layer(reference_caffe.field(7, reference_caffe.field(1, b"\xff" * 9 + b"\x01"))), r"0 values .* \(-1,\)"),
    }


@pytest.mark.parametrize("case", wrong_files())
def test_wrong_files_end_in_one_sentence(tmp_path, case):
    content, words = wrong_files()[case]
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        caffe.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_unless_it_ends_after_a_layer(tmp_path):
    path = tmp_path / "net.caffemodel"
    reference_caffe.write(path, small_blobs())
    content, whole, refused = path.read_bytes(), caffe.read(path), 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            keys = list(caffe.read(path))
        except ValueError:
            refused += 1
        else:
            assert keys in (list(whole)[:1], list(whole)[:5])
    print(f"{refused} of {len(content)} truncations refused")
    assert refused == len(content) - 2


def test_layer_names():
    bins = (6, 3, 2, 1)
    for module, name in {
        "backbone/stem_conv1": "conv1_1_3x3_s2",
        "backbone/stem_conv3": "conv1_3_3x3",
        "backbone/layer1_block0/projection": "conv2_1_1x1_proj",
        "backbone/layer3_block22/conv2": "conv4_23_3x3",
        "pyramid/level0": "conv5_3_pool6_conv",
        "pyramid/level3": "conv5_3_pool1_conv",
        "head_conv": "conv5_4",
        "auxiliary_conv": "conv4_24",
    }.items():
        assert caffe.layer_name(module, bins, 101) == name
    assert caffe.layer_name("pyramid/level3", (1, 2, 3, 6), 101) == "conv5_3_pool6_conv"
    assert caffe.layer_name("auxiliary_conv", bins, 50) == "conv4_7"


def test_our_modules_and_the_published_layers_correspond_one_to_one(published):
    config = base_config()
    model = models.build(config.model, 7)
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 97, 97, 3), np.float32), train=False), jax.random.key(0))
    paths = ["/".join(part.key for part in path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    modules = {re.sub(r"(/conv)?/kernel", "", path) for path in paths if path.endswith("kernel")}
    names = [caffe.layer_name(module, config.model.bins, 50) for module in modules]
    assert len(names) == 61 + 2  # convolutions of the release's prototxt and of its auxiliary head
    assert sorted(names) == sorted(name for name in published[0].blobs if not name.endswith("/bn"))


def configured(path) -> ConfigDict:
    config = base_config()
    weights.configure(config, weights.inspect(path))
    return config


def logits_error(network, path, height: int, width: int) -> float:
    """Returns the largest difference of the logits, in standard deviations of Caffe's logits."""
    config = configured(path)
    model = models.build(config.model, 7)
    images = random_image(height, width)
    inputs = models.normalize(images, config.normalize)
    logits = jax.jit(model.apply, static_argnames="train")(weights.load(path, model), inputs, train=False)
    expected = network(images)
    error = float(np.abs(logits - expected).max() / expected.std())
    print(f"{height}x{width}: max |difference| / std = {error:.1e}, std {expected.std():.2f}")
    return error


def test_the_configuration_is_inferred(published):
    _, path = published
    config = configured(path)
    assert weights.inspect(path).num_classes == 7
    model = config.model
    assert (model.depth, model.stem, model.stride_in, model.first_block_dilation) == (50, "deep", "conv1x1", "full")
    assert (model.bins, model.align_corners, model.auxiliary) == ((6, 3, 2, 1), True, True)
    assert config.normalize.to_dict() == {"mean": (123.68, 116.779, 103.939), "std": (1.0, 1.0, 1.0), "order": "BGR"}


@pytest.mark.parametrize("size", [(97, 97), (90, 133)])
def test_logits_equal_those_of_caffe(published, size):
    assert logits_error(*published, *size) <= 1e-4


def test_an_old_deploy_file_gives_the_same_variables(published, tmp_path):
    """The file has no auxiliary head, uses the old `layers` field, and stores four dimensions per blob."""
    network, path = published
    blobs = {name: blob for name, blob in network.blobs.items() if name not in ("conv4_7", "conv4_7/bn", "conv6_1")}
    deploy = tmp_path / "deploy.caffemodel"
    reference_caffe.write(deploy, blobs, old=True, legacy=True)
    config = configured(deploy)
    assert not config.model.auxiliary
    model = models.build(config.model, 7)
    jax.tree.map(np.testing.assert_array_equal, weights.load(deploy, model), weights.load(path, model))


def test_values_that_are_not_finite_are_refused(published, tmp_path):
    network, path = published
    kernel, bias = network.blobs["conv6"]
    broken = tmp_path / "broken.caffemodel"
    reference_caffe.write(broken, network.blobs | {"conv6": [kernel, np.where(np.arange(7) < 2, np.nan, bias)]})
    with pytest.raises(ValueError, match=r"1 not finite in float32: conv6:1 \(2 of 7 values\)"):
        weights.load(broken, models.build(configured(path).model, 7))


@pytest.mark.parametrize("published", [101], indirect=True)
def test_depth_101_has_its_stride_in_the_3x3_convolution(published):
    network, path = published
    assert configured(path).model.stride_in == "conv3x3"
    assert logits_error(network, path, 97, 97) <= 1e-4
