"""Settings of mmsegmentation checkpoints, from the training config in "meta" or from the file name in the model zoo."""

import re
from collections.abc import Mapping
from typing import Any

from pspnet_jax.errors import UserError

_DIGITS, _SIDES = r"\((\d(?:,\d)*),?\)", r"\((\d{1,5},\d{1,5}),?\)"
# Settings and their patterns in the text of a config without white space; the first pattern that matches is used.
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
    ("scale", rf"\(keep_ratio=True,scale={_SIDES},type='Resize'"),  # of the test pipeline; in training it is random
    ("scale", rf"\(type='Resize',scale={_SIDES},keep_ratio=True"),
    ("scale", rf"\bimg_scale={_SIDES}(?!,ratio_range)"),
)
ZOO = {  # patterns of file names in the model zoo, and the settings they imply; the first match is used
    "769x769": {"align_corners": "True", "mode": "slide", "crop_size": "769,769", "stride": "513,513", "scale": "2049,1025"},
    "480x480": {"align_corners": "False", "mode": "slide", "crop_size": "480,480", "stride": "320,320", "scale": "520,520"},
    "potsdam": {"align_corners": "False", "scale": "512,512"},
    "loveda": {"align_corners": "False", "scale": "1024,1024"},
    r"-d32.*\d{3}x\d{3}": {"align_corners": "False", "strides": "1,2,2,2", "dilations": "1,1,2,4"},
    r"\d{3}x\d{3}": {"align_corners": "False"},
}
# Field of config.model -> the setting, and the field's value for each value of the setting.
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "align_corners": ("align_corners", {"True": True, "False": False}),
    "first_block_dilation": ("contract_dilation", {"True": "half", "False": "full"}),
    "stride_in": ("style", {"'pytorch'": "conv3x3", "'caffe'": "conv1x1"}),
}
EPSILONS = ("1e-05", "1e-5", "0.00001")  # of our batch normalization, in all spellings
# (strides, dilations) of the stages -> output stride. The zoo's -d32 models, (1, 2, 2, 2) with (1, 1, 2, 4), are not supported.
STAGES = {("1,2,1,1", "1,1,2,4"): 8, ("1,2,2,1", "1,1,1,2"): 16, ("1,2,2,2", "1,1,1,1"): 32}

Settings = Mapping[str, str]


def settings_from_name(name: str) -> Settings:
    """Returns the settings that the name of a model zoo file implies."""
    return next((found for part, found in ZOO.items() if re.search(part, name)), {})


def settings(metadata: Mapping[str, Any]) -> Settings:
    """Returns the settings in the training config, as text; an empty dict if there is no config."""
    text = metadata.get("cfg") or metadata.get("config")  # the keys of mmengine and mmcv
    text = re.sub(r"\s", "", text if isinstance(text, str) else "")
    found: dict[str, str] = {}
    for setting, pattern in PATTERNS:
        if match := re.search(pattern, text):
            found.setdefault(setting, match[1])
    return found


def model_fields(path: str, settings: Settings) -> dict[str, Any]:
    """Returns the fields of config.model that the settings specify.

    Raises:
      UserError: a value is not supported.
    """
    fields: dict[str, Any] = {}
    if settings.get("eps", EPSILONS[0]) not in EPSILONS:
        raise UserError(f"{path}: its config has eps={settings['eps']} in norm_cfg; only {EPSILONS[0]} can be imported")
    for field, (setting, values) in FIELDS.items():
        if value := settings.get(setting):
            if value not in values:
                raise UserError(f"{path}: its config has {setting}={value}; only {' or '.join(values)} can be imported")
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
    """Returns the fields of config.normalize. mmseg lists mean and std in the channel order of the network."""
    fields: dict[str, Any] = {}
    is_bgr = "to_rgb" in settings
    for field in ("mean", "std"):
        values = tuple(map(float, re.findall(r"\d+(?:\.\d+)?", settings.get(field, ""))))
        if len(values) == 3:
            fields[field] = values[::-1] if is_bgr else values
            fields["order"] = "BGR" if is_bgr else "RGB"
    return fields


def evaluation_fields(settings: Settings, num_classes: int) -> dict[str, Any]:
    """Returns the fields of config.eval: one scale, no flip, and windows if the config has them, else whole images.

    If the config does not give the image size, it is 2048x1024 for Cityscapes (19 classes), otherwise at most 2048 pixels on
    the long side and 512 on the short side.
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
    """Returns the unchecked class names and colors of "meta"."""
    info = metadata.get("dataset_meta")  # of mmengine; mmcv has them in "meta" itself, in capitals
    if isinstance(info, Mapping):
        return info.get("classes"), info.get("palette")
    return metadata.get("CLASSES"), metadata.get("PALETTE")
