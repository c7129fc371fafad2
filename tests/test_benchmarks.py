"""The recipes of the three benchmarks on tiny datasets, from checking the files to a submission; and benchmarks.model."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import breakdown, candidates, model
from pspnet_jax import datasets, models, parallel
from pspnet_jax.config import base_config
from pspnet_jax.main import main
from pspnet_jax.models import Classifier, ConvNorm
from tests import fakes
from tests.test_main import ROOT, SMALL, error

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

SIZE = (60, 80)
LAYOUTS = {
    "ade20k": lambda root: fakes.write_ade20k(root, {"training": 9, "validation": 2}, SIZE),
    "voc2012": lambda root: fakes.write_sbd(
        fakes.write_voc2012(root, {"train": list("123456"), "val": ["7", "8"], "test": ["9"]}, SIZE)
        / "benchmark_RELEASE/dataset",
        {"train": ["1", "7", "20"], "val": ["8", "21", "22"]},
        SIZE,
    ),
    "cityscapes": lambda root: fakes.write_cityscapes(root, {"train": 9, "val": 2, "test": 1}, SIZE),
}
# recipe: format and split for --mode predict, and the files that it writes
SUBMISSIONS = {
    "ade20k": ("ade20k", "validation", ["ADE_val_00000001.png", "ADE_val_00000002.png"]),
    "voc2012": ("voc", "test", ["results/VOC2012/Segmentation/comp6_test_cls/9.png"]),
    "cityscapes": ("cityscapes", "test", ["aachen_000000_000019_leftImg8bit.png"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_from_its_files_to_a_submission(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    root, run = tmp_path / "data", tmp_path / "run"
    LAYOUTS[name](root)
    command = [f"--config=configs/{name}.py", f"--config.dataset.root={root}"]
    message = error(capsys, "--mode=check", *command, f"--output={tmp_path}/check")
    assert "images, but" in message
    assert "2 problem(s) found" in message
    assert len(list((tmp_path / "check").glob("*.png"))) == 4
    assert main([*command, f"--workdir={run}", *SMALL, "--config.total_steps=2"]) == 0
    assert main(["--mode=evaluate", f"--workdir={run}"]) == 0
    (report,) = (run / "evaluation").glob("*.json")
    assert json.loads(report.read_text())["images"] == 2
    form, split, files = SUBMISSIONS[name]
    arguments = [f"--workdir={run}", f"--config.eval.split={split}", f"--output={tmp_path}/submission", f"--format={form}"]
    assert main(["--mode=predict", *arguments]) == 0
    assert sorted(str(path.relative_to(tmp_path / "submission")) for path in (tmp_path / "submission").rglob("*.png")) == files
    for file in files:
        values = np.unique(np.asarray(Image.open(Path(tmp_path / "submission" / file))))
        assert set(values.tolist()) <= set(datasets.RAW_VALUES[name])
    if split == "test":
        message = error(capsys, "--mode=evaluate", f"--workdir={run}", "--config.eval.split=test")
        assert "split 'test' has no labels" in message


class Tiny(nn.Module):
    """A normalized convolution and a classifier: the smallest network that benchmarks.model can run."""

    dtype: str

    @nn.compact
    def __call__(self, images, train):
        x = ConvNorm(8, name="layer")(images.astype(self.dtype), train)
        logits = Classifier(3, dropout=0.1, name="classifier")(x, train)
        return (logits, None) if train else logits


@pytest.fixture
def tiny_recipe(tmp_path, monkeypatch):
    """A recipe file whose network is Tiny: 8 images of 33x33, 3 classes."""
    monkeypatch.setattr(models, "build", lambda model, num_classes: Tiny(model.dtype))
    recipe = tmp_path / "tiny.py"
    recipe.write_text(
        "from pspnet_jax.config import base_config\n"
        "def get_config():\n"
        "    config = base_config()\n"
        "    config.dataset.class_names = ('sky', 'road', 'car')\n"
        "    config.augment.crop, config.batch_size = (33, 33), 8\n"
        "    return config\n"
    )
    return recipe


def test_flops_are_those_of_the_convolutions_for_any_head():
    """Each multiply-add of the plain network's convolutions counts as two; XLA omits products with padding, about 4%."""
    config = base_config()
    config.model.update(depth=18, stem="conv7", auxiliary=False, factored_head=True)
    task = candidates.make_task(config, 5, "inference", 2, "bfloat16", parallel.make_mesh(jax.devices()[:1]))
    task = dataclasses.replace(task, batch={"image": np.zeros((2, 473, 473, 3), np.uint8)})
    _, init, _ = candidates.functions_and_data(task, "plain")
    expected = 0
    for path, kernel in jax.tree_util.tree_leaves_with_path(jax.eval_shape(init).params):
        name = jax.tree_util.keystr(path)
        side = 237 if "stem" in name else 119 if "layer1" in name else 60
        if level := re.search(r"level(\d)", name):
            side = (1, 2, 3, 6)[int(level[1])]
        expected += kernel.size * 2 * 2 * side**2 if "kernel" in name else 0
    flops = candidates.count_flops(task)
    assert 0.95 * expected < flops < expected


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(train_step)/jvp(PSPNet)/backbone/layer4_block2/jit(relu)/max", "layer4"),
        ("jit(train_step)/jvp(PSPNet)/backbone/max", "stem"),
        ("jit(train_step)/transpose(jvp(PSPNet))/backbone/jit(_pad)/pad", "stem"),
        ("jit(train_step)/jvp(PSPNet)/backbone/layer3_block1/conv2/conv/cond/branch_0_fun/while/body/add", "layer3"),
        ("jit(train_step)/jvp(PSPNet)/head/head_conv/cond/branch_0_fun/while/body/dot_general", "pyramid and head"),
        ("jit(train_step)/transpose(jvp())/while/body/eval_jaxpr/checkpoint/exp", "losses"),
        ("jit(train_step)/jvp(PSPNet)/auxiliary_head/auxiliary_conv/bn/reduce_sum", "auxiliary head"),
        ("jit(train_step)/add", "other"),
    ],
)
def test_operations_belong_to_the_part_of_the_network_that_computes_them(path, part):
    assert breakdown.part_of(path) == part


