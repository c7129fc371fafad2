"""Folders for the hub: what they state comes from the run, and they are read back as the same network."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from etils import epath
from PIL import Image

import pspnet_jax
from pspnet_jax import class_lists, models, optimizers, parallel, weights
from pspnet_jax.config import base_config
from pspnet_jax.deploy import hub
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from pspnet_jax.train import checkpoint, resume
from pspnet_jax.train.step import new_state
from tests import fakes
from tests import hub as hubs
from tests.deploy import networks
from tests.test_main import error

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

NAMES = ("traffic light", "road, wet", "Bürgersteig")
MODEL = {"depth": 18, "width": 8, "stem": "deep32", "bins": (1, 3), "align_corners": False, "output_stride": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A run with random weights that was evaluated, and its dataset."""
    directory = tmp_path_factory.mktemp("hub")
    data = fakes.write_folder(directory / "data", {"val": 2}, size=(49, 57), num_classes=3)
    (data / "classes.txt").write_text("".join(f'"{name}" {i} 20 30\n' for i, name in enumerate(NAMES)))
    config = networks.make_config(3, **MODEL)
    config.update({"name": "streets", "total_steps": 1})
    config.normalize.update({"mean": (100.0, 110.0, 120.0), "std": (50.0, 51.0, 52.0), "order": "BGR"})
    config.eval.update({"crop": (41, 49), "base_size": 0, "scales": (0.5, 1.0)})
    config.dataset.update({"root": str(data), "class_names": NAMES, "colors": ((0, 20, 30), (1, 20, 30), (2, 20, 30))})
    variables = networks.random_variables(config, networks.random_images(2, 65, 65))
    state = new_state(config, optimizers.build(config.optimizer, 1), variables)
    checkpoint.create_run(directory / "run", config, jax.device_put(state, parallel.replicated(parallel.make_mesh())))
    assert main(["--mode=evaluate", f"--workdir={directory}/run"]) == 0
    return directory / "run", data


@pytest.fixture(scope="module")
def folder(run) -> Path:
    workdir, data = run
    path = workdir.parent / "hub"
    command = ["--mode=export", "--format=hf", f"--workdir={workdir}", f"--output={path}", "--license=mit"]
    assert main([*command, f"--input={data}/images/val/000.png"]) == 0
    return path


