"""Table 4 of the paper, step by step from the dilated ResNet to PSPNet: data augmentation, auxiliary loss, pyramid, depth 269
and six scales (ms). ADE20K, depth 50 where not said otherwise.

The paper does not say what the baseline does without augmentation; here, it trains on random crops of the unchanged images.

python -m pspnet_jax.main --config configs/ablations/components.py:baseline --config.dataset.root=DIR
python -m pspnet_jax.ablate components --dataset scenes   # trains all rows, three times each; also camvid, ade20k
"""

from pspnet_jax.ablate import Row, Table
from pspnet_jax.ablate.tables import MULTI_SCALE

DILATED = {"model.bins": (), "model.auxiliary": False}
NO_AUGMENTATION = {
    "augment.scale": (1.0, 1.0),
    "augment.rotate_probability": 0.0,
    "augment.blur_probability": 0.0,
    "augment.flip_probability": 0.0,
}
TABLE = Table(
    rows={  # published: mIoU, pixel accuracy
        "baseline": Row({**DILATED, **NO_AUGMENTATION}, (34.28, 76.35)),
        "augmentation": Row(DILATED, (35.82, 77.07)),
        "auxiliary": Row({"model.bins": ()}, (37.23, 78.01)),
        "pyramid": Row({}, (41.68, 80.04)),
        "R269": Row({"model.depth": 269}, (43.81, 80.88), ("ade20k",)),
        "R269_ms": Row(MULTI_SCALE, (44.94, 81.69), ("ade20k",), network="R269"),
    },
    reference="baseline",
    order=(
        ("augmentation", "baseline"),
        ("auxiliary", "augmentation"),
        ("pyramid", "auxiliary"),
        ("R269", "pyramid"),
        ("R269_ms", "R269"),
    ),
)
get_config = TABLE.get_config
