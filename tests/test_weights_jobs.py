"""Third-party weights on the command line: import, evaluation and prediction like the original's, and training from them."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pspnet_jax
from pspnet_jax import config as configs
from pspnet_jax import models, parallel, weights
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.train import checkpoint, resume
from tests import fakes
from tests.test_main import SMALL, error, recipe

torch = pytest.importorskip("torch")
from tests.weights import reference_torch as reference  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
SIZE = (97, 113)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[Path, Path, "torch.nn.Module"]:
    """A workdir imported from an mmsegmentation PSPNet-18 with 3 classes, a folder of images, and the original network."""
    directory = tmp_path_factory.mktemp("import")
    network = reference.randomized(reference.MmsegPSPNet(18, 3, "deep32", align_corners=True))
    torch.save({"meta": {}, "state_dict": network.state_dict()}, directory / "net.pth")
    fakes.write_folder(directory / "data", {"train": 8, "val": 2}, size=SIZE, num_classes=3)
    arguments = ["--config.model.align_corners=true", "--config.eval.base_size=0", "--config.eval.short_size=0"]
    assert main(["--mode=import", f"--input={directory}/net.pth", f"--workdir={directory}/run", *arguments]) == 0
    return directory / "run", directory / "data", network


def test_an_import_predicts_like_the_original_network(imported, tmp_path):
    workdir, data, network = imported
    assert main(["--mode=predict", f"--workdir={workdir}", f"--input={data}/images/val", f"--output={tmp_path}"]) == 0
    for file in (data / "images/val").iterdir():
        pixels = (np.asarray(Image.open(file)) - MEAN) / STD
        with torch.no_grad():
            logits = network(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[0].numpy()
        label = np.asarray(Image.open(tmp_path / "index" / f"{file.stem}.png"))
        same = (label == logits.argmax(0)).mean()
        print(f"{same:.4%} of the pixels have the same class; classes {np.unique(label)}")
        assert same > 0.999
        assert len(np.unique(label)) > 1


def test_a_file_predicts_in_python_as_its_import_does_on_the_command_line(imported, tmp_path):
    workdir, data, _ = imported
    file, images = workdir.parent / "net.pth", sorted((data / "images/val").iterdir())
    assert main(["--mode=import", f"--input={file}", f"--workdir={tmp_path}/run"]) == 0
    settings = ["--config.eval.scales=0.5,1.0", f"--output={tmp_path}/out"]
    assert main(["--mode=predict", f"--workdir={tmp_path}/run", f"--input={data}/images/val", *settings]) == 0
    segmenter = pspnet_jax.load(file, scales=(0.5, 1.0))
    assert segmenter.classes == ("class 0", "class 1", "class 2")
    for image, result in zip(images, segmenter(images), strict=True):
        np.testing.assert_array_equal(result.labels, np.asarray(Image.open(tmp_path / "out/index" / f"{image.stem}.png")))
    torch.save(reference.ResNet(18).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth: .* backbone only; there is nothing to evaluate: train from it"):
        pspnet_jax.load(tmp_path / "resnet.pth")


def test_an_import_is_evaluated_with_its_own_protocol(imported, capsys):
    workdir, data, _ = imported
    assert main(["--mode=evaluate", f"--workdir={workdir}", f"--config.dataset.root={data}"]) == 0
    assert "whole images, own size, scales 1.0, flip off, protocol mmseg" in capsys.readouterr().out
    (file,) = (workdir / "evaluation").glob("*_val_step0_*_whole_*.json")
    assert json.loads(file.read_text())["images"] == 2


def test_imports_and_exports_that_are_refused(imported, tmp_path, capsys):
    workdir, _, _ = imported
    net = f"--input={workdir.parent}/net.pth"
    assert "already holds a run" in error(capsys, "--mode=import", net, f"--workdir={workdir}")
    assert "needs --input" in error(capsys, "--mode=import", net)
    output = error(capsys, "--mode=export", f"--workdir={workdir}", "--format=torch", f"--output={tmp_path}/x.pth")
    assert "semseg's code cannot compute this network, which has model." in output
    assert "needs --output" in error(capsys, "--mode=export", f"--workdir={workdir}", "--format=torch")
    output = error(capsys, "--mode=import", net, f"--workdir={tmp_path}/other", "--config.model.stem=conv7")
    assert "set --config.model.stem=deep32" in output
    assert list(tmp_path.iterdir()) == []


def test_an_import_lists_its_assumptions_unless_the_user_sets_them(imported, tmp_path, capsys):
    """The file has raw weights and their average, and bins that no array shows."""
    _, _, network = imported
    content = {"net": network.state_dict(), "ema": reference.randomized(copy.deepcopy(network), seed=1).state_dict()}
    torch.save(content, tmp_path / "net.ckpt")
    command = ["--mode=import", f"--workdir={tmp_path}/run", "--config.model.align_corners=true", "--config.model.bins=1,2,4,8"]
    names = "--config.dataset.class_names=('sky', 'sea', 'sand')"
    assert main([*command, f"--input={tmp_path}/net.ckpt:ema", names]) == 0
    output = capsys.readouterr().out
    assert f"using the weights in 'ema'; for the others, use {tmp_path}/net.ckpt:net" in output
    [assumed] = [line for line in output.splitlines() if line.startswith("ASSUMED")]
    assert "--config.model.stride_in=conv3x3" in assumed
    assert not re.search("align_corners|bins|class", assumed)
    config, _, variables = checkpoint.load(tmp_path / "run", "latest", parallel.make_mesh())
    assert (config.model.bins, config.model.align_corners) == ((1, 2, 4, 8), True)
    assert config.dataset.class_names == ("sky", "sea", "sand")
    kernel = content["ema"]["decode_head.bottleneck.conv.weight"].numpy()
    np.testing.assert_array_equal(variables["params"]["head_conv"]["kernel"], kernel.transpose(2, 3, 1, 0))


@pytest.fixture(scope="module")
def named(imported) -> tuple[Path, np.ndarray]:
    """A file of the network that has class names and a normalization, and the bias of its classifier."""
    workdir, _, network = imported
    cfg = "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"
    path = workdir.parent / "named.pth"
    meta = {"CLASSES": ("c2", "c1", "c0"), "cfg": cfg}
    torch.save({"meta": meta, "state_dict": network.state_dict(), "ema": network.state_dict()}, path)
    return path, network.state_dict()["decode_head.conv_seg.bias"].numpy()


@pytest.mark.parametrize(
    ("names", "rows", "output"),
    [
        (("c2", "c1", "c0"), [0, 1, 2], ""),
        (("C0", "C1", "C2"), [2, 1, 0], "classifier rows are matched by class name: kept: C1; moved: C0 (2 -> 0), C2 (0 -> 2)"),
        (("c2", "road", "c0"), [0, 1, 2], "(class 1 is 'c1' there, 'road' in this config): the classifier rows are kept"),
    ],
)
def test_an_import_matches_classifier_rows_by_class_name(named, tmp_path, capsys, names, rows, output):
    path, bias = named
    command = ["--mode=import", f"--input={path}", f"--workdir={tmp_path}/run", f"--config.dataset.class_names={names}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert output in out if output else "classifier rows" not in out
    assert "ASSUMED, though" not in out
    config, _, variables = checkpoint.load(tmp_path / "run", "latest", parallel.make_mesh())
    assert config.dataset.class_names == names
    np.testing.assert_array_equal(variables["params"]["classifier"]["bias"], bias[rows])


def test_training_matches_classifier_rows_by_class_name_and_logs_the_entry(named, caplog):
    path, bias = named
    config = configs.base_config()
    weights.configure(config, weights.inspect(path))
    config.init_from, names = str(path), ("c0", "c1", "c2")
    with caplog.at_level("INFO", "pspnet_jax"):
        given, old = resume.initial_weights(config, models.build(config.model, 3), parallel.make_mesh())
    assert f"using the weights in 'state_dict'; for the others, use {path}:ema" in caplog.text
    given = resume.match_classes(given, given, old, names, "named.pth")
    np.testing.assert_array_equal(given["params"]["classifier"]["bias"], bias[::-1])


def test_an_import_refuses_another_normalization_than_in_its_file(named, tmp_path, capsys):
    command = ["--mode=import", f"--input={named[0]}", f"--workdir={tmp_path}/run", "--config.normalize.order=BGR"]
    assert "it was trained with another normalization: set --config.normalize.order=RGB" in error(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_an_import_of_a_backbone_ends_in_one_sentence(tmp_path, capsys):
    torch.save({"model_state_dict": reference.ResNet(18).state_dict()}, tmp_path / "resnet.pth")
    output = error(capsys, "--mode=import", f"--input={tmp_path}/resnet.pth", f"--workdir={tmp_path}/run")
    assert "depth 18, backbone only; there is nothing to evaluate: train from it with --config.init_from=" in output
    assert not (tmp_path / "run").exists()


def test_training_starts_from_a_backbone(imported, tmp_path, capsys):
    """After one step with a tiny learning rate, the weights are still those of ImageNet, but the batch statistics are not."""
    _, data, _ = imported
    network = reference.randomized(reference.ResNet(18))
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    own = recipe(tmp_path / "own.py", data)
    wide = [argument for argument in SMALL if "width" not in argument]
    command = [f"--config={own}", f"--workdir={tmp_path}/run", *wide, f"--config.init_from={tmp_path}/resnet18.pth"]
    assert "set --config.model.stem=conv7" in error(capsys, *command)
    command += ["--config.model.stem=conv7", "--config.total_steps=1", "--config.optimizer.learning_rate=1e-12"]
    assert main(command) == 0
    assert "missing in" in capsys.readouterr().out
    _, step, variables = checkpoint.load(tmp_path / "run", "latest", parallel.make_mesh())
    kernel = np.asarray(variables["params"]["backbone"]["layer3_block1"]["conv2"]["conv"]["kernel"])
    expected = network.state_dict()["layer3.1.conv2.weight"].numpy().transpose(2, 3, 1, 0)
    print(f"step {step}: the kernel differs by {np.abs(kernel - expected).max():.1e}")
    np.testing.assert_allclose(kernel, expected, atol=1e-6)
    mean = np.asarray(variables["batch_stats"]["backbone"]["layer1_block0"]["conv1"]["bn"]["mean"])
    assert not np.allclose(mean, network.state_dict()["layer1.0.bn1.running_mean"].numpy())
