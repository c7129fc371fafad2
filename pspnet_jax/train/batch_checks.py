"""Checks the batches that a user's function yields, because JAX would misinterpret wrong ones or fail with an unclear error."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import parallel
from pspnet_jax.errors import UserError

HostBatch = Mapping[str, np.ndarray]


def check_first(config: ConfigDict, mesh: Mesh, batch: HostBatch | None) -> HostBatch:
    """Returns the first batch after checking its arrays.

    Raises:
      UserError: there is no batch, an array is missing, or its type or shape is wrong; says what is expected.
    """
    if batch is None:
        raise UserError("there is no batch to train on")
    if not isinstance(batch, Mapping):
        raise UserError(f"the first batch is a {type(batch).__name__}; expected a dict of NumPy arrays")
    if "image" not in batch:
        raise UserError(f"the batches have {', '.join(batch)}; expected an array named image")
    size, share = np.shape(batch["image"])[1:3], config.batch_size // parallel.data_share(mesh)[1]
    channels, dtype = config.model.channels, config.dataset.image_dtype
    for name in ("image", *batch):
        if not hasattr(batch[name], "dtype"):
            raise UserError(f"the first batch's {name} is a {type(batch[name]).__name__}; expected a NumPy array")
        array = np.asarray(batch[name])
        found, expected = f"is {array.dtype}{list(array.shape)}", ""
        if name == "image" and (array.dtype != dtype or array.shape[3:] != (channels,)):
            expected = f"{dtype}[N, H, W, {channels}], not normalized"
        elif name == "label" and not np.issubdtype(array.dtype, np.integer):
            expected = "integers"
        elif name == "label" and array.ndim == 3 and array.shape[1:] != size:
            expected = "[N, {}, {}], the size of the images".format(*size)
        elif array.shape[:1] != (share,):
            expected = f"{share} examples along the first axis, this process's share of batch_size={config.batch_size}"
        if expected:
            raise UserError(f"the first batch's {name} {found}; expected {expected}")
    return batch


def check_rest(first: HostBatch, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
    """Yields the batches, after checking that each has the same dtypes and number of examples as the first."""

    def formats(batch: HostBatch) -> dict[str, str]:
        return {name: f"{array.dtype}[{len(array)}, ...]" for name, array in batch.items()}

    expected = formats(first)
    for batch in batches:
        if (found := formats(batch)) != expected:
            raise UserError(f"a batch has {found}, but the first one had {expected}; all batches need the same format")
        yield batch
