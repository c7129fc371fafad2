"""Published PSPNets with their scores on a validation split, for `--mode verify`."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.table import Column, Table

from pspnet_jax.errors import UserError
from pspnet_jax.weights import own
from pspnet_jax.weights.source import Source

SCALES = {"one scale": (1.0,), "six scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}
CLASSES = {
    "ade20k": 150, "cityscapes": 19, "voc2012": 21, "pascal_context": 59, "coco_stuff": 171, "loveda": 7, "potsdam": 6
}  # fmt: skip
SPLITS = dict.fromkeys(CLASSES, "val") | {"ade20k": "validation"}
TOLERANCE = 0.1  # largest difference from a published score, in percentage points of mIoU
WHERE = {  # protocol -> where the scores are published; all read in 2026
    "semseg": "github.com/hszhao/semseg, README.md",
    "caffe": "github.com/hszhao/PSPNet, README.md",
    "mmseg": "github.com/open-mmlab/mmsegmentation, configs/pspnet/README.md",
}


class Published(NamedTuple):
    """A published network."""

    protocol: str  # see `config.eval.protocol`; also identifies the project
    dataset: str  # such as "ade20k"
    depth: int  # of the ResNet
    one_scale: float  # mIoU in percent; mmsegmentation's is without flipping, the others' are with it
    six_scales: float  # mIoU in percent, with flipping
    name: str = ""  # what its file's name begins with, if the project has several such networks

    def __str__(self) -> str:
        return self.name or f"PSPNet-{self.depth} of {WHERE[self.protocol].partition(',')[0]} for {self.dataset}"

    def evaluations(self) -> dict[str, tuple[dict[str, Any], float]]:
        """Returns the fields of config.eval and the published mIoU in percent of each evaluation, by title."""
        split = SPLITS[self.dataset]
        return {
            "one scale": ({"split": split, "scales": SCALES["one scale"]}, self.one_scale),
            "six scales": ({"split": split, "scales": SCALES["six scales"], "flip": True}, self.six_scales),
        }


PUBLISHED = (
    Published("semseg", "ade20k", 50, 41.89, 42.84),
    Published("semseg", "ade20k", 101, 43.10, 44.15),
    Published("semseg", "voc2012", 50, 77.05, 78.02),
    Published("semseg", "voc2012", 101, 79.07, 79.63),
    Published("semseg", "cityscapes", 50, 77.30, 78.38),
    Published("semseg", "cityscapes", 101, 78.63, 79.29),
    Published("caffe", "ade20k", 50, 41.68, 42.78),
    Published("caffe", "cityscapes", 101, 79.70, 80.91),
    Published("mmseg", "cityscapes", 50, 77.85, 79.18, "pspnet_r50-d8_512x1024_40k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 78.34, 79.74, "pspnet_r101-d8_512x1024_40k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 78.26, 79.88, "pspnet_r50-d8_769x769_40k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 79.08, 80.28, "pspnet_r101-d8_769x769_40k_cityscapes"),
    Published("mmseg", "cityscapes", 18, 74.87, 76.04, "pspnet_r18-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 78.55, 79.79, "pspnet_r50-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 78.47, 79.45, "pspnet_r50-d8_rsb-pretrain_512x1024_adamw_80k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 79.76, 81.01, "pspnet_r101-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 18, 75.90, 77.86, "pspnet_r18-d8_769x769_80k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 79.59, 80.69, "pspnet_r50-d8_769x769_80k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 79.77, 81.06, "pspnet_r101-d8_769x769_80k_cityscapes"),
    Published("mmseg", "cityscapes", 18, 74.23, 75.79, "pspnet_r18b-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 78.22, 79.46, "pspnet_r50b-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 79.69, 80.79, "pspnet_r101b-d8_512x1024_80k_cityscapes"),
    Published("mmseg", "cityscapes", 18, 74.92, 76.90, "pspnet_r18b-d8_769x769_80k_cityscapes"),
    Published("mmseg", "cityscapes", 50, 78.50, 79.96, "pspnet_r50b-d8_769x769_80k_cityscapes"),
    Published("mmseg", "cityscapes", 101, 78.87, 80.04, "pspnet_r101b-d8_769x769_80k_cityscapes"),
    Published("mmseg", "ade20k", 50, 41.13, 41.94, "pspnet_r50-d8_512x512_80k_ade20k"),
    Published("mmseg", "ade20k", 101, 43.57, 44.35, "pspnet_r101-d8_512x512_80k_ade20k"),
    Published("mmseg", "ade20k", 50, 42.48, 43.44, "pspnet_r50-d8_512x512_160k_ade20k"),
    Published("mmseg", "ade20k", 101, 44.39, 45.35, "pspnet_r101-d8_512x512_160k_ade20k"),
    Published("mmseg", "voc2012", 50, 76.78, 77.61, "pspnet_r50-d8_512x512_20k_voc12aug"),
    Published("mmseg", "voc2012", 101, 78.47, 79.25, "pspnet_r101-d8_512x512_20k_voc12aug"),
    Published("mmseg", "voc2012", 50, 77.29, 78.48, "pspnet_r50-d8_512x512_40k_voc12aug"),
    Published("mmseg", "voc2012", 101, 78.52, 79.57, "pspnet_r101-d8_512x512_40k_voc12aug"),
    Published("mmseg", "pascal_context", 101, 52.02, 53.54, "pspnet_r101-d8_480x480_40k_pascal_context_59"),
    Published("mmseg", "pascal_context", 101, 52.47, 53.99, "pspnet_r101-d8_480x480_80k_pascal_context_59"),
    Published("mmseg", "coco_stuff", 50, 38.80, 39.19, "pspnet_r50-d8_512x512_4x4_80k_coco-stuff164k"),
    Published("mmseg", "coco_stuff", 101, 40.34, 40.79, "pspnet_r101-d8_512x512_4x4_80k_coco-stuff164k"),
    Published("mmseg", "coco_stuff", 50, 39.64, 39.97, "pspnet_r50-d8_512x512_4x4_160k_coco-stuff164k"),
    Published("mmseg", "coco_stuff", 101, 41.28, 41.66, "pspnet_r101-d8_512x512_4x4_160k_coco-stuff164k"),
    Published("mmseg", "coco_stuff", 50, 40.53, 40.75, "pspnet_r50-d8_512x512_4x4_320k_coco-stuff164k"),
    Published("mmseg", "coco_stuff", 101, 41.95, 42.42, "pspnet_r101-d8_512x512_4x4_320k_coco-stuff164k"),
    Published("mmseg", "loveda", 18, 48.62, 47.57, "pspnet_r18-d8_512x512_80k_loveda"),
    Published("mmseg", "loveda", 50, 50.46, 50.19, "pspnet_r50-d8_512x512_80k_loveda"),
    Published("mmseg", "loveda", 101, 51.86, 51.34, "pspnet_r101-d8_512x512_80k_loveda"),
    Published("mmseg", "potsdam", 18, 77.09, 78.30, "pspnet_r18-d8_4x4_512x512_80k_potsdam"),
    Published("mmseg", "potsdam", 50, 78.12, 78.98, "pspnet_r50-d8_4x4_512x512_80k_potsdam"),
    Published("mmseg", "potsdam", 101, 78.62, 79.47, "pspnet_r101-d8_4x4_512x512_80k_potsdam"),
)


def find(source: Source) -> Published:
    """Returns the published network that a file contains, from its family, depth, number of classes and, if needed, its name.

    Raises:
      UserError: it is none of them, or its name does not say which; lists those that it may be.
    """
    if source.family is own.FAMILY:
        raise UserError(
            f"{source}; only networks of other projects have published scores: use --mode import and --mode evaluate"
        )
    project = [known for known in PUBLISHED if known.protocol == source.family.protocol]
    depth, classes = source.model["depth"], source.num_classes
    alike = [known for known in project if (known.depth, CLASSES[known.dataset]) == (depth, classes)]
    file = os.path.basename(source.path)
    if found := [known for known in alike if file.startswith(known.name)]:
        return found[0]
    if alike:
        names = "\n  ".join(known.name for known in alike)
        raise UserError(f"{source}; which one it is shows only in its name: rename it to begin with one of\n  {names}")
    if (source.family.protocol, classes, depth) == ("caffe", 21, 101):
        raise UserError(f"{source}; its published score, 85.41% mIoU, is on VOC 2012's test split, whose labels are not public")
    listed = "\n  ".join(map(str, project or PUBLISHED))
    raise UserError(f"{source}; no score on a validation split is published for it; there are scores for\n  {listed}")


def table(network: Published, scores: Mapping[str, float]) -> Table:
    """Returns a rich table of published scores and ours, in percent of mIoU, by the titles of `Published.evaluations`."""
    columns = (Column(name, justify="right") for name in ("published", "here", "difference"))
    found = Table(Column("mIoU, %"), *columns, title=str(network), caption=f"published in {WHERE[network.protocol]}")
    for title, (_, expected) in network.evaluations().items():
        found.add_row(title, f"{expected:.2f}", f"{scores[title]:.2f}", f"{scores[title] - expected:+.2f}")
    return found


def require_agreement(network: Published, scores: Mapping[str, float]) -> None:
    """Raises UserError if a score differs from the published one by more than the tolerance."""
    expected = {title: score for title, (_, score) in network.evaluations().items()}
    if wrong := [title for title in expected if round(abs(scores[title] - expected[title]), 2) > TOLERANCE]:
        differences = " and ".join(f"{scores[title] - expected[title]:+.2f} at {title}" for title in wrong)
        raise UserError(f"{network}: mIoU differs from the published one by {differences}; expected at most {TOLERANCE}")
