"""The recipes of the three benchmarks on tiny copies: check, train, evaluate, predict for the server."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import datasets
from pspnet_jax.main import main
from tests import fakes
from tests.test_main import ROOT, SMALL, error

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
# what --mode predict --format writes of a split: the format, the split, its files
SENT = {
    "ade20k": ("ade20k", "validation", ["ADE_val_00000001.png", "ADE_val_00000002.png"]),
    "voc2012": ("voc", "test", ["results/VOC2012/Segmentation/comp6_test_cls/9.png"]),
    "cityscapes": ("cityscapes", "test", ["aachen_000000_000019_leftImg8bit.png"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_from_its_files_to_its_server(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    root, run = tmp_path / "data", tmp_path / "run"
    LAYOUTS[name](root)
    command = [f"--config=configs/{name}.py", f"--config.dataset.root={root}"]
    said = error(capsys, "--mode=check", *command, f"--output={tmp_path}/check")
    assert "images officially, here" in said
    assert "2 problem(s) found" in said
    assert len(list((tmp_path / "check").glob("*.png"))) == 4
    assert main([*command, f"--workdir={run}", *SMALL, "--config.total_steps=2"]) == 0
    assert main(["--mode=evaluate", f"--workdir={run}"]) == 0
    (report,) = (run / "evaluation").glob("*.json")
    assert json.loads(report.read_text())["images"] == 2
    form, split, files = SENT[name]
    arguments = [f"--workdir={run}", f"--config.eval.split={split}", f"--output={tmp_path}/sent", f"--format={form}"]
    assert main(["--mode=predict", *arguments]) == 0
    assert sorted(str(path.relative_to(tmp_path / "sent")) for path in (tmp_path / "sent").rglob("*.png")) == files
    for file in files:
        values = np.unique(np.asarray(Image.open(Path(tmp_path / "sent" / file))))
        assert set(values.tolist()) <= set(datasets.RAW_VALUES[name])
    if split == "test":
        said = error(capsys, "--mode=evaluate", f"--workdir={run}", "--config.eval.split=test")
        assert "split 'test' has no labels" in said
