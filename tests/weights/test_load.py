"""Imported networks compute what they computed in torch, mismatches are refused, and export inverts import."""

import errno
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from pspnet_jax import models, weights
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError
from pspnet_jax.train import resume
from pspnet_jax.weights import transfer
from tests.models.reference import random_variables

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from tests.weights import reference_torch as reference  # noqa: E402

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # largest difference in standard deviations; observed: 5e-6
SIZES = ((97, 97), (90, 123))
K = 5
CONFIG_OF_MMENGINE = """
    model=dict(backbone=dict(contract_dilation=True, dilations=(\n 1,\n 1,\n 2,\n 4,\n ), style='pytorch'),
    decode_head=dict(align_corners=False, pool_scales=(\n 1,\n 2,\n 3,\n 6,\n )), test_cfg=dict(mode='whole'))
"""
CONFIG_OF_MMCV = "model = dict(backbone=dict(style='pytorch'), decode_head=dict(align_corners=True))"


def semseg() -> tuple:
    network = reference.randomized(reference.SemsegPSPNet(50, K))
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    return network, {"epoch": 100, "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.01}]}}


def mmseg(depth: int, stem: str, align_corners: bool, meta: dict) -> tuple:
    network = reference.randomized(reference.MmsegPSPNet(depth, K, stem, align_corners))
    return network, {"meta": meta, "state_dict": network.state_dict(), "message_hub": {}, "optimizer": {}}


SEGMENTATION = {  # file name: builds (network, content of the file)
    "train_epoch_100.pth": semseg,
    "pspnet_r18-d8_769x769_80k.pth": lambda: mmseg(18, "deep32", True, {}),
    "iter_1.pth": lambda: mmseg(18, "deep32", False, {"cfg": CONFIG_OF_MMENGINE}),
    "pspnet_r18b-d8_512x1024_80k.pth": lambda: mmseg(18, "conv7", False, {}),
    "iter_2.pth": lambda: mmseg(18, "conv7", True, {"config": CONFIG_OF_MMCV}),
    "pspnet_r50-d8_512x1024_40k.pth": lambda: mmseg(50, "deep32", False, {}),
}


def configured(path: Path, **fields) -> tuple:
    """Returns the config and the network for a file."""
    config, source = base_config(), weights.inspect(path)
    weights.configure(config, source)
    config.model.update(fields)
    return config, models.build(config.model, source.num_classes)


def compiled(module: nn.Module) -> Callable:
    """Returns the compiled inference function; without optimizations, compiling and running take half the time."""
    return jax.jit(functools.partial(module.apply, train=False), compiler_options={"xla_backend_optimization_level": 0})


def relative_difference(ours: jax.Array, theirs: "torch.Tensor") -> float:
    expected = theirs.numpy().transpose(0, 2, 3, 1)
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / expected.std())


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, height, width, 3)).astype(np.float32)


@torch.no_grad()
def check_logits(path: Path, network: "torch.nn.Module", size: tuple[int, int]) -> None:
    _, model = configured(path)
    x = images(*size)
    logits = compiled(model)(weights.load(path, model), x)
    difference = relative_difference(logits, network(torch.from_numpy(x.transpose(0, 3, 1, 2))))
    print(f"{path.name}, {size[0]}x{size[1]}: {difference:.1e} standard deviations of the logits")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", SEGMENTATION)
def test_an_imported_network_computes_the_same_logits(name, tmp_path):
    network, content = SEGMENTATION[name]()
    torch.save(content, tmp_path / name)
    for size in SIZES:
        check_logits(tmp_path / name, network, size)


def test_depth_50_computes_the_same_logits_at_the_published_crop(tmp_path):
    network, content = semseg()
    torch.save(content, tmp_path / "train_epoch_100.pth")
    check_logits(tmp_path / "train_epoch_100.pth", network, (473, 473))