def test_breakdown_of_a_step_and_of_a_program(tiny_recipe, tmp_path, capsys):
    """The time of the parts is that of all traced operations, and most of Tiny's belongs to its classifier, loss and layer."""
    measured, counted, picture = (tmp_path / name for name in ("measured.json", "counted.json", "parts.png"))
    options = ["--config", str(tiny_recipe), "--jobs", "train", "--dtype", "float32", "--output", str(measured)]
    breakdown.main(options)
    ((title, parts),) = json.loads(measured.read_text()).items()
    assert title.startswith("CPU, train, float32, batch 8")
    assert list(parts) == [*breakdown.PARTS, breakdown.OTHER]
    assert parts["losses"] > 0
    assert f"{sum(parts.values()):,.0f} in all" in capsys.readouterr().out
    program = tmp_path / "program.txt"
    program.write_text(PROGRAM)
    breakdown.main(["--hlo", str(program), "--images", "2", "--output", str(counted)])
    (traffic,) = json.loads(counted.read_text()).values()
    assert {part: mb for part, mb in traffic.items() if mb} == {"layer3": 4.0, "other": 4.0}  # two arrays of 4 MB each
    breakdown.main(["--draw", str(measured), str(counted), "--output", str(picture)])
    with Image.open(picture) as image:
        assert image.format == "PNG"


PROGRAM = """HloModule step

ENTRY %main (x: f32[1000000]) -> f32[1000000] {
  %x = f32[1000000]{0} parameter(0)
  %a = f32[1000000]{0} negate(%x), metadata={op_name="jit(train_step)/jvp(PSPNet)/backbone/layer3_block0/neg"}
  ROOT %b = f32[1000000]{0} negate(%a), metadata={op_name="jit(train_step)/add"}
}
"""


def test_candidates_alternate_and_a_failure_is_recorded():
    calls = []

    def build(name):
        return lambda: candidates.Candidate(lambda: calls.append(name), lambda _: calls.append("wait"), 1.5, 64)

    def fail():
        raise RuntimeError("no memory\nfor 2 GiB")

    rows = model.measure({"a": build("a"), "b": build("b"), "c": fail}, rounds=2, steps=2)
    warm_up, turns = ["a", "wait", "b", "wait"], ["a", "wait", "a", "a", "wait", "b", "wait", "b", "b", "wait"]
    assert calls == [*warm_up, *turns, *turns]
    assert rows["c"] == {"error": "no memory"}
    assert {name: len(row["seconds"]) for name, row in rows.items() if name != "c"} == {"a": 2, "b": 2}


def test_rates_follow_from_the_median():
    row = model.summarize({"seconds": [0.5, 0.4, 1.4], "cpu_seconds": [1, 2, 4]}, images=16, flops=8e12, peak=64e12)
    assert row["median_seconds"] == 0.5
    assert row["median_cpu_seconds"] == 2
    assert row["spread"] == pytest.approx(2)
    assert (row["images_per_second"], row["flops_per_second"], row["share_of_peak"]) == (32, 16e12, 0.25)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("TPU v5 lite", "float32", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("cpu", "float32", None),
    ],
)
def test_peak_of_a_device_kind(kind, dtype, peak):
    assert model.peak_flops(kind, dtype) == peak


