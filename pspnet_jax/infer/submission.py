"""Submission formats of the benchmarks' evaluation servers: one PNG per image.

Cityscapes expects its label ids, in files named like the images. ADE20K expects class indices that start at 1. VOC expects
palette PNGs in the folder of its competition 6, which allows any training data; upload an archive of results/.
"""

import dataclasses
import logging

import numpy as np
from PIL import Image

from pspnet_jax import datasets
from pspnet_jax.errors import UserError
from pspnet_jax.infer.draw import palette_image

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Submission:
    """One server's format."""

    dataset: str  # defines the classes and the values to write (see `datasets.RAW_VALUES`)
    folder: str = ""  # of the files, relative to the output
    palette: bool = False  # whether the files are palette images in VOC's colors

    def encode(self, label: np.ndarray) -> Image.Image:
        """Converts class indices uint8[H, W], 0 to K-1, to the image to submit."""
        raw = np.array(datasets.RAW_VALUES[self.dataset], np.uint8)[label]
        return palette_image(raw, datasets.voc_palette(256)) if self.palette else Image.fromarray(raw)


SUBMISSIONS = {
    "cityscapes": Submission("cityscapes"),
    "ade20k": Submission("ade20k"),
    "voc": Submission("voc2012", "results/VOC2012/Segmentation/comp6_test_cls", palette=True),
}


def choose(server_format: str, info: datasets.DatasetInfo) -> Submission:
    """Returns the server's format; warns if the network's classes have other names.

    Raises:
      UserError: the format is unknown, or the network's classes differ in number or order.
    """
    if server_format not in SUBMISSIONS:
        raise UserError(f"--format {server_format}: expected one of {', '.join(SUBMISSIONS)}")
    expected = datasets.table(SUBMISSIONS[server_format].dataset).class_names
    if info.num_classes != len(expected):
        raise UserError(
            f"--format {server_format}: its server scores {len(expected)} classes, but this network predicts the "
            f"{info.num_classes} of {info.name!r}"
        )
    differing = datasets.differing_classes(expected, info.class_names)
    known = {name.lower() for name in expected}
    for index, server_name, own_name in sorted(differing, key=lambda each: each[2].lower() not in known):
        message = f"--format {server_format}: class {index} is {server_name!r} on its server, but {own_name!r} in this network"
        if own_name.lower() in known:
            raise UserError(f"{message}, whose classes have another order; the server cannot score its predictions")
        logger.warning(f"{message}; classes are submitted by index, whatever their names")
        break
    return SUBMISSIONS[server_format]