@pytest.mark.parametrize(
    ("name", "depth", "stem"),
    [
        ("resnet18.pth", 18, "conv7"),
        ("model.safetensors", 34, "conv7"),
        ("resnet50_v2.pth", 50, "deep"),
        ("resnet50s.safetensors", 50, "deep"),
        ("resnet50c.safetensors", 50, "deep32"),
    ],
)
@torch.no_grad()
def test_an_imported_backbone_computes_the_same_features(name, depth, stem, tmp_path):
    if name.startswith(("resnet50s", "resnet50c")):
        network = reference.randomized(reference.TimmDeepResNet(depth, {"deep": 64, "deep32": 32}[stem]))
    else:
        network = reference.randomized(reference.ResNet(depth, deep=stem == "deep"))
    write(tmp_path / name, network.state_dict())
    source = weights.inspect(tmp_path / name)
    assert (source.num_classes, source.model["depth"], source.model["stem"]) == (None, depth, stem)
    config = base_config()
    config.model.update(source.model)
    variables = weights.load(tmp_path / name, models.build(config.model, K))
    assert {path[:2] for path in traverse_util.flatten_dict(variables)} == {("params", "backbone"), ("batch_stats", "backbone")}
    backbone = models.ResNet(depth, stem=stem, output_stride=32)
    variables = {collection: tree["backbone"] for collection, tree in variables.items()}
    for size in SIZES:
        _, features = compiled(backbone)(variables, x := images(*size))
        difference = relative_difference(features, network(torch.from_numpy(x.transpose(0, 3, 1, 2))))
        print(f"{name}, {size[0]}x{size[1]}: {difference:.1e} standard deviations of the features")
        assert difference <= TOLERANCE


class ImageClassifier(nn.Module):
    """A user-defined network on our backbone."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(K)(self.backbone(images, train)[1].mean((1, 2)))


def test_an_imported_backbone_fits_any_network_on_our_resnet(tmp_path):
    path = write(tmp_path / "resnet18.pth", reference.randomized(reference.ResNet(18)).state_dict())
    model = ImageClassifier(models.ResNet(18, stem="conv7", output_stride=32))
    variables = weights.load(path, model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(33, 33), train=False))
    for collection in ("params", "batch_stats"):
        expected = {path: leaf.shape for path, leaf in flat(shapes[collection]["backbone"]).items()}
        assert {path: leaf.shape for path, leaf in flat(variables[collection]["backbone"]).items()} == expected
    with pytest.raises(UserError, match=r"set --config\.model\.stem=conv7"):
        weights.load(path, ImageClassifier(models.ResNet(18)))
    with pytest.raises(UserError, match=r"into a network with a backbone other than models\.ResNet"):
        weights.load(path, ImageClassifier(nn.Dense(3)))


def test_a_network_with_user_defined_parts_is_neither_loaded_nor_saved(state, tmp_path):
    path = write(tmp_path / "pspnet_512x512.safetensors", state)
    model = models.PSPNet(models.ResNet(18, stem="deep32", first_block_dilation="half"), head=nn.Dense(K))
    with pytest.raises(UserError, match=r"into a network with parts that models\.build does not make"):
        weights.load(path, model)
    with pytest.raises(UserError, match=r"which has parts that models\.build does not make"):
        weights.save(tmp_path / "net.pth", {}, model, "torch")


def test_the_fields_of_a_network_are_those_it_was_built_from():
    fields = {"bins": (1, 3), "pool": "max", "head_kernel": 1, "auxiliary": False, "stride_in": "conv1x1"}
    config = base_config()
    config.model.update(fields)
    built = transfer.model_fields(models.build(config.model, K))
    assert built.pop("num_classes") == K
    assert built == {field: config.model[field] for field in built}
    assert set(base_config().model) - built.keys() == {
        "factored_head",
        "remat",
        "dropout",
        "norm",
        "dtype",
    }  # they do not change the variables


def write(path: Path, state: dict) -> Path:
    """Saves a state_dict of tensors in the format of the file ending."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def flat(variables: dict) -> dict:
    return traverse_util.flatten_dict(variables, sep="/")


