"""Table 1 of the paper: pooling, bins and dimension reduction (DR) of the pyramid. ADE20K, depth 50, one scale.

python -m pspnet_jax.main --config configs/ablations/pooling.py:B1_max --config.dataset.root=DIR
python -m pspnet_jax.ablate pooling --dataset scenes   # trains all rows, three times each; also camvid, ade20k
"""

from pspnet_jax.ablate import Row, Table

TABLE = Table(
    rows={  # published: mIoU, pixel accuracy
        "none": Row({"model.bins": ()}, (37.23, 78.01)),
        "B1_max": Row({"model.bins": (1,), "model.pool": "max"}, (39.94, 79.46)),
        "B1_average": Row({"model.bins": (1,)}, (40.07, 79.52)),
        "B1236_max": Row({"model.pool": "max", "model.reduce_channels": False}, (40.18, 79.45)),
        "B1236_average": Row({"model.reduce_channels": False}, (41.07, 79.97)),
        "B1236_max_DR": Row({"model.pool": "max"}, (40.87, 79.61)),
        "B1236_average_DR": Row({}, (41.68, 80.04)),
    },
    reference="B1236_average_DR",
    order=(
        ("B1_average", "none"),
        ("B1_average", "B1_max"),
        ("B1236_average", "B1236_max"),
        ("B1236_average_DR", "B1236_max_DR"),
        ("B1236_average", "B1_average"),
        ("B1236_max_DR", "B1236_max"),
        ("B1236_average_DR", "B1236_average"),
    ),
)
get_config = TABLE.get_config
