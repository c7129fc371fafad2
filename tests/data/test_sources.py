import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from pspnet_jax import image_files
from pspnet_jax.config import base_config
from pspnet_jax.data import overlap, scenes, screening, sources
from pspnet_jax.errors import UserError
from tests import fakes


def recipe(**fields):
    dataset = base_config().dataset
    dataset.update(fields)
    return dataset


def open_folder(root, split="train"):
    return sources.open_source(recipe(root=str(root)), split)


def assert_loads(source, index, image, label):
    loaded = source.read(index)
    np.testing.assert_array_equal(loaded[0], image)
    np.testing.assert_array_equal(loaded[1], label)
    np.testing.assert_array_equal(source.read_label(index), label)


# Folder


def test_folder_loads_what_was_written(tmp_path):
    source = open_folder(fakes.write_folder(tmp_path, {"train": 3, "val": 2}), "val")
    assert (len(source), source.names) == (2, ["000", "001"])
    for index in range(2):
        assert_loads(source, index, *fakes.pair("val", index))


def test_folder_formats_and_subfolders(tmp_path):
    image, label = fakes.pair("train", 0)
    root = fakes.write_folder(tmp_path, {"train": 1})
    for name, picture in {"b/jpeg.JPEG": image, "b/gray.png": image[..., 0], "a/c/jpg.jpg": image}.items():
        fakes.write_image(root / "images/train" / name, picture)
        fakes.write_image((root / "labels/train" / name).with_suffix(".png"), label)
    (root / "images/train/.hidden.png").write_bytes(b"")
    (root / "images/train/Thumbs.db").write_bytes(b"")
    source = open_folder(f"{root}/")
    assert source.names == ["000", "a/c/jpg", "b/gray", "b/jpeg"]
    assert_loads(source, 1, np.asarray(Image.open(root / "images/train/a/c/jpg.jpg")), label)  # equals Pillow's pixels
    assert_loads(source, 2, np.repeat(image[..., :1], 3, axis=2), label)


