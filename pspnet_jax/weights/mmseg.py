"""What mmsegmentation's checkpoints tell beside the weights: the training config's text in "meta", or the zoo's file name."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Field of config.model: its pattern in the text, and what the values mean.
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "align_corners": (r"align_corners=(\w+)", {"True": True, "False": False}),
    "first_block_dilation": (r"contract_dilation=(\w+)", {"True": "half", "False": "full"}),
    "stride_in": (r"style='(\w+)'", {"pytorch": "conv3x3", "caffe": "conv1x1"}),
}
# Strides and dilations of the stages in the text -> output stride. The zoo's -d32 has (1, 2, 2, 2) with (1, 1, 2, 4).
STAGES = {("1,2,1,1", "1,1,2,4"): 8, ("1,2,2,1", "1,1,1,2"): 16, ("1,2,2,2", "1,1,1,1"): 32}
_SIDES = r"scale=\((\d{1,5}),(\d{1,5}),?\)"
TEST_SCALE = (  # of the test pipeline; that of training draws its scale
    rf"\(keep_ratio=True,{_SIDES},type='Resize'",
    rf"\(type='Resize',{_SIDES},keep_ratio=True",
    rf"\bimg_{_SIDES}(?!,ratio_range)",
)
ZOO = {  # a part of the zoo's file names, and the text that such a model's config has; the first that is found counts
    "769x769": "align_corners=True, mode='slide', crop_size=(769, 769), stride=(513, 513), img_scale=(2049, 1025)",
    "480x480": "align_corners=False, mode='slide', crop_size=(480, 480), stride=(320, 320)",
    r"-d32.*\d{3}x\d{3}": "align_corners=False, strides=(1, 2, 2, 2), dilations=(1, 1, 2, 4)",
    r"\d{3}x\d{3}": "align_corners=False",
}


def config_text(metadata: Mapping[str, Any], name: str) -> str:
    """The training config as Python text without white space, or what the file name tells of it; "" where neither does."""
    text = metadata.get("cfg") or metadata.get("config")  # mmengine's key, mmcv's
    if not isinstance(text, str):
        text = next((text for part, text in ZOO.items() if re.search(part, name)), "")
    return re.sub(r"\s", "", text)


def model_fields(path: os.PathLike, text: str) -> dict[str, Any]:
    """The fields of config.model that the text tells.

    Raises:
      ValueError: a value that our network lacks.
    """
    fields: dict[str, Any] = {}
    for field, (pattern, values) in FIELDS.items():
        if found := re.search(pattern, text):
            if found[1] not in values:
                raise ValueError(f"{path}: its config has {found[0]}; what can be imported is {' or '.join(values)}")
            fields[field] = values[found[1]]
    stages = [re.search(rf"\b{field}=\((\d(?:,\d)*),?\)", text) for field in ("strides", "dilations")]
    if stages[0] and stages[1]:
        key = stages[0][1], stages[1][1]
        if key not in STAGES:
            supported = " or ".join(f"{strides} with {dilations}" for strides, dilations in STAGES)
            raise ValueError(f"{path}: its stages have strides {key[0]} with dilations {key[1]}; expected {supported}")
        fields["output_stride"] = STAGES[key]
    if found := re.search(r"pool_scales=\((\d{1,3}(?:,\d{1,3})*),?\)", text):
        fields["bins"] = tuple(map(int, found[1].split(",")))
    return fields


def normalize_fields(text: str) -> dict[str, Any]:
    """The fields of config.normalize that the text tells; its mean and std are in the order in which the network takes them."""
    order = "BGR" if "to_rgb=False" in text else "RGB"
    fields: dict[str, Any] = {"order": order}
    for field in ("mean", "std"):
        found = re.search(rf"\b{field}=\[([^\]]*)\]", text)
        values = tuple(map(float, re.findall(r"\d+(?:\.\d+)?", found[1]))) if found else ()
        if len(values) == 3:
            fields[field] = values if order == "RGB" else values[::-1]
    return fields


def evaluation_fields(text: str, num_classes: int) -> dict[str, Any]:
    """The fields of config.eval: one scale without flip, in windows if the text has them, else whole images.

    Where the text does not tell the size that images shrink or grow to, it is 2048x1024 for Cityscapes (19 classes), and
    (2048, 512), long and short side at most, for others.
    """
    fields: dict[str, Any] = {"protocol": "mmseg", "inference": "whole", "scales": (1.0,), "flip": False}
    scale = next((found for pattern in TEST_SCALE if (found := re.search(pattern, text))), None)
    sides = (int(scale[1]), int(scale[2])) if scale else (2048, 1024 if num_classes == 19 else 512)
    fields |= {"base_size": max(sides), "short_size": min(sides)}
    crop, stride = (re.search(rf"\b{field}=\((\d{{1,5}}),(\d{{1,5}}),?\)", text) for field in ("crop_size", "stride"))
    if "mode='slide'" in text and crop and stride:
        sizes = {"crop": (int(crop[1]), int(crop[2])), "stride": (int(stride[1]), int(stride[2]))}
        fields |= {"inference": "windows", **sizes}
    return fields


def classes(metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    """The classes' names and colors, whatever "meta" has in their places."""
    told = metadata.get("dataset_meta")  # mmengine's place; mmcv's is "meta" itself, in capitals
    if isinstance(told, Mapping):
        return told.get("classes"), told.get("palette")
    return metadata.get("CLASSES"), metadata.get("PALETTE")
