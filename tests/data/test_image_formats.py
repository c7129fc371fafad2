"""Training, evaluation and prediction read the same pixels, whatever the file format, pixel type and number of channels."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from pspnet_jax import image_files
from pspnet_jax.config import base_config
from pspnet_jax.data import pipeline, sources
from pspnet_jax.data.augment import AugmentationParams, apply_augmentation
from pspnet_jax.errors import UserError
from pspnet_jax.main import main
from tests import fakes


def write_bands(root, counts, channels=4, dtype="uint16", size=(40, 48)):
    """Writes a folder of TIFFs with random pixels; returns its images by split."""
    fakes.write_folder(root, counts, size, num_classes=2)
    images, generator = {}, np.random.default_rng(0)
    for path in sorted(root.glob("images/*/*.png")):
        image = (60_000 * generator.random((*size, channels)) + np.arange(channels)).astype(dtype)
        bands = {"planarconfig": "contig"} if channels > 1 else {}
        tifffile.imwrite(path.with_suffix(".tif"), image if bands else image[..., 0], photometric="minisblack", **bands)
        images.setdefault(path.parent.name, []).append(image)
        path.unlink()
    return images


def config_of(root, channels=4, dtype="uint16"):
    config = base_config()
    config.model.channels, config.dataset.image_dtype, config.dataset.root = channels, dtype, str(root)
    config.normalize.mean, config.normalize.std = (30_000.0,) * channels, (17_000.0,) * channels
    config.augment.crop, config.batch_size, config.total_steps = (33, 40), 2, 2
    return config


def test_a_folder_of_many_formats_is_read_as_by_prediction(tmp_path, caplog):
    image, label = fakes.pair("train", 0)
    root = fakes.write_folder(tmp_path, {"train": 1})
    endings = ("bmp", "gif", "jp2", "jpg", "PNG", "ppm", "tga", "tif", "tiff", "webp")
    for ending in endings:
        fakes.write_image(root / f"images/train/{ending}.{ending}", image, **({"lossless": True} if ending == "webp" else {}))
        fakes.write_image(root / f"labels/train/{ending}.png", label)
    fakes.write_image(root / "images/train/gif as jpg.jpg", image, format="GIF")
    fakes.write_image(root / "labels/train/gif as jpg.png", label)
    (root / "images/train/notes.txt").write_text("where the pictures are from")
    source = pipeline.open_training(config_of(root, 3, "uint8")).sources[0]
    assert f"{root}/images/train: 1 files are ignored" in caplog.text
    assert source.names == sorted(["000", "gif as jpg", *endings])
    config = config_of(root, 3, "uint8")
    config.eval.split = "train"
    examples = list(pipeline.as_numpy(pipeline.eval_dataset(config, source=source)))
    for index, example in enumerate(examples):
        expected = image_files.read(source.files(index)[0])
        np.testing.assert_array_equal(example["image"], expected, example["name"])
        np.testing.assert_array_equal(example["label"], label if index else fakes.pair("train", 0)[1])
        if example["name"] not in ("gif", "gif as jpg", "jpg", "jp2"):
            np.testing.assert_array_equal(expected, image)


@pytest.mark.parametrize("cache", ["", "memory", "disk"])
@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint16"), (1, "uint8"), (5, "float32")])
def test_batches_have_the_pixels_of_the_files(tmp_path, channels, dtype, cache):
    config = config_of(tmp_path, channels, dtype)
    images = write_bands(tmp_path, {"train": 2}, channels, dtype, size=(33, 40))["train"]
    config.augment.update(scale=(1.0, 1.0), rotate_probability=0.0, blur_probability=0.0, flip_probability=0.0)
    config.dataset.cache, config.dataset.cache_dir = cache, str(tmp_path / "cache")
    for batch in pipeline.as_numpy(pipeline.train_dataset(config)):  # two steps: the second is from the cache
        assert batch["image"].dtype == dtype
        found = sorted(batch["image"], key=lambda image: image.tobytes())
        np.testing.assert_array_equal(found, sorted(images, key=lambda image: image.tobytes()))


def test_other_pixels_are_refused_in_one_sentence(tmp_path):
    write_bands(tmp_path, {"train": 30})
    for channels, dtype, fault in (
        (
            4,
            "uint8",
            "has uint16 pixels, but dataset.image_dtype='uint8'; convert it, or train with dataset.image_dtype='uint16'",
        ),
        (5, "uint16", "has 4 channels, but model.channels=5; convert it, or train with model.channels=4"),
    ):
        with pytest.raises(UserError) as error:
            pipeline.open_training(config_of(tmp_path, channels, dtype))
        assert str(error.value) == f"{tmp_path}/images/train/000.tif: {fault} (and 29 more wrong pairs)"
    config = config_of(tmp_path)
    config.dataset.name, config.dataset.train_split = "scenes", "train"
    config.dataset.class_names = ()
    with pytest.raises(UserError, match=r"are uint8 with 3 channels; set --config.model.channels=3"):
        pipeline.open_training(config)


def test_a_damaged_band_file_is_named(tmp_path):
    write_bands(tmp_path, {"train": 2})
    path = tmp_path / "images/train/001.tif"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"images/train/001.tif: cannot be read because it is damaged or cut short"):
        sources.open_source(config_of(tmp_path).dataset, "train", channels=4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("blur", [False, True])
def test_every_channel_is_augmented_alike(channels, dtype, blur):
    """Each channel of the crop equals the red channel of a float32 crop of that channel alone, up to rounding."""
    generator = np.random.default_rng(channels)
    image = (200 * generator.random((50, 70, channels))).astype(dtype)
    label, params = np.zeros((50, 70), np.uint8), AugmentationParams(1.3, 7.0, blur, True, np.array([0.2, 0.7]))
    mean = tuple(10.0 + np.arange(channels))
    found, ignored = apply_augmentation(image, label, params, (60, 64), mean)
    assert (found.dtype, found.shape) == (dtype, (60, 64, channels))
    assert ignored.any()
    for channel in range(channels):
        alone = image[..., [channel] * 3].astype(np.float32)
        expected, _ = apply_augmentation(alone, label, params, (60, 64), (mean[channel],) * 3)
        difference = np.abs(found[..., channel] - expected[..., 0])
        assert difference.max() <= (1e-3 if dtype == "float32" else 0.55)


def test_statistics_are_those_of_all_training_pixels(tmp_path, capsys):
    images = write_bands(tmp_path / "data", {"train": 3, "val": 1})["train"]
    command = ["--config=configs/folder.py", f"--config.dataset.root={tmp_path}/data", "--config.model.channels=4"]
    command += ["--config.dataset.image_dtype=uint16", "--mode=check", f"--output={tmp_path}/check"]
    assert main(command) == 1
    assert "normalize.mean=(123.675, 116.28, 103.53): expected 4 values" in capsys.readouterr().err
    assert main([*command, "--write_statistics"]) == 0
    found = json.loads((tmp_path / "check/statistics.json").read_text())
    pixels = np.stack(images).reshape(-1, 4).astype(np.float64)
    assert found["pixels"] == len(pixels)
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-5)
    assert f"config.normalize.mean = {tuple(found['mean'])}\nconfig.normalize.std = " in capsys.readouterr().out


@pytest.mark.slow
def test_four_bands_of_16_bits_from_training_to_prediction(tmp_path, one_device):
    images = write_bands(tmp_path / "data", {"train": 2, "val": 2})["val"]
    small = ["depth=18", "width=8", "stem=conv7", "output_stride=32", "bins=1,2", "channels=4"]
    statistics = [f"--config.normalize.{name}={(value,) * 4}" for name, value in (("mean", 30_000.0), ("std", 17_000.0))]
    command = ["--config=configs/folder.py", f"--config.dataset.root={tmp_path}/data", f"--workdir={tmp_path}/run"]
    command += [f"--config.model.{field}" for field in small] + ["--config.dataset.image_dtype=uint16", *statistics]
    command += ["--config.augment.crop=(33, 33)", "--config.eval.crop=(33, 33)", "--config.eval.base_size=48"]
    assert main([*command, "--config.batch_size=2", "--config.total_steps=2"]) == 0
    assert main(["--mode=evaluate", f"--workdir={tmp_path}/run"]) == 0
    predict = ["--mode=predict", f"--workdir={tmp_path}/run", f"--output={tmp_path}/out"]
    assert main([*predict, f"--input={tmp_path}/data/images/val"]) == 0
    for index, image in enumerate(images):
        label = np.asarray(Image.open(tmp_path / f"out/index/{index:03d}.png"))
        assert label.shape == image.shape[:2]
    assert len(list((tmp_path / "out/overlay").glob("*.jpg"))) == 2
    export = ["--mode=export", f"--workdir={tmp_path}/run", "--format=onnx", f"--output={tmp_path}/a.onnx"]
    assert main(export) == 1
