"""The manifests and commands for GKE, the Dockerfile, and the commands of launch/README.md."""

import re
import shlex
import tomllib

import pytest
import yaml

from tests.test_launch import JOB, LAUNCH, ROOT, launch

FIELDS = {  # of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1; "/": inside of a field, or of each of its list's entries
    "": "apiVersion kind metadata spec",
    "metadata": "name annotations labels namespace",
    "spec": "failurePolicy network replicatedJobs successPolicy ttlSecondsAfterFinished",
    "spec/failurePolicy": "maxRestarts restartStrategy rules",
    "spec/failurePolicy/rules": "name action onJobFailureReasons targetReplicatedJobs",
    "spec/replicatedJobs": "name replicas template",
    "JOB": "parallelism completions completionMode backoffLimit podFailurePolicy template",
    "JOB/podFailurePolicy/rules": "action onExitCodes onPodConditions",
    "JOB/podFailurePolicy/rules/onExitCodes": "containerName operator values",
    "JOB/podFailurePolicy/rules/onPodConditions": "type status",
    "POD": "containers restartPolicy terminationGracePeriodSeconds nodeSelector tolerations volumes serviceAccountName"
    " hostNetwork dnsPolicy",
    "POD/containers": "name image command args env ports resources securityContext volumeMounts",
    "POD/tolerations": "key operator value effect",
}
JOB_PATH = "spec/replicatedJobs/template/spec"
POD_PATH = f"{JOB_PATH}/template/spec"


def unknown_fields(node, path=""):
    """Returns the fields, with their paths, that the API does not have."""
    if isinstance(node, list):
        return [field for entry in node for field in unknown_fields(entry, path)]
    if not isinstance(node, dict):
        return []
    known = FIELDS.get(re.sub(f"^{JOB_PATH}", "JOB", re.sub(f"^{POD_PATH}", "POD", path)))
    return [f"{path}/{field}" for field in node if known and field not in known.split()] + [
        field for name, value in node.items() for field in unknown_fields(value, f"{path}/{name}".strip("/"))
    ]