def header(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_the_folder_has_what_the_hub_expects(folder):
    names = ["README.md", "classes.txt", "config.json", "example.png", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": NAMES[0], "1": NAMES[1], "2": NAMES[2]}
    assert config["model"]["bins"] == [1, 3]
    names, colors = class_lists.parse((folder / "classes.txt").read_text(encoding="utf-8"), "classes.txt")
    assert (names, colors) == (NAMES, {0: (0, 20, 30), 1: (1, 20, 30), 2: (2, 20, 30)})
    with Image.open(folder / "example.png") as picture:
        assert picture.width > 2 * 57
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
        assert "layer0.0.weight" in file.keys()  # noqa: SIM118 -- this is no dict


def test_the_card_states_the_score_of_the_run_with_its_protocol(run, folder):
    (report,) = (json.loads(path.read_text()) for path in (run[0] / "evaluation").glob("*.json"))
    found = header(folder)
    assert (found["library_name"], found["pipeline_tag"], found["license"]) == ("pspnet_jax", "image-segmentation", "mit")
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"name": "streets", "type": "streets", "split": "val"}
    metric = result["metrics"][0]
    assert metric["type"] == "mean_iou"
    assert metric["value"] == round(100 * report["mean_iou"], 2)
    assert "windows 41x49, own size, scales 0.5, 1.0, flip on, protocol semseg" in metric["name"]
    assert f"| {report['mean_iou']:.2%} |" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_shows_a_stranger_how_to_use_the_network(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "output stride 16, for 3 classes.\n" in text
    install, code = (text.split(f"```{language}\n")[1].split("\n```")[0] for language in ("sh", "python"))
    assert install in Path("README.md").read_text(encoding="utf-8").replace("[train]", "")
    exec(code.replace("hf://USER/REPO", str(folder)).replace("photo.jpg", str(folder / "example.png")), found := {})
    assert found["labels"].dtype == np.uint8


def test_without_an_evaluation_the_card_states_no_score(run, tmp_path, capsys):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(workdir / "evaluation")
    assert main(["--mode=export", "--format=hf", f"--workdir={workdir}", f"--output={tmp_path}/hub"]) == 0
    output = capsys.readouterr().out
    assert "has no score of step 0" in output
    assert "--input IMAGE adds the prediction" in output
    assert "choose one with --license" in output
    found = header(tmp_path / "hub")
    assert "model-index" not in found
    assert found["license"] == "unknown"
    assert "These weights were not evaluated." in (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "hub/example.png").exists()


def test_scores_of_other_steps_and_networks_are_not_stated(run, tmp_path):
    config, _, variables = checkpoint.load(run[0], "latest", parallel.make_mesh())
    other = config.copy_and_resolve_references()
    other.model.stem = "deep"
    trained_again = jax.tree.map(lambda array: array + 1, variables)
    workdir = epath.Path(run[0])
    assert len(hub.read_scores(workdir, 0, config, variables, None)) == 1
    assert hub.read_scores(workdir, 1, config, variables, None) == hub.read_scores(workdir, 0, other, variables, None) == []
    assert hub.read_scores(workdir, 0, config, trained_again, None) == []


def test_a_score_on_another_folder_has_its_name(run, tmp_path):
    config, _, variables = checkpoint.load(run[0], "latest", parallel.make_mesh())
    workdir = shutil.copytree(run[0], tmp_path / "run")
    (file,) = workdir.glob("evaluation/*.json")
    found = json.loads(file.read_text()) | {"dataset": "folder", "tfds_name": ""}
    for root in (config.dataset.root, "/data/other city/"):
        (workdir / f"evaluation/{len(root)}.json").write_text(json.dumps(found | {"root": root}))
    file.unlink()
    assert {score.dataset for score in hub.read_scores(epath.Path(workdir), 0, config, variables, None)} == {
        config.name,
        "other city",
    }


def test_the_score_of_training_is_stated_if_there_is_no_other(tmp_path):
    config = base_config()
    config.dataset.name = "ade20k"
    metrics = {"score": 0.25, "mean_iou": 0.25, "mean_accuracy": 0.5, "pixel_accuracy": 0.75}
    trained = metrics | {"settings": resume.evaluation_settings(config) | {"data": "abc"}}
    trained |= {"base_size": 512.0, "classes_in_mean_iou": 140.0}  # all numbers that an evaluation returns, as floats
    (score,) = hub.read_scores(epath.Path(tmp_path), 7, config, {}, trained)
    assert score[:2] == ("ade20k", "val")
    assert (
        score.protocol == "windows 473x473, long side 512, scales 1.0, flip on, protocol semseg, mIoU over 140 of 150 classes"
    )
    assert score.metrics == {"mean_iou": 0.25, "mean_accuracy": 0.5, "pixel_accuracy": 0.75}


def test_the_example_of_training_is_an_image_beside_its_labels(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, width in (("confusion_matrix", 7), ("val_1", 8)):
        Image.new("RGB", (width, 5)).save(tmp_path / "pictures" / f"{name}.png")
    assert hub.example(lambda: None, None, epath.Path(tmp_path)).size == (8, 5)


def test_preprocessing_in_the_terms_of_the_hub_is_ours():
    normalize = base_config().normalize
    normalize.update({"mean": (100.0, 110.0, 120.0), "std": (50.0, 51.0, 52.0), "order": "BGR"})
    found = hub.preprocessor(normalize)
    image = networks.random_images(1, 5, 7)
    flipped = image[..., ::-1] if found["do_flip_channel_order"] else image
    theirs = (flipped * found["rescale_factor"] - np.array(found["image_mean"])) / np.array(found["image_std"])
    np.testing.assert_allclose(theirs, models.normalize(image, normalize), atol=1e-5)


@pytest.mark.parametrize("given", ["", "/model.safetensors"])
def test_an_import_of_the_folder_is_the_same_run(given, run, folder, tmp_path):
    assert main(["--mode=import", f"--input={folder}{given}", f"--workdir={tmp_path}/run"]) == 0
    saved, _, variables = checkpoint.load(run[0], "latest", parallel.make_mesh())
    config, _, imported = checkpoint.load(tmp_path / "run", "latest", parallel.make_mesh())
    assert same(variables, imported)
    for section in ("model", "normalize", "eval"):
        assert config[section].to_dict() == saved[section].to_dict()
    assert (config.dataset.class_names, config.dataset.colors) == (NAMES, saved.dataset.colors)


def test_the_file_alone_has_its_config(run, folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "streets.safetensors")
    source = weights.inspect(tmp_path / "streets.safetensors")
    assert source.class_names == NAMES
    assert {field: source.model[field] for field in MODEL} == MODEL
    assert source.model == weights.inspect(folder).model


def test_the_config_beside_the_weights_counts(folder, tmp_path):
    edited = shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text(encoding="utf-8"))
    config["id2label"]["0"] = "lamp"
    (edited / "config.json").write_text(json.dumps(config))
    assert weights.inspect(edited).class_names == ("lamp", *NAMES[1:])


def test_training_starts_from_a_folder(run, folder):
    saved, _, variables = checkpoint.load(run[0], "latest", parallel.make_mesh())
    saved.init_from = str(folder)
    given, names = resume.initial_weights(saved, models.build(saved.model, 3), parallel.make_mesh())
    assert names == NAMES
    assert same(jax.tree.map(np.asarray, given), jax.tree.map(np.asarray, variables))
    saved.normalize.order = "RGB"
    with pytest.raises(UserError, match=r"set --config\.normalize\.order=BGR"):
        resume.initial_weights(saved, models.build(saved.model, 3), parallel.make_mesh())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("model"), "its config.json is incomplete or damaged"),
        (lambda config: config["id2label"].pop("1"), "its config.json is incomplete or damaged"),
        (lambda config: config.update(colors=[[1]]), "its config.json is incomplete or damaged"),
        (lambda config: config["model"].update(depth=51), "its config.json has model.depth=51: expected one of 18, 34"),
        (lambda config: config["model"].update(stem="conv7"), "its arrays do not fit"),
    ],
)
def test_a_wrong_config_ends_in_one_sentence(change, message, folder, tmp_path, capsys):
    edited = shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text(encoding="utf-8"))
    change(config)
    (edited / "config.json").write_text(json.dumps(config))
    assert message in error(capsys, "--mode=import", f"--input={edited}", f"--workdir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_exports_that_are_refused(run, folder, tmp_path, capsys):
    command = ["--mode=export", f"--workdir={run[0]}"]
    assert "needs --output" in error(capsys, *command, "--format=hf")
    assert "expected one of torch, safetensors, hf, stablehlo" in error(
        capsys, *command, "--format=coreml", f"--output={tmp_path}/x"
    )
    assert "already exists" in error(capsys, *command, "--format=hf", f"--output={folder}")
    output = error(capsys, *command, "--format=hf", f"--output={tmp_path}/x", "--batch=1")
    assert "--batch: --format hf does not use it, only stablehlo, savedmodel, onnx, tflite; leave it out" in output
    output = error(capsys, *command, "--format=onnx", f"--output={tmp_path}/x.onnx", "--license=mit")
    assert "--license: --format onnx does not use it, only hf; leave it out" in output
    missing = ["--mode=export", f"--workdir={tmp_path}/nowhere"]  # what can be refused without the run comes first
    for given, message in [
        (["--format=hf", f"--output={tmp_path}/x", "--input=hf://a/b"], "--mode export takes images there"),
        (["--format=hf", f"--output={tmp_path}/x", "--input=https://a/b.png"], "a/b.png: cannot be read or written here"),
        (["--format=hf", f"--output={tmp_path}/x", f"--input={tmp_path}/y"], "no such image"),
        (["--format=torch", f"--output={tmp_path}/x"], "expected a name that ends in .pth"),
        (["--format=onnx", f"--output={tmp_path}/x.onnx", "--size=any"], "--size any: onnx files have a fixed image size"),
        (["--format=tflite", f"--output={tmp_path}/x.tflite", "--batch=0"], "--batch 0: tflite files hold a fixed number"),
    ]:
        assert message in error(capsys, *missing, *given)
    assert "expected HEIGHTxWIDTH" in error(capsys, *command, "--format=onnx", f"--output={tmp_path}/x.onnx", "--size=473")
    assert list(tmp_path.iterdir()) == []


def test_a_program_has_the_size_of_the_evaluation_crop(run, tmp_path):
    command = ["--mode=export", f"--workdir={run[0]}", "--format=stablehlo", f"--output={tmp_path}/x.stablehlo"]
    assert main(command) == 0
    loaded = jax.export.deserialize((tmp_path / "x.stablehlo").read_bytes())
    assert [(aval.shape, str(aval.dtype)) for aval in loaded.in_avals] == [((1, 41, 49, 3), "uint8")]
    assert [(aval.shape, str(aval.dtype)) for aval in loaded.out_avals] == [((1, 41, 49), "uint8")]
    assert json.loads((tmp_path / "x.stablehlo.json").read_text())["classes"] == list(NAMES)


def test_the_folder_is_read_back_from_the_hub(folder, run, tmp_path):
    with hubs.used(tmp_path) as served:
        served.repos["me/streets"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        segmenter = pspnet_jax.load("hf://me/streets")
        assert {path.name for path in Path(weights.fetch("hf://me/streets")).parent.iterdir()} == {
            "model.safetensors",
            "config.json",
            "preprocessor_config.json",
        }
        assert main(["--mode=import", "--input=hf://me/streets", f"--workdir={tmp_path}/imported"]) == 0
        served.files["/net.safetensors"] = content = (folder / "model.safetensors").read_bytes()
        url = f"{served.url}/files/net.safetensors#sha256={hashlib.sha256(content).hexdigest()}"
        assert main(["--mode=import", f"--input={url}", f"--workdir={tmp_path}/by_address"]) == 0
    assert json.loads((tmp_path / "by_address/config.json").read_text())["name"] == "net"
    _, _, variables = checkpoint.load(run[0], "latest", parallel.make_mesh())
    config, _, imported = checkpoint.load(tmp_path / "imported", "latest", parallel.make_mesh())
    assert segmenter.classes == config.dataset.class_names == NAMES
    assert (config.model.bins, config.normalize.order) == ((1, 3), "BGR")
    kernel = variables["params"]["head_conv"]["kernel"]
    for other in (segmenter.variables, imported):
        np.testing.assert_array_equal(other["params"]["head_conv"]["kernel"], kernel)
