"""Published networks are recognized, evaluated by the protocol of their publication, and compared with its scores."""

import json
import re

import pytest

from pspnet_jax import weights
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.weights import published
from tests import fakes
from tests.test_main import error

torch = pytest.importorskip("torch")
from tests.weights import reference_torch as reference  # noqa: E402
from tests.weights.test_source import mmseg, write  # noqa: E402

NAME = "pspnet_r18-d8_512x1024_80k_cityscapes"


def find(path):
    return published.find(weights.inspect(path))


@pytest.mark.parametrize(
    ("depth", "classes", "dataset", "scores"),
    [(50, 150, "ade20k", (41.89, 42.84)), (101, 21, "voc2012", (79.07, 79.63)), (101, 19, "cityscapes", (78.63, 79.29))],
)
def test_semsegs_networks_are_recognized_by_depth_and_classes(depth, classes, dataset, scores, tmp_path):
    network = find(write(tmp_path / "train_epoch_100.pth", lambda: reference.SemsegPSPNet(depth, classes)))
    assert network.dataset == dataset
    evaluations = network.evaluations()
    assert tuple(score for _, score in evaluations.values()) == scores
    assert [fields["scales"] for fields, _ in evaluations.values()] == [(1.0,), (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]


def test_mmsegs_networks_are_recognized_by_their_names(tmp_path):
    assert find(mmseg(tmp_path / f"{NAME}_20201225_021458-09ffa746.pth")).one_scale == 74.87
    assert find(mmseg(tmp_path / "pspnet_r18b-d8_769x769_80k_cityscapes-20.pth")).six_scales == 76.90
    with pytest.raises(UserError, match=r"which one it is shows only in its name: rename it to begin with one of") as caught:
        find(mmseg(tmp_path / "net.pth"))
    listed = str(caught.value).splitlines()[1:]
    assert len(listed) == 4  # of depth 18: two crops, and the two stems
    assert f"  {NAME}" in listed


def test_networks_without_a_published_score_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"(?s)no score on a validation split is published for it; .*PSPNet-101 of .*semseg for voc"
    ):
        find(write(tmp_path / "net.pth", lambda: reference.SemsegPSPNet(50, 7)))


def test_each_name_is_unique():
    """No network is taken for another one, whose name its own begins with."""
    names = [network.name for network in published.PUBLISHED if network.name]
    assert not [(one, other) for one in names for other in names if one != other and other.startswith(one)]
    keys = [network[:3] for network in published.PUBLISHED if not network.name]
    assert len(set(keys)) == len(keys)


def test_the_tolerance_is_a_tenth_of_a_point():
    network = published.PUBLISHED[0]
    published.require_agreement(network, {"one scale": 41.99, "six scales": 42.74})
    with pytest.raises(UserError, match=r"differs from the published one by -0.11 at six scales; expected at most 0.1$"):
        published.require_agreement(network, {"one scale": 41.99, "six scales": 42.73})


@pytest.mark.slow
def test_a_published_network_is_verified(tmp_path, capsys, monkeypatch):
    """The scores are those of --mode import and --mode evaluate. Small scales stand in for the published ones."""
    monkeypatch.setattr(published, "SCALES", {"one scale": (1 / 16,), "six scales": (1 / 16, 1 / 8)})
    network = reference.randomized(reference.MmsegPSPNet(18, 19, "deep32", align_corners=False))
    torch.save({"meta": {}, "state_dict": network.state_dict()}, tmp_path / f"{NAME}_1.pth")
    fakes.write_cityscapes(tmp_path / "data", {"val": 2})
    command = ["--mode=verify", f"--input={tmp_path}/{NAME}_1.pth", f"--config.dataset.root={tmp_path}/data"]
    command += [f"--workdir={tmp_path}/verified"]
    message = error(capsys, *command)
    differences = [float(number) for number in re.findall(r"([-+][\d.]+) at", message)]
    assert main(["--mode=import", f"--input={tmp_path}/{NAME}_1.pth", f"--workdir={tmp_path}/run"]) == 0
    scores = []
    for options in (["--config.eval.scales=0.0625"], ["--config.eval.scales=0.0625,0.125", "--config.eval.flip=true"]):
        evaluate = ["--mode=evaluate", f"--workdir={tmp_path}/run", f"--config.dataset.root={tmp_path}/data", *options]
        assert main(evaluate) == 0
        reports = (tmp_path / "run/evaluation").glob("*.json")
        scores.append(100 * json.loads(max(reports, key=lambda path: path.stat().st_mtime_ns).read_text())["mean_iou"])
    print(f"\nmIoU at one and two scales: {scores}")
    assert differences == pytest.approx([scores[0] - 74.87, scores[1] - 76.04], abs=0.0051)
    assert scores[0] != scores[1]
    assert len(list((tmp_path / "verified/evaluation").glob("*.json"))) == 2
    exact = published.Published("mmseg", "cityscapes", 18, *scores, NAME)
    monkeypatch.setattr(published, "PUBLISHED", (exact,))
    capsys.readouterr()
    assert main(command) == 0
    output = capsys.readouterr().out
    assert output.count("+0.00") == 2
    assert output.count("checked 2 pairs of files") == 1


def test_only_the_data_can_be_set(tmp_path, capsys):
    mmseg(tmp_path / f"{NAME}.pth")
    command = ["--mode=verify", f"--input={tmp_path}/{NAME}.pth"]
    assert "eval.scales" in (message := error(capsys, *command, "--config.eval.scales=1.0,2.0"))
    assert "only dataset.root, dataset.extra_root, dataset.cache_dir, eval.batch_size can be set" in message
    assert "--mode verify needs --input" in error(capsys, "--mode=verify")
    assert "--config: --mode verify does not use it" in error(capsys, *command, "--config=configs/cityscapes.py")