def render(*options):
    """Returns the manifests, with the JobSet last, its only job and that job's pod."""
    manifests = list(yaml.safe_load_all(launch("gke/jobset.py", "train", "image:1", *options, "--", *JOB)))
    assert (manifests[-1]["apiVersion"], manifests[-1]["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown_fields(manifests[-1]) == []
    [jobs] = manifests[-1]["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["containers"][0]["args"] == list(JOB)
    assert pod["containers"][0]["image"] == "image:1"
    return manifests, jobs["replicas"], job, pod


@pytest.mark.parametrize(
    ("tpu", "label", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
    ],
)
def test_a_tpu_slice_has_one_pod_per_host(tpu, label, hosts, chips):
    [manifest], replicas, job, pod = render("--tpu", tpu)
    assert (replicas, job["parallelism"], job["completions"]) == (1, hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": tpu.split(":")[1],
    }
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_arguments_are_texts_for_kubectl():
    """Which takes y for true and 1e-3 for a number, unlike PyYAML."""
    text = launch(
        "gke/jobset.py",
        "train",
        "image:1",
        "--tpu",
        "v5e:4x4",
        "--",
        "--config.name",
        "y",
        "--rate",
        "1e-3",
        "--workdir=gs://b/r",
    )
    assert all(f'- "{word}"\n' in text for word in ("--config.name", "y", "1e-3"))


def test_several_slices_are_as_many_jobs():
    [manifest], replicas, job, _ = render("--tpu", "v5e:4x4", "--slices", "3")
    assert (replicas, job["completions"]) == (3, 4)
    assert manifest["metadata"]["annotations"].keys() == {"alpha.jobset.sigs.k8s.io/exclusive-topology"}


def test_gpu_nodes_have_one_pod_each_that_may_find_the_others():
    (account, role, binding, _), replicas, job, pod = render("--gpu", "nvidia-h100-80gb:8", "--nodes", "2")
    assert (replicas, job["completions"], job["completionMode"]) == (1, 2, "Indexed")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    names = {pod["serviceAccountName"], account["metadata"]["name"], binding["subjects"][0]["name"]}
    assert (len(names), binding["roleRef"]["name"]) == (1, role["metadata"]["name"])
    readable = {(*rule["apiGroups"], resource) for rule in role["rules"] for resource in rule["resources"]}
    assert readable == {("", "pods"), ("", "services"), ("batch", "jobs")}
    existing, _, _, pod = render("--gpu", "nvidia-l4:1", "--service_account", "trainer")
    assert [manifest["kind"] for manifest in existing] == ["Role", "RoleBinding", "JobSet"]
    assert pod["serviceAccountName"] == existing[1]["subjects"][0]["name"] == "trainer"


def test_failures_restart_all_pods_and_preemptions_are_not_counted():
    [manifest], _, job, pod = render("--tpu", "v5e:4x4", "--spot", "--restarts", "4")
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] >= 120
    saved, preempted = job["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [143]}
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert saved["action"] == preempted["action"] == "FailJob"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 4
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    ]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


@pytest.mark.parametrize(
    ("options", "hardware"),
    [
        (["--tpu", "v5e:4x4", "--slices", "2"], "--tpu-type v5litepod-16 --num-slices 2"),
        (["--tpu", "v5p:2x2x4"], "--tpu-type v5p-32 --num-slices 1"),
        (["--gpu", "nvidia-h100-mega-80gb:8", "--nodes", "2"], "--device-type h100-mega-80gb-8 --num-nodes 2"),
    ],
)
def test_xpk_command(options, hardware):
    *words, command = shlex.split(launch("gke/jobset.py", "train", "image:1", *options, "--xpk", "mine", "--", *JOB))
    assert " ".join(words) == (
        f"xpk workload create --cluster mine --workload train {hardware} --docker-image image:1 --max-restarts 10 "
        "--restart-on-exit-codes 1 --termination-grace-period-seconds 300 --command"
    )
    assert shlex.split(command)[:9] == ["exec", "/pspnet_jax/launch/init.sh", "python", "-m", "pspnet_jax.main", *JOB][:9]
    assert ("--process_id $NODE_RANK" in command) == ("--gpu" in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "image", "--", "a"], "one of the arguments --tpu --gpu is required"),
        (["run", "image", "--tpu", "v5e:4x4"], "after --, the arguments of python -m pspnet_jax.main are missing"),
        (["run", "image", "--tpu", "v9:4x4", "--", "a"], "argument --tpu: v9:4x4: expected VERSION:TOPOLOGY"),
        (["run", "image", "--tpu", "v5p:4x4", "--", "a"], "argument --tpu: v5p:4x4: a topology of v5p has 3 dimensions"),
        (["run", "image", "--tpu", "v5e:3x3", "--", "a"], "argument --tpu: v5e:3x3: 9 chips are not a slice"),
        (["run", "image", "--gpu", "nvidia-l4", "--", "a"], "argument --gpu: nvidia-l4: expected TYPE:COUNT"),
        (["Run", "image", "--tpu", "v5e:4x4", "--", "a"], "NAME is Run: expected at most 28 lowercase letters"),
        (["run", "image", "--tpu", "v5e:4x4", "--nodes", "2", "--", *JOB], "--nodes is for GPUs"),
        (["run", "image", "--gpu", "nvidia-l4:1", "--slices", "2", "--", *JOB], "--slices is for TPUs"),
        (["run", "image", "--tpu", "v5e:4x4", "--spot", "--xpk", "mine", "--", *JOB], "--xpk: the cluster decides"),
        (["run", "image", "--tpu", "v5e:4x4", "--restarts", "-3", "--", *JOB], "argument --restarts: -3: expected a number"),
        (["run", "image", "--tpu", "v5e:2x2", "--", "--config", "a"], "the arguments need --workdir gs://BUCKET/DIR"),
        (["run", "image", "--tpu", "v5e:2x2", "--", "--workdir=runs/a"], "the arguments need --workdir gs://BUCKET/DIR"),
    ],
)
def test_mistakes_give_one_sentence_and_the_usage(arguments, message):
    first, second, *rest = launch("gke/jobset.py", *arguments, status=1).splitlines()
    assert first.startswith(f"error: {message}")
    assert second.startswith("usage: ")
    assert not rest


def test_dockerfile_names_existing_files_and_extras():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall("^COPY (.*) [^ ]+$", text, flags=re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall("EXTRAS=([a-z0-9,]+)", text)
    assert named
    for group in named:
        assert set(group.split(",")) <= extras.keys()


def test_the_commands_of_the_readme_are_accepted(tmp_path, monkeypatch):
    """Runs each command that starts with launch/ or python launch/, with --dry-run where there is one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (LAUNCH / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^(?:sbatch .*?|python )?launch/(\S+) (.*?)(?: *\| kubectl .*| *&& .*| *# .*)?$", text, flags=re.M)
    assert {script for script, _ in commands} == {"tpu_pod.sh", "local.sh", "slurm.sh", "gke/jobset.py"}
    for script, arguments in commands:
        words = shlex.split(arguments)
        if words[0] == "resume":
            continue  # needs a record
        launch(script, *([] if script.endswith(".py") else ["--dry-run"]), *words)