@pytest.fixture(scope="module")
def state() -> dict:
    """An mmseg PSPNet of depth 18."""
    return reference.randomized(reference.MmsegPSPNet(18, K, "deep32", False)).state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decode_head.extra.weight": torch.ones(3)}, "1 unexpected: decode_head.extra.weight"),
        (
            {f"fc{i}.weight": torch.ones(1) for i in range(7)},
            "7 unexpected: fc0.weight, fc1.weight, fc2.weight, fc3.weight, ...",
        ),
        ({"fc.weight": torch.ones(1)}, "1 unexpected: fc.weight"),  # ignored only in ImageNet networks
        ({"backbone.layer1.0.bn1.bias": None, "backbone.stem.4.running_var": None}, "2 missing: backbone."),
        (
            {"backbone.layer4.1.conv2.weight": torch.ones(512, 256, 3, 3)},
            "1 of another shape: backbone.layer4.1.conv2.weight (512, 256, 3, 3), not (512, 512, 3, 3)",
        ),
        ({"decode_head.conv_seg.bias": torch.arange(K)}, "1 not floating point: decode_head.conv_seg.bias (int64)"),
        (
            {"backbone.stem.1.bias": torch.full((32,), torch.nan)},
            "1 not finite in float32: backbone.stem.1.bias (32 of 32 values)",
        ),
        (
            {"backbone.stem.1.running_var": torch.linspace(-1, 30, 32)},
            "1 with negative variances: backbone.stem.1.running_var (1 of 32 values)",
        ),
        (
            {"decode_head.conv_seg.bias": torch.full((K,), 1e300, dtype=torch.float64)},
            f"1 not finite in float32: decode_head.conv_seg.bias ({K} of {K} values)",
        ),
    ],
)
def test_every_key_is_accounted_for(state, change, words, tmp_path):
    path = write(tmp_path / "net.safetensors", {k: v for k, v in (state | change).items() if v is not None})
    _, model = configured(path)
    with pytest.raises(ValueError) as refusal:
        weights.load(path, model)
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_kernels_of_zeros_cause_a_warning(state, tmp_path, caplog):
    path = write(tmp_path / "net.safetensors", {k: v * ("layer4" not in k or v.ndim < 4) for k, v in state.items()})
    weights.load(path, configured(path)[1])
    message = caplog.messages[-1]
    assert re.search(r"5 of its \d+ kernels are all zeros, such as backbone.layer4.0.conv1.weight", message)


def test_half_a_file_of_zeros_is_refused(state, tmp_path):
    """An interrupted download leaves such a file if its full size was allocated first."""
    path = write(tmp_path / "net.safetensors", state)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(UserError, match=r"of its variances are all zeros, such as .*running_var: the file is incomplete"):
        weights.load(path, configured(path)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_other_precisions_become_float32(state, dtype, name, tmp_path):
    path = write(tmp_path / name, {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()})
    variables = weights.load(path, configured(path)[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    theirs = state["decode_head.bottleneck.conv.weight"].to(dtype).float().numpy()
    np.testing.assert_array_equal(variables["params"]["head_conv"]["kernel"].transpose(3, 2, 0, 1), theirs)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"depth": 34, "stem": "deep"}, "--config.model.depth=18 --config.model.stem=deep32"),
        ({"width": 32}, "--config.model.width=64"),
        ({"bins": (1, 2, 3)}, "--config.model.bins=...,...,...,..."),
        ({"reduce_channels": False, "head_kernel": 1}, "--config.model.reduce_channels=true --config.model.head_kernel=3"),
    ],
)
def test_a_different_network_is_refused_with_the_flags_to_set(state, fields, flags, tmp_path):
    path = write(tmp_path / "pspnet_512x512.safetensors", state)
    _, model = configured(path, **fields)
    with pytest.raises(ValueError) as refusal:
        weights.load(path, model)
    assert sorted(str(refusal.value).split(": set ")[1].split()) == sorted(flags.split())


def test_assumed_fields_may_differ_with_a_warning(state, tmp_path, caplog):
    path = write(tmp_path / "pspnet_512x512.safetensors", state)
    fields = {"stride_in": "conv1x1", "bins": (1, 2, 4, 8), "output_stride": 16, "pool": "max", "align_corners": True}
    _, model = configured(path, **fields, first_block_dilation="full")
    variables, usual = weights.load(path, model), weights.load(path, configured(path)[1])
    assert flat(variables).keys() == flat(usual).keys()
    [message] = caplog.messages
    assert sorted(re.findall(r"--config\.model\.(\S+)=", message)) == sorted([*fields, "first_block_dilation"])
    meta = {"cfg": "model = dict(decode_head=dict(align_corners=False), backbone=dict(contract_dilation=True))"}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"align_corners=false --config\.model\.first_block_dilation=half$"):
        weights.load(tmp_path / "net.pth", model)