def test_palette_labels_are_read_by_index(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    image, label = fakes.pair("train", 0)
    fakes.write_palette(root / "labels/train/000.png", label)
    assert_loads(open_folder(root), 0, image, label)


def test_palette_labels_of_fewer_bits(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    image, label = fakes.pair("train", 0)
    label = np.where(label == 255, 0, label)
    picture = Image.fromarray(label, "P")
    picture.putpalette([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2])
    picture.save(root / "labels/train/000.png", bits=2)
    assert_loads(open_folder(root), 0, image, label)


def test_remote_root(monkeypatch):
    """TensorFlow's ram:// stands in for gs://: every access is through tf.io, except for classes.txt, which etils reads."""
    monkeypatch.setattr(sources.datasets, "_listed_classes", lambda dataset: None)
    image, label = fakes.pair("train", 0)
    for kind, array in (("images", image), ("labels", label)):
        tf.io.gfile.makedirs(f"ram://set/{kind}/train")
        tf.io.write_file(f"ram://set/{kind}/train/x.png", tf.io.encode_png(array if array.ndim == 3 else array[..., None]))
    source = sources.open_source(recipe(root="ram://set", class_names=("a", "b", "c", "d")), "train")
    assert source.names == ["x"]
    assert_loads(source, 0, image, label)


IMAGE, LABEL = "images/train/001.png", "labels/train/001.png"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def _as(path, format, mode="RGB"):
    image = Image.open(path).convert(mode)
    image.save(path, format=format)


def _jpeg_cut_short(path):
    fakes.write_image(path.with_suffix(".jpg"), fakes.pair("train", 1)[0])
    path.unlink()
    _truncate(path.with_suffix(".jpg"))


def _turn(path, tag):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    Image.open(path).save(path, exif=exif)


def _set_label(path, *values):
    label = fakes.pair("train", 1)[1].copy()
    label[0, : len(values)] = values
    fakes.write_image(path, label)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (LABEL, lambda p: p.unlink(), r"labels/train/001.png: no such file; it belongs to .*images/train/001.png"),
        (IMAGE, lambda p: p.unlink(), r"images/train/001.jpg: no such file; it belongs to .*labels/train/001.png"),
        (
            IMAGE,
            lambda p: fakes.write_image(p.with_suffix(".jpg"), fakes.pair("train", 1)[0]),
            r"001.* two files of the same name",
        ),
        (IMAGE, lambda p: p.write_bytes(b""), r"images/train/001.png: cannot be read"),
        (IMAGE, _truncate, r"images/train/001.png: cannot be read because it is damaged or cut short"),
        (IMAGE, _jpeg_cut_short, r"images/train/001.jpg: cannot be read because it is damaged or cut short"),
        (IMAGE, lambda p: _as(p, "BMP"), r"images/train/001.png: is a BMP file despite its name"),
        (IMAGE, lambda p: _as(p, "JPEG", "CMYK"), r"images/train/001.png: is a CMYK image"),
        (LABEL, _truncate, r"labels/train/001.png: cannot be read because it is damaged or cut short"),
        (LABEL, lambda p: _as(p, "JPEG", "L"), r"labels/train/001.png: is a JPEG file despite its name"),
        (
            LABEL,
            lambda p: fakes.write_image(p, 255 - fakes.pair("train", 1)[0]),
            r"001.png: has colors instead of",
        ),
        (LABEL, lambda p: fakes.write_image(p, np.full((40, 48), 300, np.uint16)), r"001.png: has value 300; expected at most"),
        (LABEL, lambda p: shutil.copy(p.parents[2] / IMAGE, p), r"labels/train/001.png: is a copy of its image"),
        (LABEL, lambda p: _turn(p, 3), r"labels/train/001.png: has EXIF orientation 3, but labels are read without turning"),
        (LABEL, lambda p: fakes.write_image(p, np.zeros((40, 47), np.uint8)), r"001.png: is 47x40, but its image .* is 48x40"),
        (LABEL, lambda p: _set_label(p, 4), r"labels/train/001.png: label value 4 at 1 pixels.*0..3 .*count from 1"),
        (LABEL, lambda p: _set_label(p, 33, 26, 26), r"labels/train/001.png: label value 26 at 2 pixels.*raw ids"),
    ],
)
def test_wrong_files_are_named(tmp_path, file, damage, message):
    root = fakes.write_folder(tmp_path, {"train": 3})
    damage(root / file)
    with pytest.raises(UserError, match=message) as error:
        open_folder(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("after_the_check", [False, True])
@pytest.mark.parametrize("kind", ["16 bits", "4 bits", "RGB", "1 bit"])
def test_pngs_of_class_indices_in_other_pixel_formats(tmp_path, kind, after_the_check):
    """TensorFlow would silently read the upper 8 of 16 bits, multiples of 17 for 4 bits, and 255 for 1."""
    path = fakes.write_folder(tmp_path, {"train": 1}) / "labels/train/000.png"
    source = open_folder(tmp_path)
    label = fakes.pair("train", 0)[1] % 4
    if kind == "4 bits":
        header = b"IHDR" + struct.pack(">IIBBBBB", 48, 40, 4, 0, 0, 0, 0)
        rows = b"".join(b"\0" + bytes(row[::2] * 16 + row[1::2]) for row in label)
        chunks = [header, b"IDAT" + zlib.compress(rows), b"IEND"]
        coded = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))
    elif kind == "1 bit":
        label = label % 2
        Image.fromarray(label == 1).save(path)
    else:
        fakes.write_image(path, label.astype(np.uint16) if kind == "16 bits" else np.repeat(label[..., None], 3, axis=2))
    source = source if after_the_check else open_folder(tmp_path)
    np.testing.assert_array_equal(source.read(0)[1], label)
    assert after_the_check or source.totals.pixels.tolist() == np.bincount(label.ravel(), minlength=256).tolist()


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_missing_pixels_are_found_before_training(tmp_path, kind, palette):
    root = fakes.write_folder(tmp_path, {"train": 3})
    path = root / kind / "train/001.png"
    if palette:
        picture = Image.open(path).quantize(4)
        picture.save(path)
    whole = path.read_bytes()
    for damage in (fakes.cut_pixels, lambda path: path.write_bytes(whole[:-12])):  # the last chunk, IEND
        damage(path)
        with pytest.raises(UserError, match=rf"{kind}/train/001.png: cannot be read because it is damaged or cut short"):
            open_folder(root)
        dataset = recipe(root=str(root), on_error="skip")
        assert sources.open_source(dataset, "train").names == ["000", "002"]


def test_wrong_values_in_a_palette_label(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 1})
    fakes.write_palette(root / "labels/train/000.png", np.full((40, 48), 9, np.uint8))
    with pytest.raises(UserError, match=r"000.png: label value 9 at 1920 pixels"):
        open_folder(root)


def test_the_first_of_many_wrong_pairs_is_named(tmp_path):
    root = fakes.write_folder(tmp_path, {"train": 9})
    for index in (7, 2, 5):
        fakes.write_image(root / f"labels/train/{index:03d}.png", np.full((40, 48), 9, np.uint8))
    with pytest.raises(UserError, match=r"labels/train/002.png: .* \(and 2 more wrong pairs\)"):
        open_folder(root)


