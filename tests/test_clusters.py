"""What a process learns from its environment: whether it is alone, and if not, its place."""

import importlib.util
import os
import socket
import types

import pytest
from jax._src import clusters as jax_clusters
from jax._src.clusters import cloud_tpu_cluster

from pspnet_jax import clusters
from pspnet_jax.clusters import Place, find_place, local_devices
from pspnet_jax.errors import UserError

PREFIXES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS")
STEP = {"SLURM_JOB_ID": "5000", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
NODES = {**STEP, "SLURM_STEP_NODELIST": "node[017-018]", "SLURM_NTASKS": "16"}
ORTE = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
COLAB = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Removes all that this machine says, and refuses network access. The machine has TPU chips if `tpu` is called."""

    def refuse(*_, **__):
        raise AssertionError("a single machine must not use the network")

    for variable in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", refuse)
    monkeypatch.setattr(jax_clusters.K8sCluster, "is_env_present", refuse)
    for function in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, function, refuse)


def give(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def tpu(monkeypatch, platforms="tpu,cpu"):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(clusters, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms)))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        NODES | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1
        NODES | {"SLURM_STEP_NUM_TASKS": "1"},  # the shell of an interactive salloc -n16
        STEP | {"SLURM_NTASKS": "16"},  # a batch script, without srun
        MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": ORTE},  # mpirun -n 1
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},  # the same in Open MPI 5
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "node:1"},
    ],
)
def test_a_single_process_is_alone_without_asking_the_network(monkeypatch, variables):
    give(monkeypatch, variables)
    assert find_place() is None


@pytest.mark.parametrize(
    ("variables", "platforms"), [(COLAB, "tpu,cpu"), ({}, "cpu"), (COLAB | {"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu")]
)
def test_one_tpu_host_and_the_cpus_of_a_tpu_machine_are_alone_without_asking_the_network(monkeypatch, variables, platforms):
    give(monkeypatch, variables)
    tpu(monkeypatch, platforms)
    assert find_place() is None


def test_processes_1_overrides_the_cluster(monkeypatch):
    give(monkeypatch, NODES)
    assert find_place(processes=1) is None


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (NODES | {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, Place("node017:62344", 16, 9, 1)),
        (
            MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_hnp_uri": ORTE},
            Place("10.96.0.1:62624", 4, 3, 0),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node:99", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
            Place("node:99", 3, 0),
        ),
        (NODES | {"JAX_COORDINATOR_ADDRESS": "node018:99"}, Place("node018:99", 16, 0, 0)),
        (NODES | {"JAX_COORDINATOR_PORT": "98"}, Place("node017:98", 16, 0, 0)),
    ],
)
def test_a_place_in_the_environment(monkeypatch, variables, place):
    give(monkeypatch, variables)
    assert find_place() == place
    assert find_place("[::1]:7", 2, 1) == Place("[::1]:7", 2, 1)  # options take precedence


def test_a_host_of_several_slices_in_kubernetes(monkeypatch):
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080"}
    give(monkeypatch, slices | {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"})
    tpu(monkeypatch)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.3")
    assert find_place() == Place("job-slice-0-0.job:8482", 8, 6)


@pytest.mark.filterwarnings("ignore:'maxsplit' is passed:DeprecationWarning")  # JAX passes it to re.split
@pytest.mark.parametrize(
    ("slices", "place"), [({}, Place("10.0.0.2:8482", 2, 1)), ({"NUM": "3", "ID": "2"}, Place("10.9.9.9:8482", 6, 5))]
)
def test_a_host_of_a_tpu_pod(monkeypatch, slices, place):
    """The metadata server of Google Cloud tells about the slice and, if there are several, about the others."""
    environment = {"MEGASCALE_NUM_SLICES": slices.get("NUM"), "MEGASCALE_SLICE_ID": slices.get("ID")}
    environment["MEGASCALE_COORDINATOR_ADDRESS"] = "10.9.9.9" if slices else None
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
        "tpu-env": "".join(f"{name}: '{value}'\n" for name, value in environment.items() if value),
    }
    tpu(monkeypatch)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: name)
    assert find_place() == place


def test_a_pod_of_a_jobset(monkeypatch):
    give(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"})
    labels = {"jobset.sigs.k8s.io/jobset-name": "pspnet"}
    job = types.SimpleNamespace(
        metadata=types.SimpleNamespace(name="pspnet-workers-0", labels=labels), spec=types.SimpleNamespace(parallelism=4)
    )
    answers = {"_job": job, "_pod": None, "_controller": types.SimpleNamespace(kind="Job"), "is_env_present": True}
    for name, answer in answers.items():
        monkeypatch.setattr(jax_clusters.K8sCluster, name, lambda answer=answer: answer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert find_place() == Place("pspnet-workers-0-0.pspnet:55527", 4, 2)


def test_pods_whose_job_is_unknown(monkeypatch, caplog):
    give(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_place() is None
    assert "it is unknown whether this Kubernetes job has other pods; run pip install 'jax[k8s]', or pass" in caplog.text
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError, match=r"^it is unknown whether this Kubernetes job has other pods; run pip install"):
        find_place()


def test_open_mpi_5_needs_mpi4py(monkeypatch):
    give(monkeypatch, MPI | {"OMPI_COMM_WORLD_SIZE": "4"})
    monkeypatch.setattr(jax_clusters.Mpi4pyCluster, "is_env_present", lambda: False)
    with pytest.raises(UserError, match=r"^Open MPI 5 does not say where the first process runs; run pip install mpi4py, or"):
        find_place()


def test_a_failing_detection_ends_in_one_sentence(monkeypatch):
    def fail(key):
        raise OSError("metadata.google.internal: Name or service\nnot known")

    tpu(monkeypatch)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", fail)
    words = (
        r"belong to this job \(metadata.google.internal: Name or service not known\); pass --coordinator .* or --processes 1"
    )
    with pytest.raises(UserError, match=words):
        find_place()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("node:1", None, None), "--coordinator is node:1, --processes is None and --process_id is None, and no cluster says"),
        ((None, 4, 0), "--coordinator is None, --processes is 4"),
        (("node:1", 4, 4), "--process_id 4: expected a number from 0 to 3"),
        (("node", 4, 0), "--coordinator node: expected HOST:PORT"),
        ((":1", 4, 0), "--coordinator :1: expected HOST:PORT"),
        (("node:70000", 4, 0), "--coordinator node:70000: expected HOST:PORT"),
        ((".cluster.local:8476", 4, 0), "--coordinator .cluster.local:8476: expected HOST:PORT"),
    ],
)
def test_a_wrong_place_is_refused(given, words):
    with pytest.raises(UserError, match=f"^{words}"):
        find_place(*given)


def test_an_environment_variable_that_is_not_a_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match=r"^the environment variable JAX_NUM_PROCESSES is 'two': expected a whole number"):
        find_place()


@pytest.mark.parametrize(
    ("hosts", "local_id", "visible", "devices"),
    [
        (["a", "a", "b", "b"], 1, None, [1]),
        (["a", "a", "b", "b"], 1, "0,1,2,3", [1]),
        (["a", "a", "b", "b"], 1, "3", None),  # SLURM has chosen the GPU already
        (["a", "b", "c", "d"], 0, None, None),  # one process on each host uses all GPUs
        (["a", "a", "b", "b"], None, None, None),  # started by hand, or on TPUs
    ],
)
def test_processes_that_share_a_machine_have_a_gpu_each(monkeypatch, hosts, local_id, visible, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_devices(Place("a:1", 4, 1, local_id), hosts) == devices
