"""Finds out whether this process is alone or one of several that run the same job, started by a cluster or by hand."""

import importlib.util
import logging
import os
from typing import Any, NamedTuple

import jax
from jax._src import clusters

from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)
BY_HAND = "pass --coordinator HOST:PORT, --processes N and --process_id I, or --processes 1 to use this machine alone"


class Place(NamedTuple):
    """The place of this process in its job."""

    coordinator: str  # HOST:PORT, where the first process can be reached
    processes: int  # number of processes of the job
    process_id: int  # number of this process, from 0
    local_id: int | None = None  # number of this process on its machine, if the cluster starts several on each


def find_place(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> Place | None:
    """Returns the place of this process in its job, or None if the job has a single process.

    What is not given is taken from the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
    what they do not set, from the cluster: a TPU pod or several slices, SLURM, Open MPI, or an indexed Kubernetes job (JobSet).
    It waits up to `timeout` seconds until the first TPU host has a name.

    Raises:
      UserError: a value is missing or wrong, or the cluster does not reveal it.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    if processes == 1:
        return None
    local_id = None
    if None in (coordinator, processes, process_id):
        try:
            if cluster := _cluster():
                processes = processes or cluster.get_process_count()
                process_id = cluster.get_process_id() if process_id is None else process_id
                coordinator = coordinator or _address(cluster, timeout) if processes > 1 else None
                local_id = cluster.get_local_process_id()
        except UserError:
            raise
        except Exception as error:  # of many types: no connection, no permission, a package or variable is missing
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the cluster does not say which processes belong to this job ({reason}); {BY_HAND}") from error
    if processes == 1 or (coordinator, processes, process_id) == (None, None, None):
        return None
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            f"--coordinator is {coordinator}, --processes is {processes} and --process_id is {process_id}, and no cluster says "
            f"what is missing; {BY_HAND}"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process_id {process_id}: expected a number from 0 to {processes - 1}, as --processes is {processes}"
        )
    host, _, port = coordinator.rpartition(":")
    try:
        host.strip("[]").encode("idna")
    except UnicodeError:  # an empty label, as of an empty variable in front of a domain
        host = ""
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {coordinator}: expected HOST:PORT of the first process, such as 10.0.0.2:8476")
    return Place(coordinator, processes, process_id, local_id)


def local_devices(place: Place, hosts: list[str]) -> list[int] | None:
    """Returns the GPU of a process that shares its machine and GPUs with others, given all hosts; None: all that it sees."""
    shares_machine = hosts.count(hosts[place.process_id]) > 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    sees_one_gpu = bool(visible) and "," not in visible  # as with srun's --gpus-per-task=1
    return [place.local_id] if place.local_id is not None and shares_machine and not sees_one_gpu else None


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value and not value.isdecimal():
        raise UserError(f"the environment variable {variable} is {value!r}: expected a whole number")
    return int(value) if value else None


def _cluster() -> Any:
    """Returns the class of `jax._src.clusters` that describes this cluster, or None if this process is alone.

    JAX's own detection follows only where several processes are likely. A single machine must not wait for the network or
    fail: a shell in a SLURM allocation has the allocation's number of tasks in SLURM_NTASKS, a TPU machine in Colab has no
    metadata server, and most pods of a Kubernetes cluster belong to no job and must not ask the cluster about it.
    """
    environment = os.environ
    if number := environment.get("OMPI_COMM_WORLD_SIZE"):
        if number == "1":
            return None
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return clusters.OmpiCluster
        if not clusters.Mpi4pyCluster.is_env_present():
            raise UserError(f"Open MPI 5 does not say where the first process runs; run pip install mpi4py, or {BY_HAND}")
        return clusters.Mpi4pyCluster
    if clusters.SlurmCluster.is_env_present():
        several = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]) != "1"
        return clusters.SlurmCluster if several else None
    if "tpu" in (jax.config.jax_platforms or "tpu"):  # type: ignore[attr-defined]
        if clusters.GkeTpuCluster.is_env_present():
            one_host = len(clusters.GkeTpuCluster._get_worker_list_in_slice()) == 1
            return None if one_host and "MEGASCALE_NUM_SLICES" not in environment else clusters.GkeTpuCluster
        if clusters.GceTpuCluster.is_env_present():
            return clusters.GceTpuCluster
    if number := environment.get("JOB_COMPLETION_INDEX"):
        if importlib.util.find_spec("kubernetes") and clusters.K8sCluster.is_env_present():
            return clusters.K8sCluster
        unknown = f"it is unknown whether this Kubernetes job has other pods; run pip install 'jax[k8s]', or {BY_HAND}"
        if number != "0":
            raise UserError(unknown)
        logger.warning(f"{unknown}; starting as if there were none")
    return None


def _address(cluster: Any, timeout: int) -> str:
    """Returns HOST:PORT of the first process. `rendezvous.meet` waits for it, so this function need not."""
    waits = issubclass(cluster, clusters.cloud_tpu_cluster.BaseTpuCluster)  # with a timeout of 0, these fail
    return cluster.get_coordinator_address(timeout if waits else 0, os.environ.get("JAX_COORDINATOR_PORT"))