def test_a_large_folder_is_sampled_but_every_header_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "CHECK_ALL", 5)
    monkeypatch.setattr(screening, "CHECK_SOME", 2)  # of 6
    root = fakes.write_folder(tmp_path, {"train": 6})
    fakes.write_image(root / "labels/train/002.png", np.full((40, 48), 9, np.uint8))
    source = open_folder(root)
    with pytest.raises(UserError, match=r"labels/train/002.png: label value 9"):
        source.read(2)
    fakes.write_image(root / "labels/train/005.png", np.zeros((40, 47), np.uint8))
    with pytest.raises(UserError, match=r"005.png: is 47x40"):
        open_folder(root)


def test_a_large_folder_is_sampled_at_random(tmp_path, monkeypatch):
    """Evenly spaced samples could miss all wrong labels if they alternate with right ones, as in merged datasets."""
    monkeypatch.setattr(screening, "CHECK_ALL", 5)
    monkeypatch.setattr(screening, "CHECK_SOME", 4)
    for right in range(3):
        root = fakes.write_folder(tmp_path / str(right), {"train": 12})
        for index in range(12):
            if index % 3 != right:
                fakes.write_image(root / f"labels/train/{index:03d}.png", np.full((40, 48), 9, np.uint8))
        with pytest.raises(UserError, match="label value 9"):
            open_folder(root)


def test_missing_directories(tmp_path):
    with pytest.raises(UserError, match=r"dataset.root is empty: set --config.dataset.root"):
        sources.open_source(recipe(class_names=("a", "b")), "train")
    root = fakes.write_folder(tmp_path, {"train": 1})
    with pytest.raises(UserError, match=r"images/val: no such directory"):
        open_folder(root, "val")
    (root / "images/val").mkdir()
    with pytest.raises(UserError, match=r"images/val: contains no .bmp, .*, .webp files"):
        open_folder(root, "val")


# Scenes and TFDS


def test_scenes_source():
    source = sources.open_source(recipe(name="scenes"), "validation")
    assert len(source) == scenes.SPLITS["validation"]
    assert source.names[:2] == ["validation_00000", "validation_00001"]
    for index in (0, len(source) - 1):
        assert_loads(source, index, *scenes.scene("validation", index))


def test_scenes_with_too_few_classes():
    source = sources.Scenes(recipe(name="scenes"), "train", 2)
    with pytest.raises(UserError, match=r"train_00003: label value \d at \d+ pixels, expected 0..1"):
        source.read(3)


def test_scenes_unknown_split():
    with pytest.raises(UserError, match=r"no split 'val': expected one of train, validation"):
        sources.open_source(recipe(name="scenes"), "val")


class FakePairs(tfds.core.GeneratorBasedBuilder):
    """The fake pairs as a TFDS dataset, with a config for each name or type of the label feature."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=name) for name in ("label", "mask", "class"))

    def _info(self):
        kind = self.builder_config.name
        mask = tfds.features.Image(shape=(None, None, 1))
        other = {"label": tfds.features.ClassLabel(num_classes=4)} if kind == "class" else {kind: mask}
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), **other})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(5):
            image, label = fakes.pair("train", index)
            kind = self.builder_config.name
            yield index, {"image": image, **({"label": index % 4} if kind == "class" else {kind: label[..., None]})}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a data_dir with fake_pairs/label as array_record files."""
    root = tmp_path_factory.mktemp("tfds")
    tfds.builder("fake_pairs/label", data_dir=root, file_format="array_record").download_and_prepare()
    return str(root)


def tfds_recipe(root, name="fake_pairs/label"):
    return recipe(name="tfds", tfds_name=name, root=root, class_names=("a", "b", "c", "d"))


def test_tfds_source(prepared):
    source = sources.open_source(tfds_recipe(prepared), "train")
    assert source.names == [f"train_{index:05d}" for index in range(5)]
    for index in (4, 0, 2):
        assert_loads(source, index, *fakes.pair("train", index))
    for split, index, number in (("train[2:4]", 1, 3), ("train[60%:]+train[:1]", 2, 0), ("all", 4, 4), ("train[-1:]", 0, 4)):
        part = sources.open_source(tfds_recipe(prepared), split)
        assert part.names[index] == f"train_{number:05d}"
        assert_loads(part, index, *fakes.pair("train", number))
    validation = sources.open_source(tfds_recipe(prepared), "train[80%:]")
    for split, shared in (("train", 1), ("train[:1]+train[3:]", 1), ("train[:80%]", 0)):
        assert overlap.warn_shared([sources.open_source(tfds_recipe(prepared), split)], validation) == shared
    assert [Path(file).relative_to(prepared) for file in source.files(4)] == [Path("fake_pairs/label/1.0.0/dataset_info.json")]


