"""The settings in an mmsegmentation checkpoint: from the text of its training config in "meta", or from the zoo's file name."""

import re
from collections.abc import Mapping
from typing import Any

from pspnet_jax.errors import UserError

_DIGITS, _SIDES = r"\((\d(?:,\d)*),?\)", r"\((\d{1,5},\d{1,5}),?\)"
# The settings that matter, and how a config's text without white space has them; of several patterns the first found counts.
PATTERNS = (
    ("align_corners", r"align_corners=(\w+)"),
    ("contract_dilation", r"contract_dilation=(\w+)"),
    ("eps", r"norm_cfg=dict\([^)]*\beps=([\w.+-]+)"),
    ("style", r"style=('\w+')"),
    ("strides", rf"\bstrides={_DIGITS}"),
    ("dilations", rf"\bdilations={_DIGITS}"),
    ("pool_scales", r"pool_scales=\((\d{1,3}(?:,\d{1,3})*),?\)"),
    ("to_rgb", r"to_rgb=(False)"),
    ("mean", r"\bmean=\[([^\]]*)\]"),
    ("std", r"\bstd=\[([^\]]*)\]"),
    ("mode", r"mode='(slide)'"),
    ("crop_size", rf"\bcrop_size={_SIDES}"),
    ("stride", rf"\bstride={_SIDES}"),
    ("scale", rf"\(keep_ratio=True,scale={_SIDES},type='Resize'"),  # of the test pipeline; that of training is random
    ("scale", rf"\(type='Resize',scale={_SIDES},keep_ratio=True"),
    ("scale", rf"\bimg_scale={_SIDES}(?!,ratio_range)"),
)
ZOO = {  # a part of the zoo's file names, and the settings of such a model; the first that is found counts
    "769x769": {"align_corners": "True", "mode": "slide", "crop_size": "769,769", "stride": "513,513", "scale": "2049,1025"},
    "480x480": {"align_corners": "False", "mode": "slide", "crop_size": "480,480", "stride": "320,320"},
    r"-d32.*\d{3}x\d{3}": {"align_corners": "False", "strides": "1,2,2,2", "dilations": "1,1,2,4"},
    r"\d{3}x\d{3}": {"align_corners": "False"},
}
# Field of config.model: the setting, and what its values mean.
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "align_corners": ("align_corners", {"True": True, "False": False}),
    "first_block_dilation": ("contract_dilation", {"True": "half", "False": "full"}),
    "stride_in": ("style", {"'pytorch'": "conv3x3", "'caffe'": "conv1x1"}),
}
EPSILONS = ("1e-05", "1e-5", "0.00001")  # of batch normalization: ours
# Strides and dilations of the stages -> output stride. The zoo's -d32 has (1, 2, 2, 2) with (1, 1, 2, 4).
STAGES = {("1,2,1,1", "1,1,2,4"): 8, ("1,2,2,1", "1,1,1,2"): 16, ("1,2,2,2", "1,1,1,1"): 32}

Settings = Mapping[str, str]


def settings_by_name(name: str) -> Settings:
    """The settings that the name of a file of the zoo implies."""
    return next((found for part, found in ZOO.items() if re.search(part, name)), {})


def settings(metadata: Mapping[str, Any]) -> Settings:
    """The settings of the training config, as it writes them; none without a config."""
    text = metadata.get("cfg") or metadata.get("config")  # mmengine's key, mmcv's
    text = re.sub(r"\s", "", text if isinstance(text, str) else "")
    found: dict[str, str] = {}
    for setting, pattern in PATTERNS:
        if match := re.search(pattern, text):
            found.setdefault(setting, match[1])
    return found


def model_fields(path: str, settings: Settings) -> dict[str, Any]:
    """The fields of config.model that the settings decide; a value that our network lacks is a UserError."""
    fields: dict[str, Any] = {}
    if settings.get("eps", EPSILONS[0]) not in EPSILONS:
        raise UserError(f"{path}: its config has eps={settings['eps']} in norm_cfg; what can be imported is {EPSILONS[0]}")
    for field, (setting, values) in FIELDS.items():
        if value := settings.get(setting):
            if value not in values:
                raise UserError(f"{path}: its config has {setting}={value}; what can be imported is {' or '.join(values)}")
            fields[field] = values[value]
    if "strides" in settings and "dilations" in settings:
        stages = settings["strides"], settings["dilations"]
        if stages not in STAGES:
            supported = " or ".join(f"{strides} with {dilations}" for strides, dilations in STAGES)
            raise UserError(f"{path}: its stages have strides {stages[0]} with dilations {stages[1]}; expected {supported}")
        fields["output_stride"] = STAGES[stages]
    if "pool_scales" in settings:
        fields["bins"] = _integers(settings["pool_scales"])
    return fields


def normalize_fields(settings: Settings) -> dict[str, Any]:
    """The fields of config.normalize; the config's mean and std are in the order in which the network takes the channels."""
    fields: dict[str, Any] = {}
    for field in ("mean", "std"):
        values = tuple(map(float, re.findall(r"\d+(?:\.\d+)?", settings.get(field, ""))))
        if len(values) == 3:
            fields |= {
                field: values[::-1] if "to_rgb" in settings else values,
                "order": "BGR" if "to_rgb" in settings else "RGB",
            }
    return fields


def evaluation_fields(settings: Settings, num_classes: int) -> dict[str, Any]:
    """The fields of config.eval: one scale without flip, in windows if the config has them, else whole images.

    Where the config does not give the size that images shrink or grow to, it is 2048x1024 for Cityscapes (19 classes), and
    (2048, 512), long and short side at most, for others.
    """
    sides = _integers(settings.get("scale", "2048,1024" if num_classes == 19 else "2048,512"))
    fields: dict[str, Any] = {"protocol": "mmseg", "inference": "whole", "scales": (1.0,), "flip": False}
    fields |= {"base_size": max(sides), "short_size": min(sides)}
    if {"mode", "crop_size", "stride"} <= settings.keys():
        fields |= {"inference": "windows", "crop": _integers(settings["crop_size"]), "stride": _integers(settings["stride"])}
    return fields


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def classes(metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    """The classes' names and colors, whatever "meta" has in their places."""
    info = metadata.get("dataset_meta")  # mmengine's place; mmcv's is "meta" itself, in capitals
    if isinstance(info, Mapping):
        return info.get("classes"), info.get("palette")
    return metadata.get("CLASSES"), metadata.get("PALETTE")
