"""Compares the NumPy version of protocol mmseg (tests/infer/reference.py) with mmsegmentation's test-time augmentation.

python -m benchmarks.mmseg_protocol    # needs mmsegmentation, mmcv-lite, mmengine and torch; does not import pspnet_jax
"""

import sys
import types
from typing import Any

import numpy as np
import torch

from tests.infer import reference

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# image, base_size, short_size, scales, flip, crop, stride, inference
CASES = (
    ((14, 18), 0, 0, SIX, True, (11, 9), (8, 6), "windows"),
    ((37, 60), 0, 0, (0.5, 1.25, 1.5), True, (11, 9), (5, 7), "windows"),
    ((30, 17), 33, 15, (0.5, 1.0), True, (11, 9), (11, 4), "windows"),
    ((30, 17), 33, 15, (0.5, 1.0), True, (11, 9), (11, 4), "whole"),
    ((64, 48), 0, 0, (1.0,), False, (33, 33), (22, 22), "windows"),
)


class Absent(types.ModuleType):
    """A stand-in for the compiled mmcv.ops, which mmcv-lite lacks and this benchmark does not use."""

    __path__: tuple = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def segmentor(case: types.SimpleNamespace, align_corners: bool) -> Any:
    """Returns mmsegmentation's EncoderDecoder around the network of the reference."""
    from mmengine.config import ConfigDict
    from mmengine.model import BaseModel
    from mmseg.models import EncoderDecoder, SegDataPreProcessor

    class Tiny(EncoderDecoder):
        def __init__(self) -> None:
            BaseModel.__init__(self, SegDataPreProcessor(mean=MEAN, std=STD, bgr_to_rgb=True))
            mode = {"windows": "slide", "whole": "whole"}[case.inference]
            self.test_cfg = ConfigDict(mode=mode, crop_size=case.crop, stride=case.stride)
            self.align_corners, self.out_channels = align_corners, reference.CLASSES

        def encode_decode(self, inputs: torch.Tensor, batch_img_metas: list) -> torch.Tensor:
            logits = reference.network(inputs.double().permute(0, 2, 3, 1).numpy())
            return torch.from_numpy(np.ascontiguousarray(logits)).permute(0, 3, 1, 2).float()

    return Tiny()


def theirs(image: np.ndarray, case: types.SimpleNamespace, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the labels [H, W] of SegTTAModel, and the probabilities [H, W, K] that they maximize."""
    from mmcv.transforms import TestTimeAug
    from mmseg.models import SegTTAModel

    if case.base_size:
        sizes = [{"scale": (int(case.base_size * s), int(case.short_size * s))} for s in case.scales]
    else:
        sizes = [{"scale_factor": s} for s in case.scales]
    resizes = [{"type": "Resize", "keep_ratio": True, **size} for size in sizes]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in ((0.0, 1.0) if case.flip else (0.0,))]
    augment = TestTimeAug([resizes, flips, [{"type": "PackSegInputs"}]])
    shape = image.shape[:2]
    views = augment({"img": image[..., ::-1].copy(), "img_shape": shape, "ori_shape": shape, "img_path": ""})
    network, samples = segmentor(case, align_corners), []
    for view, sample in zip(views["inputs"], views["data_samples"], strict=True):
        batch = network.data_preprocessor({"inputs": [view], "data_samples": [sample]})
        samples += network.predict(batch["inputs"], batch["data_samples"])
    (merged,) = SegTTAModel.merge_preds(types.SimpleNamespace(module=network), [samples])
    probabilities = sum(sample.seg_logits.data.softmax(0) for sample in samples) / len(samples)
    return merged.pred_sem_seg.data.squeeze().numpy(), probabilities.permute(1, 2, 0).numpy()


def main() -> None:
    sys.modules["mmcv.ops"] = Absent("mmcv.ops")
    from mmseg.utils import register_all_modules

    register_all_modules()
    names = ("size", "base_size", "short_size", "scales", "flip", "crop", "stride", "inference")
    print("| image | scales | inference | align_corners | largest difference of probabilities | labels that differ |")
    print("| --- " * 6 + "|")
    for values in CASES:
        case = types.SimpleNamespace(**dict(zip(names, values, strict=True)))
        for align_corners in (True, False):
            image = np.random.default_rng(0).integers(0, 256, (*case.size, 3), dtype=np.uint8)
            labels, probabilities = theirs(image, case, align_corners)
            model, normalize = types.SimpleNamespace(align_corners=align_corners), types.SimpleNamespace(mean=MEAN, std=STD)
            config = types.SimpleNamespace(eval=case, model=model, normalize=normalize)
            ours = reference.mmseg(reference.network, image, config)
            worst, wrong = abs(ours - probabilities).max(), (ours.argmax(-1) != labels).sum()
            print(f"| {case.size} | {case.scales} | {case.inference} | {align_corners} | {worst:.1e} | {wrong} |")


if __name__ == "__main__":
    main()
