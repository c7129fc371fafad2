"""The device mesh, its shardings, the transfer of host batches to devices, and coordination between processes.

Programs are written as if for one device and compiled for the mesh. Its axis "data" divides the batch, and its axis "spatial"
the height of images and features, so that images can be larger than one device has memory for. The compiler adds what this
needs: convolutions exchange rows between neighbors, batch normalization and pooling add up their sums over all devices.
"""

import collections
import contextlib
import itertools
import json
import logging
import socket
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspnet_jax import clusters, peers, rendezvous
from pspnet_jax.clusters import Place
from pspnet_jax.errors import UserError, user_message

logger = logging.getLogger(__name__)
TIMEOUT_MS = 24 * 3600 * 1000  # for the slowest process; one that has died is noticed much earlier
_exchanges = itertools.count()  # makes keys that are unique and the same in all processes


def start_processes(place: Place | None = None, about: Mapping[str, str] | None = None, timeout: int = 300) -> None:
    """Connects the processes of this job, if there are several. Every process has to call it before JAX finds its devices.

    Args:
      place: the place of this process; by default, that of the environment (see `clusters`), in which it may be alone.
      about: what has to be the same in all processes besides the version of the code; short texts by name.
      timeout: how long to wait for the other processes, in seconds.

    Raises:
      UserError: processes are missing after the timeout, or differ.
    """
    if (place := place or clusters.find_place(timeout=timeout)) is None:
        return
    logger.info(f"process {place.process_id} of {place.processes} waits for the others at {place.coordinator}")
    hosts = rendezvous.meet(place, rendezvous.code_version() | dict(about or {}), timeout)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process_id,
        local_device_ids=clusters.local_devices(place, hosts),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=peers.HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=peers.SHUTDOWN_TIMEOUT,
    )
    peers.watch()


def exchange(mine: Any) -> dict[str, Any]:
    """Returns what each process passed, keyed by "process 0 (its host)" and so on. All processes have to call it.

    Values are small, and become JSON. A process may be late by any time.
    """
    index, name = jax.process_index(), f"process {jax.process_index()} ({socket.gethostname()})"
    if jax.process_count() == 1:
        return {name: mine}
    client, number = distributed.global_state.client, next(_exchanges)
    assert client is not None
    key = f"pspnet_jax/{number}"
    client.key_value_set(f"{key}/{index:09d}", json.dumps([name, mine]))
    client.wait_at_barrier(key, TIMEOUT_MS)
    if number == 0:
        _connect_devices()
    return dict(json.loads(value) for _, value in sorted(client.key_value_dir_get(key)))


def _connect_devices() -> None:
    """Adds up a number of each device, when all processes are ready.

    If a process came to the first collective half a minute later than the others, as after a slow compilation, it would fail or
    hang; later ones wait.
    """
    mesh = make_mesh()
    ones = jax.make_array_from_callback((mesh.size,), batch_sharding(mesh), lambda _: np.ones(1, np.int32))
    jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones).block_until_ready()


def max_over_processes(number: int) -> int:
    """Returns the largest number that any process of this job passes. All processes have to call it."""
    return max(exchange(int(number)).values())


def require_same(values: Mapping[str, object]) -> None:
    """Raises UserError unless all processes of this job, which all have to call it, have the same values by name."""
    texts = exchange({name: _short(repr(value)) for name, value in values.items()})
    if differences := rendezvous.describe_differences(texts):
        raise UserError(f"{differences}; start the same command, with the same files, on every host")


def local(array: Any) -> Any:
    """Returns this process's copy of a replicated array; other arrays as they are."""
    return array.addressable_data(0) if isinstance(array, jax.Array) else array


def checksum(arrays: Any) -> str:
    """Returns a checksum of a tree of arrays, NumPy's or replicated ones."""
    found = 0
    for leaf in jax.tree.leaves(arrays):
        found = zlib.crc32(np.asarray(local(leaf)).tobytes(), found)
    return f"{found:08x}"


def _short(text: str) -> str:
    """Returns a text of at most 80 characters, or its beginning and a checksum of the whole."""
    return text if len(text) <= 80 else f"{text[:60]}... ({zlib.crc32(text.encode()):08x})"


@contextlib.contextmanager
def fail_together(what: str) -> Iterator[None]:
    """Makes the block fail in all processes of this job if it fails in one, so that none waits forever for another.

    The block must not wait for other processes itself.

    Raises:
      UserError: the block failed in another process.
    """
    try:
        yield
    except Exception as error:
        exchange(user_message(error) or f"{type(error).__name__}: {error}")
        raise
    for name, failure in exchange("").items():
        if failure:
            raise UserError(f"{what} failed in {name}: {failure}")


def make_mesh(devices: Iterable[jax.Device] | None = None, spatial: int = 1) -> Mesh:
    """Returns a mesh with axes ("data", "spatial") over the given devices, or over all devices of the job.

    Devices are ordered by process, so that an example's position in the batch does not depend on the network topology, and the
    `spatial` devices that share an image are neighbors.
    """
    ordered = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(-1, spatial), ("data", "spatial"), axis_types=(AxisType.Auto, AxisType.Auto))


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): this process's batches are the i-th of n shares. Processes that share images have the same share."""
    is_own = np.array([[device.process_index == jax.process_index() for device in group] for group in mesh.devices])
    own = np.flatnonzero(is_own.any(1)).tolist()
    if len(own) > 1 and not is_own[own].all():
        raise UserError(
            f"parallel.spatial={mesh.shape['spatial']}: some groups would have devices of two processes, of "
            f"{is_own.sum()} devices each; choose a divisor or a multiple of that number"
        )
    return own[0] // len(own), len(mesh.devices) // len(own)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [N, ...] along the first axis: each group of devices that share images holds its examples whole."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_height(images: jax.Array, mesh: Mesh) -> jax.Array:
    """Shards images [N, H, W, C] along N and H, under jit; what is computed from them is then sharded alike.

    H need not be a multiple of the mesh's "spatial" size.
    """
    if (spatial := mesh.shape["spatial"]) == 1:
        return images
    padded = jnp.pad(images, ((0, 0), (0, -images.shape[1] % spatial), (0, 0), (0, 0)))
    sharding = NamedSharding(mesh, PartitionSpec("data", "spatial"))
    return jax.lax.with_sharding_constraint(padded, sharding)[:, : images.shape[1]]


def to_devices(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> Generator[dict[str, jax.Array]]:
    """Yields global batches made from this process's batches, copied to the devices by a thread, `ahead` batches in advance.

    Copying overlaps with computation, and a batch that is ready is yielded even if the next one is late.
    """
    sharding, iterator = batch_sharding(mesh), iter(batches)

    def put_next() -> dict[str, jax.Array] | None:
        if (batch := next(iterator, None)) is None:
            return None
        with jax.profiler.TraceAnnotation("copy to devices"):
            return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}

    with ThreadPoolExecutor(1, "to devices") as thread:
        futures = collections.deque(thread.submit(put_next) for _ in range(ahead + 1))
        try:
            while (batch := futures.popleft().result()) is not None:
                futures.append(thread.submit(put_next))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)