@torch.no_grad()
def test_a_network_with_other_bins_computes_the_same_logits(tmp_path):
    network, content = mmseg(18, "deep32", True, {})
    for bins, level in zip((1, 2, 4, 8), network.decode_head.psp_modules, strict=True):
        level[0] = torch.nn.AdaptiveAvgPool2d(bins)
    torch.save(content, tmp_path / "net.pth")
    _, model = configured(tmp_path / "net.pth", bins=(1, 2, 4, 8), align_corners=True)
    x = images(65, 73)
    logits = compiled(model)(weights.load(tmp_path / "net.pth", model), x)
    assert relative_difference(logits, network(torch.from_numpy(x.transpose(0, 3, 1, 2)))) <= TOLERANCE


def test_a_partial_load_skips_classifiers_with_other_classes(state, tmp_path):
    path = write(tmp_path / "net.safetensors", state)
    config, same = configured(path)
    other = models.build(config.model, 7)
    with pytest.raises(ValueError, match="5 classes, but the model has 7"):
        weights.load(path, other)
    whole, most = flat(weights.load(path, same)), flat(weights.load(path, other, partial=True))
    left_out = {f"params/{name}/{leaf}" for name in ("classifier", "auxiliary_classifier") for leaf in ("kernel", "bias")}
    assert whole.keys() - most.keys() == left_out
    assert all(np.array_equal(whole[path], value) for path, value in most.items())
    assert flat(weights.load(path, same, partial=True)).keys() == whole.keys()


def test_classifier_rows_of_a_file_are_matched_by_class_name(tmp_path, caplog):
    """The file has 5 classes and the run 3, of which it shares two, in another order and spelling."""
    network, content = mmseg(18, "deep32", False, {"dataset_meta": {"classes": ("wall", "Sky", "road", "car", "tree")}})
    path = write(tmp_path / "net.pth", content)
    config, _ = configured(path)
    config.init_from, config.dataset.class_names = str(path), ("road", "fence", "sky")
    model = models.build(config.model, 3)
    fresh = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), False)
    given, names = resume.initial_weights(config, model, None)
    matched = resume.match_classes(given, fresh, names, config.dataset.class_names, "net.pth")
    for ours, theirs in (("classifier", "decode_head"), ("auxiliary_classifier", "auxiliary_head")):
        rows, bias = (network.state_dict()[f"{theirs}.conv_seg.{leaf}"].numpy() for leaf in ("weight", "bias"))
        start = fresh["params"][ours]
        kernel = np.stack([rows[2, :, 0, 0], start["kernel"][0, 0, :, 1], rows[1, :, 0, 0]], axis=-1)
        np.testing.assert_array_equal(matched["params"][ours]["kernel"][0, 0], kernel)
        np.testing.assert_array_equal(matched["params"][ours]["bias"], [bias[2], start["bias"][1], bias[1]])
    assert "moved: road (2 -> 0), sky (1 -> 2); initialized at random: fence; dropped: wall, car, tree" in caplog.text


def test_an_auxiliary_head_that_one_side_lacks(state, tmp_path):
    path = write(tmp_path / "net.safetensors", state)
    without = write(tmp_path / "without.safetensors", {k: v for k, v in state.items() if not k.startswith("auxiliary_head")})
    _, model = configured(without)
    assert model.auxiliary_head is None
    assert flat(weights.load(path, model)).keys() == flat(weights.load(without, model)).keys()
    _, model = configured(path)
    with pytest.raises(ValueError, match=r"set --config\.model\.auxiliary=false"):
        weights.load(without, model)
    missing = flat(weights.load(path, model)).keys() - flat(weights.load(without, model, partial=True)).keys()
    assert {path.split("/")[1] for path in missing} == {"auxiliary_conv", "auxiliary_classifier"}


