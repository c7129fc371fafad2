"""Variants of PSPNet that others describe, without figures in the paper: bins 1, 2, 4, 8, also at crops of 320 and 512 pixels,
where they divide the feature map evenly; a head of 1x1 convolutions; an auxiliary weight that decays linearly to 0.

python -m pspnet_jax.main --config configs/ablations/variants.py:head1x1 --config.dataset.root=DIR
python -m pspnet_jax.ablate variants --dataset scenes   # trains all rows, three times each; also camvid, ade20k
"""

from pspnet_jax.ablate import Row, Table

BINS = {"model.bins": (1, 2, 4, 8)}


def crop(size: int) -> dict[str, tuple[int, int]]:
    return {"augment.crop": (size, size), "eval.crop": (size, size)}


TABLE = Table(
    rows={
        "pspnet": Row({}, (41.68, 80.04)),
        "bins1248": Row(BINS),
        "bins1248_320": Row({**BINS, **crop(320)}, datasets=("ade20k",)),
        "bins1248_512": Row({**BINS, **crop(512)}, datasets=("ade20k",)),
        "head1x1": Row({"model.head_kernel": 1}),
        "decay": Row({"loss.auxiliary_schedule": "linear"}),
    },
    reference="pspnet",
)
get_config = TABLE.get_config
