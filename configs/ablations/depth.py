"""Table 3 of the paper: the depth of the network. ADE20K, at one scale and at six (ms). 18 and 34 are for small datasets.

python -m pspnet_jax.main --config configs/ablations/depth.py:101 --config.dataset.root=DIR
python -m pspnet_jax.ablate depth --dataset scenes   # trains all rows, three times each; also camvid, ade20k
"""

from pspnet_jax.ablate import Row, Table
from pspnet_jax.ablate.tables import MULTI_SCALE, SMALL

LARGE = ("ade20k",)
TABLE = Table(
    rows={  # published: mIoU, pixel accuracy
        "18": Row({"model.depth": 18}, datasets=SMALL),
        "34": Row({"model.depth": 34}, datasets=SMALL),
        "50": Row({"model.depth": 50}, (41.68, 80.04)),
        "101": Row({"model.depth": 101}, (41.96, 80.64), LARGE),
        "152": Row({"model.depth": 152}, (42.62, 80.80), LARGE),
        "269": Row({"model.depth": 269}, (43.81, 80.88), LARGE),
        "50_ms": Row(MULTI_SCALE, (42.78, 80.76), network="50"),
        "101_ms": Row(MULTI_SCALE, (43.29, 81.39), LARGE, network="101"),
        "152_ms": Row(MULTI_SCALE, (43.51, 81.38), LARGE, network="152"),
        "269_ms": Row(MULTI_SCALE, (44.94, 81.69), LARGE, network="269"),
    },
    reference="50",
    order=(
        ("34", "18"),
        ("50", "34"),
        ("101", "50"),
        ("152", "101"),
        ("269", "152"),
        ("50_ms", "50"),
        ("101_ms", "101"),
        ("152_ms", "152"),
        ("269_ms", "269"),
    ),
)
get_config = TABLE.get_config