@pytest.fixture(scope="module")
def ours() -> tuple[models.PSPNet, dict]:
    """A network of ours that semseg's code can compute, and random variables."""
    model = models.build(base_config().model, K)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32), False)
    return model, jax.tree.map(jax.numpy.asarray, variables)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(("fmt", "name"), [("torch", "net.pth"), ("safetensors", "net.safetensors")])
def test_import_after_export_is_the_identity(ours, fmt, name, tmp_path):
    model, variables = ours
    weights.save(tmp_path / name, variables, model, fmt)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask()
    back = flat(weights.load(tmp_path / name, model))
    assert back.keys() == flat(variables).keys()
    assert all(back[path].tobytes() == np.asarray(value).tobytes() for path, value in flat(variables).items())


def test_a_failed_export_is_reported_and_leaves_no_file(ours, tmp_path, monkeypatch):
    model, variables = ours
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--output .*/file/net.pth: cannot be written \(.*File exists: .*/file.*\); no partial file was left"
    ):
        weights.save(tmp_path / "file/net.pth", variables, model, "torch")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(UserError, match="already exists"):
        weights.save(tmp_path / "dir.safetensors", variables, model, "safetensors")
    before = sorted(tmp_path.iterdir())

    def full(path, content):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    for fmt, name in (("torch", "net.pth"), ("safetensors", "net.safetensors")):
        with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device\); no partial file was left"):
            weights.save(tmp_path / name, variables, model, fmt)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_not_finite_are_not_exported(ours, tmp_path):
    model, variables = ours
    broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jax.numpy.nan), variables)
    with pytest.raises(UserError, match="contain values that are not finite"):
        weights.save(tmp_path / "net.pth", broken, model, "torch")


def test_variables_that_do_not_fit_the_model_are_not_exported(ours, tmp_path):
    model, variables = ours
    head = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head_conv"}}
    for wrong in ({}, {"params": variables["params"]}, head):
        with pytest.raises(UserError, match=r"net.pth: the variables do not fit the network: .*: missing; expected"):
            weights.save(tmp_path / "net.pth", wrong, model, "torch")
    assert not list(tmp_path.iterdir())


def test_an_export_refuses_existing_files_and_wrong_endings(ours, tmp_path):
    model, variables = ours
    (tmp_path / "net.pth").write_text("precious")
    with pytest.raises(ValueError, match=r"--output .*net.pth: already exists"):
        weights.save(tmp_path / "net.pth", variables, model, "torch")
    with pytest.raises(
        ValueError, match=r"--output .*x.safetensors: expected a name that ends in .pth or .pt, for --format torch"
    ):
        weights.save(tmp_path / "x.safetensors", variables, model, "torch")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.filterwarnings("ignore:CUDA initialization")  # from a CUDA build of torch on a machine without GPU
def test_semsegs_network_loads_an_export(ours, tmp_path):
    """The export has every key and shape of the module that semseg wraps in DataParallel, and gives the same logits."""
    model, variables = ours
    weights.save(tmp_path / "net.pth", variables, model, "torch")
    network = reference.SemsegPSPNet(50, K).eval()
    checkpoint = torch.load(tmp_path / "net.pth", weights_only=True)
    torch.nn.DataParallel(network).load_state_dict(checkpoint["state_dict"], strict=True)
    check_logits(tmp_path / "net.pth", network, (97, 97))


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 18},
        {"width": 32},
        {"stem": "conv7"},
        {"stride_in": "conv1x1"},
        {"first_block_dilation": "half"},
        {"output_stride": 16},
        {"bins": (6, 3, 2, 1)},
        {"pool": "max"},
        {"reduce_channels": False},
        {"head_kernel": 1},
        {"align_corners": False},
    ],
)
def test_a_network_that_semseg_cannot_compute_is_not_exported(fields, ours, tmp_path):
    config = base_config()
    config.model.update(fields)
    [(field, value)] = fields.items()
    with pytest.raises(ValueError, match=re.escape(f"model.{field}={value}, not")):
        weights.save(tmp_path / "net.safetensors", ours[1], models.build(config.model, K), "safetensors")
    assert not list(tmp_path.iterdir())