def test_largest_differences_of_two_trees():
    expected = {"a": np.array([3.0, 4.0]), "b": np.array([0.1])}
    value = {"a": np.array([3.0, 4.5]), "b": np.array([0.13])}
    found = model.largest_differences(value, expected)  # relative: a 0.5 / 5, b 0.03 / 0.1
    assert found == {"absolute": 0.5, "relative": pytest.approx(0.3), "array": "['b']"}


def test_results_of_every_job_as_json(tiny_recipe, tmp_path, capsys):
    output = tmp_path / "model.json"
    model.main(f"--config {tiny_recipe} --dtype float32 --rounds 2 --output {output}".split())
    rows = json.loads(output.read_text())["rows"]
    assert [(row["job"], row["network"]) for row in rows] == [(job, "ours, factored") for job in candidates.JOBS]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(8 / row["median_seconds"])
        assert row["compile_seconds"] > 0 < row["program_bytes"]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if "ours" in line] == list(candidates.JOBS)


def test_check_finds_float32_near_the_reference_and_bfloat16_farther(tiny_recipe, tmp_path):
    output = tmp_path / "check.json"
    model.main(f"--config {tiny_recipe} --check --output {output}".split())
    rows = json.loads(output.read_text())["rows"]
    found = {(row["dtype"], row["of"]): row["relative"] for row in rows}
    for of in ("loss", "optimizer state", "parameters"):
        assert found["float32", of] < 1e-5
    assert 1e-3 < found["bfloat16", "optimizer state"] < 0.1
    assert found["bfloat16", "parameters"] > 10 * found["float32", "parameters"]


SEMSEG = """
import torch
calls = []
class PSPNet(torch.nn.Module):
    def __init__(self, layers, bins, dropout, classes, use_ppm, pretrained):
        super().__init__()
        self.layer0, self.cls = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, classes, 1)
    def forward(self, x, y=None):
        logits = self.cls(self.layer0(x))
        calls.append((self.training, x.is_contiguous(memory_format=torch.channels_last), logits.dtype, [*self.parameters()]))
        loss = torch.nn.functional.cross_entropy(logits, y, ignore_index=255) if self.training else None
        return (logits.max(1)[1], loss, loss) if self.training else logits
"""


@pytest.fixture
def semseg(tmp_path, monkeypatch):
    """A stand-in for the clone, which records the calls of its network."""
    pytest.importorskip("torch")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/pspnet.py").write_text(SEMSEG)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("model.pspnet")
    for name in ("model.pspnet", "model"):
        del sys.modules[name]


@pytest.mark.parametrize("job", candidates.JOBS)
def test_semseg_runs_in_the_dtype_and_both_layouts(job, semseg, tmp_path):
    import torch

    for dtype in candidates.DTYPES:
        task = candidates.make_task(base_config(), 3, job, 2, dtype, parallel.make_mesh(jax.devices()[:1]))
        build = model.builders(task, ["plain"], str(tmp_path))
        assert list(build) == ["ours, plain", "semseg", "semseg, channels_last"]
        for name, last in (("semseg", False), ("semseg, channels_last", True)):
            candidate = build[name]()
            candidate.time(1)
            *called, parameters = semseg.calls[-1]
            assert called == [job == "train", last, getattr(torch, dtype)]
            before = parameters[2].detach().clone()  # the head's kernel
            candidate.time(1)
            assert torch.equal(before, parameters[2]) == (job == "inference")


def test_semseg_learns_faster_outside_the_backbone(semseg):
    import torch

    network = semseg.PSPNet(50, (1,), 0.1, 3, use_ppm=True, pretrained=False)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    candidates.semseg_optimizer(network, base_config().optimizer).step()
    for old, new, rate in zip(before, network.parameters(), (0.01, 0.01, 0.1, 0.1), strict=True):
        torch.testing.assert_close(old - new, rate * (1 + 1e-4 * old), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--semseg x --config.model.depth=18", "depth 50, 101 or 152, not 18"),
        ("--semseg x --crop 480 480", r"crops of 8k\+1 pixels, not \(480, 480\)"),
        ("--rouns 3", "'rouns'"),
        ("--config.model.dept=18", "dept"),
        ("rounds", "rounds: unknown argument"),
    ],
)
def test_wrong_arguments(tiny_recipe, capsys, arguments, message):
    with pytest.raises(SystemExit):
        model.parse(f"--config {tiny_recipe} {arguments}".split())
    assert re.search(message, capsys.readouterr().err)