def test_pspnet_scenes_are_prepared_and_equal_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setitem(scenes.SPLITS, "train", 12)
    monkeypatch.setitem(scenes.SPLITS, "validation", 3)
    for split in ("train", "validation"):
        through_tfds = sources.open_source(recipe(name="tfds", tfds_name="pspnet_scenes", root=str(tmp_path)), split)
        direct = sources.open_source(recipe(name="scenes"), split)
        assert through_tfds.names == direct.names
        for index in range(len(direct)):
            assert_loads(through_tfds, index, *direct.read(index))


def test_tfds_label_out_of_range_is_named(prepared):
    dataset = tfds_recipe(prepared)
    dataset.class_names = ("a", "b")
    source = sources.open_source(dataset, "train")
    with pytest.raises(UserError, match=r"train_00001: label value 2"):
        source.read(1)


def test_tfds_errors(prepared, tmp_path):
    def message(*arguments, split="train"):
        with pytest.raises(UserError) as error:
            sources.open_source(tfds_recipe(*arguments), split)
        return str(error.value)

    assert "TFDS knows no dataset of this name" in message(prepared, "no_such_set")
    assert "no split 'val'; expected one of train" in message(prepared, split="val")
    assert "not prepared; run `tfds build fake_pairs/mask --file_format=array_record --data_dir=" in message(
        prepared, "fake_pairs/mask"
    )
    tfds.builder("fake_pairs/label", data_dir=tmp_path).download_and_prepare()
    assert "is stored as tfrecord, which cannot be read in random order" in message(str(tmp_path))
    for kind, features in (("mask", "image, mask"), ("class", "image, label")):
        tfds.builder(f"fake_pairs/{kind}", data_dir=tmp_path, file_format="array_record").download_and_prepare()
        assert f"has features {features}; expected image uint8" in message(str(tmp_path), f"fake_pairs/{kind}")


def test_a_damaged_tfds_record_is_named(tmp_path):
    builder = tfds.builder("fake_pairs/label", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    (file,) = builder.data_path.glob("*.array_record-*")
    contents = bytearray(file.read_bytes())
    contents[20_000:20_500] = bytes(500)  # each record takes 7 kB
    file.write_bytes(contents)
    source = sources.open_source(tfds_recipe(str(tmp_path)), "train")
    source.read(1)
    with pytest.raises(UserError, match=r"train_00002: cannot be loaded \(Corrupted"):
        source.read(2)


# Orientation


def turned_folder(root, tag, label_turned, size=(40, 48)):
    """Writes a folder whose second image has orientation `tag`, and returns that image upright."""
    fakes.write_folder(root, {"train": 3}, size)
    image, label = fakes.pair("train", 1, size)
    exif = Image.Exif()
    exif[0x0112] = tag
    path = root / "images/train/001.png"
    Image.fromarray(image).save(path, exif=exif)
    upright = image_files.turn(image, tag)
    if label_turned:
        fakes.write_image(root / "labels/train/001.png", image_files.turn(label[..., None], tag)[..., 0])
    return upright


@pytest.mark.parametrize("tag", [3, 6])
def test_training_turns_an_image_as_prediction_does(tmp_path, tag, caplog):
    upright = turned_folder(tmp_path, tag, label_turned=True)
    label = image_files.turn(fakes.pair("train", 1)[1][..., None], tag)[..., 0]
    with caplog.at_level("WARNING", "pspnet_jax"):
        source = open_folder(tmp_path)
    assert "train: 1 images are turned upright" in caplog.text
    assert_loads(source, 1, upright, label)
    assert_loads(source, 2, *fakes.pair("train", 2))
    np.testing.assert_array_equal(image_files.read(tmp_path / "images/train/001.png"), upright)
    assert_loads(open_folder(tmp_path), 1, upright, label)  # with the cached orientation
    assert_loads(sources.open_source(recipe(root=str(tmp_path)), "train", check=False), 1, upright, label)


def test_a_label_that_was_not_turned_with_its_image(tmp_path):
    turned_folder(tmp_path, 6, label_turned=False)
    with pytest.raises(UserError, match=r"001.png: is 48x40, but its image .*001.png is 40x48 after .* orientation 6; turn"):
        open_folder(tmp_path)


def test_a_tfds_dataset_of_turned_images(tmp_path, monkeypatch):
    image, label = fakes.pair("train", 0)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    turned = image_files.turn(label[..., None], 8)
    monkeypatch.setattr(
        FakePairs, "_generate_examples", lambda _: iter([(0, {"image": tmp_path / "turned.png", "label": turned})])
    )
    tfds.builder("fake_pairs/label", data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert_loads(sources.open_source(tfds_recipe(str(tmp_path)), "train"), 0, image_files.turn(image, 8), turned[..., 0])
