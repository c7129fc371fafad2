"""What a recipe needs on a TPU pod; most tests replace the compiler by a formula."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from pspnet_jax import main
from pspnet_jax.deploy import chips, preflight
from pspnet_jax.errors import UserError
from tests.processes import ROOT
from tests.train import tiny_config

GIB = 2**30
CHIP = chips.CHIPS["v5e"]


def program(total, temporary=0, **fields):
    values = {"state_bytes": GIB, "flops": 1.97e12, "traffic_bytes": 0, "collectives": {}, "compile_seconds": 1.0} | fields
    return preflight.Program(temporary_bytes=temporary, total_bytes=total, **values)


def test_names_of_topologies():
    assert chips.parse("v5e:4x4, v5p:2x4x4") == [("v5e", "4x4"), ("v5p", "2x4x4")]
    assert chips.chips("2x4x4") == 32
    assert chips.CHIPS["v5p"].cloud_name("2x4x4") == "v5p-64"  # named after its TensorCores
    assert chips.CHIPS["v5e"].cloud_name("16x16") == "v5litepod-256"
    with pytest.raises(UserError, match=r"^--topology: 'v5e:3x3' is unknown; --topology list shows all, such as v5e:4x4$"):
        chips.parse("v6e:2x2,v5e:3x3")


def test_the_roofline_is_the_slower_of_products_and_memory():
    assert program(0).roofline_seconds(CHIP) == pytest.approx(0.01)  # 1.97 of 197 TFLOP/s
    assert program(0, traffic_bytes=81.9e9).roofline_seconds(CHIP) == pytest.approx(0.1)  # 81.9 of 819 GB/s


@pytest.fixture
def compiler(monkeypatch):
    """Replaces the compiler: a train step needs 1 GiB, and more for each image, which `model.remat` and sharing reduce."""
    compiled = []

    def compile_train(config, mesh, chip):
        images = config.batch_size // mesh.shape["data"]
        each = {"none": 1.0, "norm": 0.6, "block": 0.3}[config.model.remat] * GIB / mesh.shape["spatial"]
        compiled.append(images)
        total = GIB + each * images**1.2 / 2**0.2  # grows faster than the number of images
        if total > chip.hbm:
            raise preflight.DoesNotFitError("the train step needs too much memory")
        return program(int(total), int(total - GIB))

    monkeypatch.setattr(preflight, "compile_train", compile_train)
    monkeypatch.setattr(preflight, "compile_evaluation", lambda *_: (program(2 * GIB), 4))
    monkeypatch.setattr(chips, "devices", lambda generation, topology: jax.devices()[: chips.chips(topology)])
    return compiled


def config_of(batch_size, **model):
    config = tiny_config()
    config.batch_size = batch_size
    config.model.update(model)
    return config


def test_the_largest_batch_is_found_in_a_few_tries(compiler):
    [row] = preflight.preflight(config_of(8), [("v5e", "2x2")])
    too_large = next(n for n in range(1, 100) if GIB * (1 + n**1.2 / 2**0.2) > CHIP.hbm)
    print(f"\n{row.largest} images per chip fit of at most {too_large - 1}; compiled: {compiler}")
    assert row.images == 8
    assert 7 / 8 * (too_large - 1) <= row.largest < too_large
    assert len(compiler) <= 1 + preflight.TRIES


def test_images_per_chip_set_the_batch_of_each_pod(compiler):
    rows = list(preflight.preflight(config_of(1), [("v5e", "2x2"), ("v5e", "2x4")], images_per_chip=2))
    assert [(row.chips, row.images) for row in rows] == [(4, 8), (8, 16)]


def test_a_batch_that_cannot_be_divided_is_refused(compiler):
    with pytest.raises(UserError, match=r"^v5e:2x4: batch_size=4: expected a multiple of 8, .*--config.batch_size=8"):
        list(preflight.preflight(config_of(4), [("v5e", "2x2"), ("v5e", "2x4")]))
    assert not compiler  # before the first topology is compiled


def test_a_recipe_that_does_not_fit_is_refused_with_what_would(compiler):
    with pytest.raises(UserError, match=r"^v5e:2x2: the train step needs too much memory") as error:
        list(preflight.preflight(config_of(4 * 24), [("v5e", "2x2")]))
    for tried in (
        "model.remat=norm does not fit either",
        "model.remat=block needs 12.8 GiB",
        "batch_size=48 does not fit either; batch_size=24 needs 8.5 GiB",
    ):
        assert tried in str(error.value)


def test_an_image_that_does_not_fit_is_shared_by_more_chips(compiler, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "v5e", CHIP._replace(hbm=1.2 * GIB))  # one image, of 0.3 GiB, needs 1.26 GiB
    config = config_of(4, remat="block")
    config.model.norm = "frozen"
    with pytest.raises(UserError, match=r"too much memory; parallel.spatial=2 with batch_size=2 needs 1.1 GiB$"):
        list(preflight.preflight(config, [("v5e", "2x2")]))


def test_the_job_writes_a_table_numbers_and_a_picture(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    arguments = ["--mode=preflight", "--config=configs/quickstart.py", "--topology=v5e:2x2,v5e:2x4", f"--output={tmp_path}"]
    assert main.main(arguments) == 0
    assert "v5litepod-8" in capsys.readouterr().out
    rows = json.loads((tmp_path / "preflight.json").read_text())
    assert [row["topology"] for row in rows] == ["v5e:2x2", "v5e:2x4"]
    assert rows[0]["roofline_images_per_second"] == pytest.approx(16 / 0.01)
    assert (tmp_path / "preflight.png").stat().st_size > 1000


def test_lists_and_mistakes(capsys):
    assert main.main(["--mode=preflight", "--topology=list"]) == 0
    assert "v6e:16x16" in capsys.readouterr().out
    assert main.main(["--mode=preflight", "--config=configs/quickstart.py"]) == 1
    assert "--mode preflight needs --topology" in capsys.readouterr().err


COMPILE = """
import dataclasses, json
from pspnet_jax import parallel
from pspnet_jax.deploy import chips, preflight
from tests.train import tiny_config

config, devices = tiny_config(), chips.devices("v5e", "2x2")
config.model.update(output_stride=8, dtype="bfloat16")
config.augment.crop = (256, 64)
for spatial in (1, 2):
    program = preflight.compile_train(config, parallel.make_mesh(devices, spatial), chips.CHIPS["v5e"])
    print(json.dumps(dataclasses.asdict(program)))
"""


@pytest.mark.slow
def test_a_small_network_is_compiled_for_a_tpu():
    """Chips that share images exchange rows with their neighbors, and do the same work.

    The compiler gets a process of its own: JAX's profiler crashes in a process that has loaded libtpu without a TPU.
    """
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone, shared = map(json.loads, done.stdout.splitlines())
    print(f"\nalone: {alone}\nshared: {shared}")
    assert alone["collectives"].keys() == {"all-reduce"}
    assert shared["collectives"]["collective-permute"][0] > 0
    assert shared["flops"] == pytest.approx(alone["flops"], rel=0.1)  # twice the images, half of the rows
    assert alone["state_bytes"] == shared["state_bytes"]
    assert 0 < shared["total_bytes"] < CHIP.hbm
