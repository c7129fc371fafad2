"""The keys, shapes, metadata and name of a weights file determine its source, and the source a config."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pspnet_jax import datasets, models, validation, weights
from pspnet_jax.config import base_config
from pspnet_jax.errors import UserError

torch = pytest.importorskip("torch")
from pspnet_jax.weights import own, settings  # noqa: E402
from pspnet_jax.weights.source import Source  # noqa: E402
from tests.weights import reference_torch as reference  # noqa: E402

# Configs as mmengine 0.10 and mmcv 1.x print them; those in published files have about 8,000 characters.
NEW_CONFIG = """crop_size = (\n    512,\n    512,\n)
model = dict(
    auxiliary_head=dict(\n        align_corners=True,\n        channels=256),
    backbone=dict(
        contract_dilation=True,
        dilations=(\n            1,\n            1,\n            2,\n            4,\n        ),
        strides=(\n            1,\n            2,\n            1,\n            1,\n        ),
        style='pytorch',
        type='ResNetV1c'),
    decode_head=dict(
        align_corners=True,
        pool_scales=(\n            1,\n            2,\n            3,\n            6,\n        ),
        type='PSPHead'),
    data_preprocessor=dict(bgr_to_rgb=True, mean=[\n            123.0,\n            116,\n            103,\n        ]),
    test_cfg=dict(
        crop_size=(\n            512,\n            512,\n        ),
        mode='slide',
        stride=(\n            341,\n            341,\n        )))
test_pipeline = [dict(keep_ratio=True, scale=(\n            1900,\n            950,\n        ), type='Resize')]
train_pipeline = [dict(keep_ratio=True, ratio_range=(0.5, 2.0), scale=(700, 800), type='RandomResize')]
"""
OLD_CONFIG = """model = dict(
    backbone=dict(
        type='ResNet',
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        style='caffe',
        contract_dilation=False),
    decode_head=dict(type='PSPHead', pool_scales=(1, 2, 4, 8), align_corners=False),
    test_cfg=dict(mode='whole'))
