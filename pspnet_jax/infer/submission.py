"""What the benchmarks' evaluation servers take: one PNG an image, with names and values of their own.

Cityscapes wants its label ids, in files named like the images; ADE20K indices that count from 1; VOC palette PNGs in the folder
of its sixth competition (any training data), which go to the server as an archive of results/.
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
    """One server's form."""

    dataset: str  # whose classes are predicted, and whose values are written (see `datasets.RAW_VALUES`)
    folder: str = ""  # where the files go under the output
    palette: bool = False  # whether they have VOC's colors

    def encode(self, label: np.ndarray) -> Image.Image:
        """Returns the classes uint8[H, W], each from 0 to K-1, as the picture to send."""
        raw = np.array(datasets.RAW_VALUES[self.dataset], np.uint8)[label]
        return palette_image(raw, datasets.voc_palette(256)) if self.palette else Image.fromarray(raw)


SUBMISSIONS = {
    "cityscapes": Submission("cityscapes"),
    "ade20k": Submission("ade20k"),
    "voc": Submission("voc2012", "results/VOC2012/Segmentation/comp6_test_cls", palette=True),
}


def choose(form: str, info: datasets.DatasetInfo) -> Submission:
    """Returns the server's form, if the network predicts its classes; other names for them are a warning.

    Raises:
      UserError: there is no such form, the number of classes is another, or their order.
    """
    if form not in SUBMISSIONS:
        raise UserError(f"--format {form}: expected one of {', '.join(SUBMISSIONS)}")
    expected = datasets.table(SUBMISSIONS[form].dataset).class_names
    if info.num_classes != len(expected):
        raise UserError(
            f"--format {form}: its server scores {len(expected)} classes, but this network predicts the {info.num_classes} of "
            f"{info.name!r}"
        )
    differing = datasets.differing_classes(expected, info.class_names)
    known = {name.lower() for name in expected}
    for index, there, here in sorted(differing, key=lambda each: each[2].lower() not in known):
        said = f"--format {form}: class {index} is {there!r} to its server, but {here!r} to this network"
        if here.lower() in known:
            raise UserError(f"{said}, whose classes have another order: what it predicts cannot be scored there")
        logger.warning(f"{said}; classes are sent by their number, whatever their names")
        break
    return SUBMISSIONS[form]
