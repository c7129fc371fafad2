"""Prints the Kubernetes manifest of a training job on GKE, or the command that submits the same job through xpk.

    python launch/gke/jobset.py NAME IMAGE --tpu v5e:4x4 -- ARGUMENT... | kubectl apply -f -
    python launch/gke/jobset.py NAME IMAGE --tpu v5e:4x4 --slices 2 -- ARGUMENT... | kubectl apply -f -
    python launch/gke/jobset.py NAME IMAGE --gpu nvidia-h100-80gb:8 --nodes 2 -- ARGUMENT... | kubectl apply -f -
    python launch/gke/jobset.py NAME IMAGE --tpu v5e:4x4 --xpk CLUSTER -- ARGUMENT...

IMAGE is built from launch/Dockerfile; each ARGUMENT is one of `python -m pspnet_jax.main`. Nothing is run, so there is no
--dry-run. Field names follow JobSet (jobset.x-k8s.io/v1alpha2) and Job (batch/v1); node labels are those of GKE.
"""

import argparse
import math
import re
import shlex
import sys
from typing import Any, NoReturn

import yaml

TPUS = {  # what --tpu calls it: GKE's label, dimensions of a topology, name of a slice in xpk and its count per chip
    "v4": ("tpu-v4-podslice", 3, "v4", 2),
    "v5e": ("tpu-v5-lite-podslice", 2, "v5litepod", 1),
    "v5p": ("tpu-v5p-slice", 3, "v5p", 2),
    "v6e": ("tpu-v6e-slice", 2, "v6e", 1),
}
SAVED = 143  # exit status of a job that SIGTERM stopped and whose state is saved
SECONDS_TO_SAVE = 300


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}\n{self.format_usage()}")


def parse(argv: list[str]) -> argparse.Namespace:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(usage="jobset.py NAME IMAGE (--tpu VERSION:TOPOLOGY | --gpu TYPE:COUNT) [OPTION...] -- ARGUMENT...")
    parser.add_argument("name", help="of the JobSet: lowercase letters, digits and hyphens, at most 28")
    parser.add_argument("image", help="such as us-docker.pkg.dev/PROJECT/REPOSITORY/pspnet_jax:latest")
    hardware = parser.add_mutually_exclusive_group(required=True)
    hardware.add_argument("--tpu", type=tpu, metavar="VERSION:TOPOLOGY", help=f"such as v5e:4x4; {', '.join(TPUS)}")
    hardware.add_argument("--gpu", type=gpu, metavar="TYPE:COUNT", help="label of the GPUs and their number per node")
    parser.add_argument("--slices", type=positive, default=1, help="number of TPU slices (default: 1)")
    parser.add_argument("--nodes", type=positive, default=1, help="number of GPU nodes (default: 1)")
    parser.add_argument("--spot", action="store_true", help="run on spot nodes")
    parser.add_argument("--restarts", type=natural, default=10, help="after failures (default: 10); preemptions do not count")
    parser.add_argument("--service_account", metavar="NAME", help="an existing one, such as one that may use your bucket")
    parser.add_argument("--xpk", metavar="CLUSTER", help="print the command for this cluster of xpk instead")
    parser.description = "Prints the manifest of a training job on GKE; see the top of this file for examples."
    options = parser.parse_args(argv[:split])
    options.arguments = argv[split + 1 :]
    if not options.arguments:
        parser.error("after --, the arguments of python -m pspnet_jax.main are missing")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,26}[a-z0-9])?", options.name):
        parser.error(f"NAME is {options.name}: expected at most 28 lowercase letters, digits and hyphens")
    if not re.search(r"(^| )--workdir[ =]gs://", " ".join(options.arguments)):
        parser.error("the arguments need --workdir gs://BUCKET/DIR: what a container writes on its own disk goes with it")
    if options.slices > 1 and not options.tpu:
        parser.error("--slices is for TPUs; the number of GPU nodes is --nodes")
    if options.nodes > 1 and not options.gpu:
        parser.error("--nodes is for GPUs; the number of TPU hosts follows from the topology")
    if options.xpk and (options.spot or options.service_account):
        parser.error("--xpk: the cluster decides on --spot and --service_account (see xpk cluster create --help)")
    return options


class Quoted(str):
    """A text that is written in quotes: kubectl takes more words, such as y and 1e-3, for other types than PyYAML does."""