train_pipeline = [dict(type='Resize', img_scale=(500, 600), ratio_range=(0.5, 2.0))]
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2000, 400), flip=False)]
img_norm_cfg = dict(mean=[103.939, 116.779, 123.68], std=[1.0, 2.0, 3.0], to_rgb=False)
"""


def write(path: Path, build: Callable[[], "torch.nn.Module"], **others: object) -> Path:
    """Saves a network in a small file: the arrays have the true shapes but share a single 1 as storage."""
    with torch.device("meta"):
        state = build().state_dict()
    ones = {key: torch.ones((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    torch.save({"state_dict": ones, **others}, path)
    return path


def mmseg(path: Path, depth: int = 18, classes: int = 19, stem: str = "deep32", **meta: object) -> Path:
    return write(path, lambda: reference.MmsegPSPNet(depth, classes, stem, False), meta=meta)


def configured(path: Path):
    config = base_config()
    weights.configure(config, weights.inspect(path))
    validation.validate(config)
    return config


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_are_recognized_by_their_blocks(depth, tmp_path):
    source = weights.inspect(write(tmp_path / "resnet.pth", lambda: reference.ResNet(depth)))
    assert source.num_classes is None
    assert source.model == {"width": 64, "depth": depth, "stem": "conv7"}
    assert source.assumed == {"model": {"stride_in": "conv3x3"}, "normalize": base_config().normalize.to_dict()}
    deep = weights.inspect(write(tmp_path / "resnet.pth", lambda: reference.ResNet(depth, deep=True)))
    assert deep.model == {**source.model, "stem": "deep"}


@pytest.mark.parametrize(
    ("depth", "classes", "dataset", "crop", "base_size"),
    [
        (50, 150, "ade20k", 473, 512),
        (101, 21, "voc2012", 473, 512),
        (101, 19, "cityscapes", 713, 2048),
        (50, 7, "folder", 473, 512),
    ],
)
def test_a_semseg_network_determines_the_config(depth, classes, dataset, crop, base_size, tmp_path):
    config = configured(write(tmp_path / "train_epoch_100.pth", lambda: reference.SemsegPSPNet(depth, classes)))
    expected = base_config()
    expected.model.depth = depth
    expected.eval.crop, expected.eval.base_size = (crop, crop), base_size
    assert config.model.to_dict() == expected.model.to_dict()
    assert config.normalize.to_dict() == expected.normalize.to_dict()
    assert config.eval.to_dict() == expected.eval.to_dict()
    info = datasets.describe(config.dataset)
    assert (info.name, info.num_classes) == (dataset, classes)
    assert info.class_names == (
        tuple(f"class {i}" for i in range(7)) if dataset == "folder" else datasets.table(dataset).class_names
    )


def test_the_training_config_in_an_mmengine_file_is_used(tmp_path):
    config = configured(mmseg(tmp_path / "pspnet_r18-d8_512x1024.pth", cfg=NEW_CONFIG))
    model = config.model
    assert (model.depth, model.stem, model.stride_in, model.first_block_dilation) == (18, "deep32", "conv3x3", "half")
    assert (model.align_corners, model.output_stride, model.bins) == (True, 8, (1, 2, 3, 6))
    assert (config.eval.protocol, config.eval.inference, config.eval.flip) == ("mmseg", "windows", False)
    assert (config.eval.crop, config.eval.stride) == ((512, 512), (341, 341))
    assert (config.eval.base_size, config.eval.short_size) == (1900, 950)
    assert config.normalize.to_dict() == base_config().normalize.to_dict() | {"mean": (123.0, 116.0, 103.0)}


def test_the_training_config_in_an_mmcv_file_is_used(tmp_path):
    config = configured(mmseg(tmp_path / "pspnet_r50b-d8_769x769.pth", 50, stem="conv7", config=OLD_CONFIG))
    model = config.model
    assert (model.depth, model.stem, model.stride_in, model.first_block_dilation) == (50, "conv7", "conv1x1", "full")
    assert (model.align_corners, model.output_stride, model.bins) == (False, 32, (1, 2, 4, 8))
    assert (config.eval.inference, config.eval.base_size, config.eval.short_size) == ("whole", 2000, 400)
    assert config.normalize.to_dict() == {"mean": (123.68, 116.779, 103.939), "std": (3.0, 2.0, 1.0), "order": "BGR"}


@pytest.mark.parametrize(
    ("name", "classes", "align_corners", "output_stride", "inference", "crop", "stride", "sizes"),
    [
        ("pspnet_r50-d8_769x769_40k_cityscapes_20200606.pth", 19, True, 8, "windows", 769, 513, (2049, 1025)),
        ("pspnet_r50-d8_512x1024_40k_cityscapes_20200605.pth", 19, False, 8, "whole", 473, 0, (2048, 1024)),
        ("pspnet_r50-d8_512x512_80k_ade20k_20200615.pth", 150, False, 8, "whole", 473, 0, (2048, 512)),
        ("pspnet_r101-d8_4x4_512x512_20k_voc12aug_2020.pth", 21, False, 8, "whole", 473, 0, (2048, 512)),
        ("pspnet_r50-d8_480x480_40k_pascal_context_2020.pth", 60, False, 8, "windows", 480, 320, (520, 520)),
    ],
)
def test_the_name_of_a_model_zoo_file_is_used(
    name, classes, align_corners, output_stride, inference, crop, stride, sizes, tmp_path, caplog
):
    config = configured(mmseg(tmp_path / name, classes=classes))
    assert (config.model.align_corners, config.model.output_stride) == (align_corners, output_stride)
    assert (config.eval.inference, config.eval.crop, config.eval.stride) == (inference, (crop, crop), (stride, stride))
    assert (config.eval.base_size, config.eval.short_size) == sizes
    assert not caplog.messages


def test_assumptions_are_listed(tmp_path):
    """They are listed as flags, unless the user changes them or the file specifies them."""
    path = mmseg(tmp_path / "latest.pth")
    config, source = configured(path), weights.inspect(path)
    fields = re.findall(r"--config\.model\.(\S+)", weights.assumptions(config, source))
    assert sorted(fields) == [
        "align_corners=false",
        "bins=1,2,3,6",
        "first_block_dilation=half",
        "output_stride=8",
        "pool=average",
        "stride_in=conv3x3",
    ]
    message = weights.assumptions(config, source)
    assert (
        "from the number of classes, 19: --config.dataset.name=cityscapes with the classes 'road' to 'bicycle'; for" in message
    )
    config.model.align_corners = True
    config.dataset.class_names = tuple(f"part {i}" for i in range(19))
    message = weights.assumptions(config, source)
    assert "align_corners" not in message
    assert "classes" not in message
    path = mmseg(tmp_path / "latest.pth", cfg=NEW_CONFIG, dataset_meta={"classes": [f"part {i}" for i in range(19)]})
    message = weights.assumptions(configured(path), weights.inspect(path))
    assert re.findall(r"--config\.(\S+)", message) == ["model.pool=average", "normalize.std=58.395,57.12,57.375"]


@pytest.mark.parametrize("levels", [(1, 2, 4, 8), (2, 5)])
def test_bins_are_assumed_or_set_by_the_user(levels, tmp_path):
    """Array shapes do not show the bin sizes: four levels get the usual bins; any other number has to be set."""

    def build():
        network = reference.SemsegPSPNet(50, 19)
        network.ppm.features = network.ppm.features[: len(levels)]
        for level in network.ppm.features:
            level[1], level[2] = reference.conv(2048, 2048 // len(levels), 1), torch.nn.BatchNorm2d(2048 // len(levels))
        network.cls[0] = reference.conv(4096, 512, 3)
        return network

    path = write(tmp_path / "net.pth", build)
    config, source = configured(path), weights.inspect(path)
    if len(levels) == 4:
        assert "--config.model.bins=1,2,3,6" in weights.assumptions(config, source)
    else:
        with pytest.raises(
            ValueError, match=r"its pyramid has 2 levels, but model\.bins=\(1, 2, 3, 6\): set --config\.model\.bi"
        ):
            weights.load(path, models.build(config.model, 19))
    config.model.bins = levels
    variables = weights.load(path, models.build(config.model, 19))
    assert len(variables["params"]["pyramid"]) == len(levels)
    assert "model.bins" not in weights.assumptions(config, source)


def test_head_kernel_and_level_width_follow_from_the_shapes(tmp_path):

    def build():
        network = reference.SemsegPSPNet(50, 19)
        for level in network.ppm.features:
            level[1], level[2] = reference.conv(2048, 2048, 1), torch.nn.BatchNorm2d(2048)
        network.cls[0] = reference.conv(5 * 2048, 512, 1)
        return network

    path = write(tmp_path / "net.pth", build)
    config = configured(path)
    assert (config.model.head_kernel, config.model.reduce_channels) == (1, False)
    weights.load(path, models.build(config.model, 19))
    config.model.head_kernel = 3
    with pytest.raises(ValueError, match=r"set --config\.model\.head_kernel=1"):
        weights.load(path, models.build(config.model, 19))


CITYSCAPES = datasets.table("cityscapes")
TUNED = (*CITYSCAPES.class_names[:16], "crane", "tram", "scooter")


@pytest.mark.parametrize(
    ("classes", "meta", "expected"),
    [
        (19, {"CLASSES": list(CITYSCAPES.class_names), "PALETTE": [[1, 2, 3]] * 19}, CITYSCAPES),
        (
            2,
            {"dataset_meta": {"classes": ("sky", "sea "), "palette": [[1, 2, 3], [4, 5, 6]]}},
            datasets.DatasetInfo("folder", ("sky", "sea"), ((1, 2, 3), (4, 5, 6))),
        ),
        (
            19,  # as many classes as Cityscapes, but different ones
            {"dataset_meta": {"classes": [f"part {i}" for i in range(19)]}},
            datasets.DatasetInfo("folder", tuple(f"part {i}" for i in range(19)), datasets.voc_palette(19)),
        ),
        (
            19,  # fine-tuned on three other classes
            {"dataset_meta": {"classes": [*CITYSCAPES.class_names[:16], "crane", "tram", "scooter"]}},
            datasets.DatasetInfo(
                "folder", (*CITYSCAPES.class_names[:16], "crane", "tram", "scooter"), datasets.voc_palette(19)
            ),
        ),
        (
            19,  # spelled otherwise
            {"dataset_meta": {"classes": [name.replace(" ", "_").title() for name in CITYSCAPES.class_names]}},
            CITYSCAPES,
        ),
        (
            2,  # invalid metadata is ignored
            {"CLASSES": ["sky"], "PALETTE": [[1, 2, 3], [4, 5, 256]]},
            datasets.DatasetInfo("folder", ("class 0", "class 1"), datasets.voc_palette(2)),
        ),
    ],
)
def test_classes_come_from_the_metadata(classes, meta, expected, tmp_path):
    config = configured(mmseg(tmp_path / "pspnet_512x512.pth", classes=classes, **meta))
    assert datasets.describe(config.dataset) == expected


@pytest.mark.parametrize("changed", ["", "colors", "order"])
def test_our_files_keep_classes_and_colors_that_differ_from_the_benchmark(changed):
    names, colors = CITYSCAPES.class_names, CITYSCAPES.colors
    if changed == "colors":
        colors = ((1, 2, 3), *colors[1:])
    if changed == "order":
        names = names[::-1]
    config = base_config()
    config.dataset.update({"name": "folder" if changed else "cityscapes", "class_names": names, "colors": colors})
    described = json.loads(json.dumps(own.describe(config)))
    source = Source(path="model.safetensors", **own.fields("model.safetensors", described))
    assert settings._dataset(source, 19) == ("folder" if changed else "cityscapes", names, colors)


def test_an_incomplete_file_names_what_it_lacks(tmp_path):
    network = reference.SemsegPSPNet(18, 3)
    arrays = {key: value for key, value in network.state_dict().items() if key != "layer2.0.conv1.weight"}
    torch.save(arrays, tmp_path / "net.pth")
    with pytest.raises(UserError, match="lacks the first kernel of block 0 of stage 2; the file is incomplete"):
        weights.inspect(tmp_path / "net.pth")


class Grouped(reference.ResNet):
    def __init__(self):
        super().__init__(50)
        self.layer1[0].conv2 = torch.nn.Conv2d(64, 64, 3, groups=32, bias=False)


class Deeper(reference.ResNet):
    def __init__(self):
        super().__init__(50)
        self.layer4.append(self.layer4[1])


class TimmD(reference.TimmDeepResNet):
    def __init__(self):
        super().__init__(50, 32)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            layer[0].downsample = torch.nn.Sequential(torch.nn.AvgPool2d(2, 2), *layer[0].downsample)


class OtherHead(reference.MmsegPSPNet):
    def __init__(self):
        super().__init__(18, 19, "deep32", False)
        del self.decode_head.conv_seg


class WithoutPyramid(reference.MmsegPSPNet):
    def __init__(self):
        super().__init__(18, 19, "deep32", False)
        del self.decode_head.psp_modules


class TensorFlowKernels(reference.MmsegPSPNet):
    def __init__(self):
        super().__init__(18, 19, "deep32", False)
        kernel = self.backbone.layer1[0].conv2.weight
        self.backbone.layer1[0].conv2.weight = torch.nn.Parameter(kernel.permute(2, 3, 1, 0))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Grouped, "grouped or wide"),
        (Deeper, r"\(3, 4, 6, 4\) bottlenecks; expected a ResNet of depth 18, 34, 50"),
        (TimmD, "its shortcuts pool before they project, as in ResNet-D"),
        (OtherHead, "has no decode_head.conv_seg.bias; a network with another head, such as FCN or DeepLab"),
        (WithoutPyramid, "from mmsegmentation, but not a PSPNet: it has no decode_head.psp_modules"),
        (TensorFlowKernels, "transpose them to PyTorch's"),
        (lambda: torch.nn.Linear(2, 3), "It has 2 arrays in weight, bias, such as bias"),
        (lambda: reference.MmsegPSPNet(18, 1, "deep32", False), "its classifier has 1 output, as for a sigmoid"),
    ],
)
def test_an_unsupported_network_is_refused(build, words, tmp_path):
    path = write(tmp_path / "net.pth", build)
    with pytest.raises(ValueError, match=words) as refusal:
        weights.inspect(path)
    assert str(path) in str(refusal.value)


def test_an_unsupported_training_config_is_refused(tmp_path):
    for eps in ("0.001", "1e-3"):
        path = mmseg(tmp_path / "net.pth", cfg=f"norm_cfg = dict(type='SyncBN', eps={eps}, requires_grad=True)")
        with pytest.raises(ValueError, match=f"its config has eps={eps} in norm_cfg; only 1e-05 can be imported"):
            weights.inspect(path)
    stages = "strides=(1, 2, 1, 1), dilations=(1, 2, 4, 8)"
    for path in (mmseg(tmp_path / "net.pth", cfg=stages), mmseg(tmp_path / "pspnet_r50-d32_512x1024_80k_cityscapes.pth")):
        with pytest.raises(ValueError, match=r"its stages have strides .* with dilations .*expected 1,2,1,1 with 1,1,2,4 or"):
            weights.inspect(path)


def test_a_backbone_does_not_determine_a_config(tmp_path):
    path = write(tmp_path / "resnet50.pth", lambda: reference.ResNet(50))
    with pytest.raises(ValueError, match=f"train from it with --config.init_from={path}"):
        weights.configure(base_config(), weights.inspect(path))


def test_normalization_has_to_match_the_weights(tmp_path, caplog):
    """A normalization in the file's config cannot be overridden; an assumed one can, with a warning."""
    normalize = base_config().normalize
    assumed = weights.inspect(write(tmp_path / "resnet50.pth", lambda: reference.ResNet(50)))
    weights.check_normalize(normalize, assumed)
    normalize.std, normalize.order = (1.0, 1.0, 1.0), "BGR"
    assert not caplog.messages
    weights.check_normalize(normalize, assumed)
    assert "to be trained with --config.normalize.std=58.395,57.12,57.375 --config.normalize.order=RGB" in caplog.messages[0]
    normalize.std, normalize.order = base_config().normalize.std, "RGB"
    specified = weights.inspect(mmseg(tmp_path / "net.pth", 50, stem="conv7", config=OLD_CONFIG))
    with pytest.raises(ValueError) as refusal:
        weights.check_normalize(normalize, specified)
    assert str(refusal.value).endswith(
        "set --config.normalize.mean=123.68,116.779,103.939 --config.normalize.order=BGR --config.normalize.std=3.0,2.0,1.0"
    )
