"""The device mesh, its shardings, the transfer of host batches to devices, and coordination between processes.

Programs are written as if for one device and compiled for the mesh. The batch is sharded over the mesh's "data" axis. The
"spatial" axis, for sharding each image, has size 1.
"""

import collections
import contextlib
import logging
import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspnet_jax import peers
from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)


def start_processes() -> None:
    """Connects the processes of one job, on a TPU pod, under SLURM or Open MPI, or as set in three environment variables.

    These are JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID; JAX itself
    reads only the first. If the other processes do not connect within five minutes, JAX ends this one.

    Raises:
      UserError: no cluster was detected, or JAX is already initialized.
    """
    logger.info("waiting for the other processes of this job; the same command has to be started on every host")
    try:
        count, index = (
            int(value) if (value := os.environ.get(f"JAX_{name}")) else None for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            heartbeat_timeout_seconds=peers.HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=peers.SHUTDOWN_TIMEOUT,
        )
        peers.watch()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--distributed: the processes of this job could not connect ({error}); start the same command on every host "
            "of the pod or cluster at the same time, as the scripts in launch/ do, or leave --distributed out on one machine"
        ) from error


def max_over_processes(number: int) -> int:
    """Returns the largest number that any process of this job passes. All processes have to call it."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if jax.process_count() > 1 else number


def require_same(what: str, value: object) -> None:
    """Checks that all processes of this job have the same value.

    Raises:
      UserError: the values differ; names `what`.
    """
    digest = zlib.crc32(repr(value).encode()) >> 1  # 31 bits
    if max_over_processes(digest) != -max_over_processes(-digest):
        raise UserError(f"the processes of this job differ in {what}; start all of them with the same command and files")


@contextlib.contextmanager
def fail_together(what: str) -> Iterator[None]:
    """Makes the block fail in all processes of this job if it fails in one, so that none waits forever for another.

    Raises:
      UserError: the block failed in another process.
    """
    try:
        yield
    except Exception:
        max_over_processes(1)
        raise
    if max_over_processes(0):
        raise UserError(f"{what} failed in another process of this job; its own message says why")


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes ("data", "spatial") over the given devices, or over all devices of the job.

    Devices are ordered by process, so that an example's position in the batch does not depend on the network topology.
    """
    ordered = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(-1, 1), ("data", "spatial"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [N, ...] along the first axis: each device holds N / (number of devices) examples."""
    return NamedSharding(mesh, PartitionSpec("data"))


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
