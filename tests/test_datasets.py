import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax import datasets
from pspnet_jax.config import base_config


def recipe(**fields):
    dataset = base_config().dataset
    dataset.update(fields)
    return dataset


def test_voc_palette_follows_the_bit_rule():
    colors = datasets.voc_palette(256)
    assert colors[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colors[8] == (64, 0, 0)
    assert colors[15] == (192, 128, 128)  # 15 = 0b001111: R 11, G 1, B 1
    assert colors[20] == (0, 64, 128)
    assert colors[255] == (224, 224, 192)  # the border's cream in VOC's own label files
    assert len(set(colors)) == 256


@pytest.mark.parametrize(
    ("name", "count", "index", "class_name", "color"),
    [
        ("cityscapes", 19, 13, "car", (0, 0, 142)),
        ("cityscapes", 19, 18, "bicycle", (119, 11, 32)),
        ("voc2012", 21, 0, "background", (0, 0, 0)),
        ("voc2012", 21, 20, "tvmonitor", (0, 64, 128)),
        ("ade20k", 150, 0, "wall", (120, 120, 120)),
        ("ade20k", 150, 44, "chest of drawers", (6, 51, 255)),
        ("ade20k", 150, 149, "flag", (92, 0, 255)),
        ("camvid", 11, 6, "sign symbol", (192, 128, 128)),
        ("scenes", 11, 10, "bird", (180, 0, 200)),
        ("pascal_context", 59, 0, "aeroplane", (180, 120, 120)),
        ("pascal_context", 59, 58, "wood", (31, 0, 255)),
        ("coco_stuff", 171, 80, "banner", (0, 192, 0)),
        ("coco_stuff", 171, 170, "wood", (64, 64, 0)),
        ("loveda", 7, 6, "agricultural", (255, 195, 128)),
        ("potsdam", 6, 4, "car", (255, 255, 0)),
    ],
)
def test_tables(name, count, index, class_name, color):
    info = datasets.table(name)
    assert (info.num_classes, len(set(info.class_names))) == (count, count)
    assert (info.class_names[index], info.colors[index]) == (class_name, color)


def test_coco_stuffs_raw_values_are_the_ids_less_1():
    """The ids 1 to 90 of things and 92 to 182 of stuff, of which eleven are not used: 91 more after 80 things."""
    table = datasets.classes_of_raw_values("coco_stuff")
    assert [int(table[value]) for value in (0, 10, 12, 89, 91, 181, 255)] == [0, 10, 11, 79, 80, 170, 255]
    assert (table[[11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]] == datasets.WRONG).all()


def test_unknown_table_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'coco'.*ade20k, camvid, cityscapes"):
        datasets.table("coco")


def test_scenes_are_the_same_through_tfds():
    through_tfds = datasets.describe(recipe(name="tfds", tfds_name="pspnet_scenes"))
    direct = datasets.describe(recipe(name="scenes"))
    assert (through_tfds.class_names, through_tfds.colors) == (direct.class_names, direct.colors)


def test_classes_file(tmp_path):
    lines = "\ufeffsky 128 128 128\ntraffic light  250 170\t30\r\n\nlane 2\n  road 2 1 2 3\n"
    (tmp_path / "classes.txt").write_text(lines, encoding="utf-8")
    info = datasets.describe(recipe(root=str(tmp_path)))
    assert info.class_names == ("sky", "traffic light", "lane 2", "road 2")
    assert info.colors == ((128, 128, 128), (250, 170, 30), (0, 128, 0), (1, 2, 3))  # label 2 has VOC's color


def test_the_recipe_overrides_the_file_and_the_table(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert datasets.describe(recipe(root=str(tmp_path), class_names=("x", "y"))).class_names == ("x", "y")
    assert datasets.describe(recipe(name="cityscapes", class_names=("x", "y"))).num_classes == 2
    assert datasets.describe(recipe(class_names=("x", "y"))).colors == ((0, 0, 0), (128, 0, 0))
    colors = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert datasets.describe(recipe(root=str(tmp_path), colors=colors)).colors == colors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"class_names is empty and there is no dataset.root: .*classes.txt"),
        ({"root": "/nowhere"}, r"dataset.root=/nowhere: no such directory"),
        ({"root": "/"}, r"class_names is empty and there is no /classes.txt: "),
        ({"class_names": ("a", "b", "A ")}, r"classes 0 and 2 of dataset 'folder' are both 'A '; give"),
        ({"name": "tfds", "tfds_name": "mnist"}, r"class_names is empty: the recipe must name the classes of .*'mnist'"),
        ({"class_names": ("only",)}, r"has 1 classes: expected 2 to 255"),
        ({"class_names": tuple(f"c{i}" for i in range(256))}, r"has 256 classes: expected 2 to 255"),
        ({"class_names": ("a", "b"), "colors": ((0, 0, 0),)}, r"1 colors for 2 classes"),
        ({"class_names": ("a", "b"), "colors": ((0, 0, 0), (0, 256, 0))}, r"\(0, 256, 0\) of class 'b'.* 0 to 255"),
        ({"class_names": ("a", "b"), "colors": ((0, 0, 0), (0, 0))}, r"\(0, 0\) of class 'b'"),
    ],
)
def test_wrong_classes_are_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        datasets.describe(recipe(**fields))


def test_color_out_of_range_in_a_classes_file(tmp_path):
    (tmp_path / "classes.txt").write_text("a 1 2 3\nb 1 2 300\n")
    with pytest.raises(ValueError, match=r"classes.txt, line 2: 1, 2, 300 .* each from 0 to 255"):
        datasets.describe(recipe(root=str(tmp_path)))


def test_label_problem_names_the_value_and_the_likely_cause():
    def problem(*values):
        return datasets.label_problem(np.bincount(values, minlength=256), num_classes=4)

    assert problem(0, 3, 255) is None
    assert "label value 4 at 2 pixels, expected 0..3 for 4 classes, or 255 to ignore" in problem(1, 4, 4)
    assert "count from 1" in problem(1, 4)
    assert "label value 7 at 1 pixels" in problem(1, 7, 33)
    assert "raw ids" in problem(7, 33)


def test_datasets_does_not_import_tensorflow():
    code = "import sys, pspnet_jax.datasets; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("scale", [1, 255])
def test_values_between_class_indices_are_attributed_to_interpolation(scale):
    """A JPEG has such values at the edges of a mask."""
    rows, columns = np.mgrid[:100, :120]
    mask = ((rows - 50) ** 2 + (columns - 50) ** 2 < 900).astype(np.uint8) * scale
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG")
    with Image.open(file) as image:
        message = datasets.label_problem(image.histogram(), 2)
    assert "interpolated values from saving as JPEG or from resizing" in message
    assert "from saving as JPEG" not in datasets.label_problem(
        np.bincount(mask.ravel() // scale + 1, minlength=256).tolist(), 2
    )