yaml.SafeDumper.add_representer(Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def natural(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given}: expected a number from 0 on")
    return int(given)


def positive(given: str) -> int:
    if not (given.isdecimal() and int(given)):
        raise argparse.ArgumentTypeError(f"{given}: expected a positive number")
    return int(given)


def tpu(given: str) -> tuple[str, str, int]:
    """Returns the version, topology and number of chips of `given`, such as v5e:4x4."""
    version, _, topology = given.partition(":")
    if version not in TPUS:
        raise argparse.ArgumentTypeError(f"{given}: expected VERSION:TOPOLOGY, with a version of {', '.join(TPUS)}")
    dimensions = TPUS[version][1]
    if not re.fullmatch("x".join(["[1-9][0-9]*"] * dimensions), topology):
        example = "x".join("4" * dimensions)
        raise argparse.ArgumentTypeError(
            f"{given}: a topology of {version} has {dimensions} dimensions, such as {version}:{example}"
        )
    chips = math.prod(map(int, topology.split("x")))
    if chips > 1 and chips % 4:
        raise argparse.ArgumentTypeError(f"{given}: {chips} chips are not a slice; expected 1 or a multiple of 4")
    return version, topology, chips


def gpu(given: str) -> tuple[str, int]:
    label, _, count = given.partition(":")
    if not label or not count.isdecimal() or not int(count):
        raise argparse.ArgumentTypeError(f"{given}: expected TYPE:COUNT, such as nvidia-h100-80gb:8")
    return label, int(count)


def job(options: argparse.Namespace) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    """Returns the number of jobs, of nodes in each, what to add to their pods, and what to add to their containers."""
    if options.gpu:
        label, count = options.gpu
        pod = {
            "serviceAccountName": options.service_account or options.name,
            "nodeSelector": {"cloud.google.com/gke-accelerator": label},
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
        }
        container = {
            "resources": {"limits": {"nvidia.com/gpu": count}},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # for NCCL
        }
        return 1, options.nodes, pod, container
    version, topology, chips = options.tpu
    chips_per_host = min(chips, 4)
    pod = {
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": TPUS[version][0],
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "hostNetwork": True,  # slices communicate over the hosts' network
        "dnsPolicy": "ClusterFirstWithHostNet",
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    container = {
        "securityContext": {"privileged": True},  # for the TPU's devices
        "resources": {"limits": {"google.com/tpu": chips_per_host}},
    }
    return options.slices, chips // chips_per_host, pod, container


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the manifest. If one pod fails, all are started again, since they compute together.

    A preemption, or a stop by SIGTERM after which the state is saved, does not count as one of the restarts.
    """
    replicas, nodes, pod, container = job(options)
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    pod |= {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "containers": [
            {
                "name": "pspnet",
                "image": options.image,
                "args": [*map(Quoted, options.arguments)],  # of the image's command, python -m pspnet_jax.main
                **container,
            }
        ],
    }
    spec = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "pspnet", "operator": "In", "values": [SAVED]}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": options.name}
    if options.tpu:  # one job per slice, and one slice per job
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {
                        "name": "savedOrPreempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice" if options.tpu else "nodes", "replicas": replicas, "template": {"spec": spec}}],
        },
    }


def permissions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the manifests with which pods may read pods, jobs and services: that is how JAX finds the processes of a job."""
    metadata, account = {"name": options.name}, options.service_account or options.name
    group = "rbac.authorization.k8s.io"
    rules = [("", ["pods", "services"]), ("batch", ["jobs"])]
    created = [] if options.service_account else [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}]
    return [
        *created,
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [{"apiGroups": [of], "resources": resources, "verbs": ["get", "list"]} for of, resources in rules],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "subjects": [{"kind": "ServiceAccount", "name": account}],
            "roleRef": {"apiGroup": group, "kind": "Role", "name": options.name},
        },
    ]


def xpk(options: argparse.Namespace) -> str:
    # xpk replaces the image's command by a script of its own, to which SIGTERM is sent.
    command = f"exec /pspnet_jax/launch/init.sh python -m pspnet_jax.main {shlex.join(options.arguments)}"
    if options.gpu:  # xpk sets these variables; it has no service account with which JAX could find the processes itself
        label, count = options.gpu
        hardware = ["--device-type", f"{label.removeprefix('nvidia-')}-{count}", "--num-nodes", str(options.nodes)]
        command += " --coordinator $JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT --processes $NNODES --process_id $NODE_RANK"
    else:
        version, _, chips = options.tpu
        _, _, name, count = TPUS[version]
        hardware = ["--tpu-type", f"{name}-{chips * count}", "--num-slices", str(options.slices)]
    job = ["--cluster", options.xpk, "--workload", options.name, *hardware, "--docker-image", options.image]
    # By default, xpk restarts after status 127 and more only. A process that fails with an error ends with 1.
    restarts = ["--max-restarts", str(options.restarts), "--restart-on-exit-codes", "1"]
    grace = ["--termination-grace-period-seconds", str(SECONDS_TO_SAVE)]
    return shlex.join(["xpk", "workload", "create", *job, *restarts, *grace, "--command", command])


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.xpk:
        print(xpk(options))
    else:
        manifests = [*(permissions(options) if options.gpu else []), jobset(options)]
        print(yaml.safe_dump_all(manifests, sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
