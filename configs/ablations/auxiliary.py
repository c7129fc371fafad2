"""Table 2 of the paper: the weight of the auxiliary loss, without a pyramid. ADE20K, depth 50, one scale.

python -m pspnet_jax.main --config configs/ablations/auxiliary.py:0.3 --config.dataset.root=DIR
python -m pspnet_jax.ablate auxiliary --dataset scenes   # trains all rows, three times each; also camvid, ade20k
"""

from pspnet_jax.ablate import Row, Table

BASELINE = {"model.bins": ()}
TABLE = Table(
    rows={  # published: mIoU, pixel accuracy
        "0": Row({**BASELINE, "model.auxiliary": False}, (35.82, 77.07)),
        "0.3": Row({**BASELINE, "loss.auxiliary_weight": 0.3}, (37.01, 77.87)),
        "0.4": Row({**BASELINE, "loss.auxiliary_weight": 0.4}, (37.23, 78.01)),
        "0.6": Row({**BASELINE, "loss.auxiliary_weight": 0.6}, (37.09, 77.84)),
        "0.9": Row({**BASELINE, "loss.auxiliary_weight": 0.9}, (36.99, 77.87)),
    },
    reference="0.4",
    order=(("0.4", "0"), ("0.4", "0.3"), ("0.4", "0.6"), ("0.4", "0.9")),
)
get_config = TABLE.get_config
