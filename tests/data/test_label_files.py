"""Label maps, and labels in the formats people have."""

import cv2
import numpy as np
import pytest
import scipy.io
import tifffile
from PIL import Image

from pspnet_jax import datasets, runs
from pspnet_jax.config import base_config
from pspnet_jax.data import sources, survey
from pspnet_jax.errors import UserError
from tests import fakes
from tests.data.test_sources import recipe

CLASSES = np.array([[0, 1, 2, 255], [2, 2, 0, 1]], np.uint8).repeat(20, axis=0).repeat(12, axis=1)  # 40x48
COLORS = np.array([[255, 0, 0], [0, 0, 255], [7, 8, 9]], np.uint8)
BY_VALUE = "{0: 'a', 100: 'b', 250: 'c', 7: None}"
BY_VALUE_16 = "{0: 'a', 999: 'b', 65535: 'c', 7: None}"
BY_COLOR = "{(255, 0, 0): 'a', (0, 0, 255): 'b', (7, 8, 9): 'c', 7: None}"


def values(a, b, c, void, dtype=np.uint8):
    return np.select([CLASSES == 0, CLASSES == 1, CLASSES == 2], [a, b, c], void).astype(dtype)


def colored():
    return np.where((CLASSES == 255)[..., None], 7, COLORS[CLASSES % 255 % 3]).astype(np.uint8)


def palette():
    picture = Image.fromarray(values(3, 2, 1, 0), "P")
    picture.putpalette([7, 7, 7, *COLORS[2], *COLORS[1], *COLORS[0]])
    return picture


def one_bit():
    return Image.fromarray(CLASSES == 1)


WAYS = {  # {case: (a label file, how it is written, label_map)}
    "gray": ("0.png", lambda p: Image.fromarray(values(0, 100, 250, 7)).save(p), BY_VALUE),
    "R = G = B": ("0.png", lambda p: Image.fromarray(values(0, 100, 250, 7)).convert("RGB").save(p), BY_VALUE),
    "from 1": ("0.png", lambda p: Image.fromarray(values(1, 2, 3, 0)).save(p), "{0: None, 1: 'a', 2: 'b', 3: 'c'}"),
    "RGB": ("0.png", lambda p: Image.fromarray(colored()).save(p), BY_COLOR),
    "RGBA": ("0.png", lambda p: Image.fromarray(colored()).convert("RGBA").save(p), BY_COLOR),
    "RGB TIFF": ("0.tif", lambda p: Image.fromarray(colored()).save(p), BY_COLOR),
    "palette": ("0.png", lambda p: palette().save(p), "{3: 'a', 2: 'b', 1: 'c', 0: None}"),
    "colors of a palette": ("0.png", lambda p: palette().save(p), BY_COLOR),
    "GIF": ("0.gif", lambda p: palette().save(p), BY_COLOR),
    "16 bits": ("0.png", lambda p: Image.fromarray(values(0, 999, 65535, 7, np.uint16)).save(p), BY_VALUE_16),
    "RGB of 16 bits": ("0.png", lambda p: cv2.imwrite(str(p), colored()[..., ::-1].astype(np.uint16)), BY_COLOR),
    "PPM": ("0.ppm", lambda p: Image.fromarray(colored()).save(p), BY_COLOR),
    "16-bit TIFF": ("0.tiff", lambda p: Image.fromarray(values(0, 1, 2, 255, np.uint16)).save(p), ""),
    "TIFF of 64 bits": ("0.tif", lambda p: tifffile.imwrite(p, values(0, 1, 2, 255, np.int64)), ""),
    "TIFF of floats": ("0.tif", lambda p: tifffile.imwrite(p, values(0, 1, 2, 255, np.float64)), ""),
    "RGB TIFF of 16 bits": (
        "0.tif",
        lambda p: tifffile.imwrite(p, colored().astype(np.uint16), photometric="rgb"),
        BY_COLOR,
    ),
    "0 as white": ("0.tif", lambda p: tifffile.imwrite(p, values(0, 100, 250, 7), photometric="miniswhite"), BY_VALUE),
    "npy": ("0.npy", lambda p: np.save(p, values(0, 10**6, 2, -1, np.int64)), "{0: 'a', 1000000: 'b', 2: 'c', -1: None}"),
    "npy of colors": ("0.npy", lambda p: np.save(p, colored()), BY_COLOR),
    "struct in mat": (
        "0.mat",
        lambda p: scipy.io.savemat(p, {"groundTruth": {"Edges": np.eye(4), "Segmentation": values(0, 100, 250, 7)}}),
        BY_VALUE,
    ),
    "mat": ("0.mat", lambda p: scipy.io.savemat(p, {"label": values(0, 100, 250, 7, float)}), BY_VALUE),
}  # fmt: skip


def folder(root, file, write, **fields):
    """Writes an image with a label file, and returns the opened source."""
    fakes.write_image(root / "images/train/0.png", fakes.pair("train", 0)[0])
    (root / "labels/train").mkdir(parents=True)
    write(root / "labels/train" / file)
    return sources.open_source(recipe(root=str(root), **fields), "train")


@pytest.mark.parametrize("way", WAYS)
def test_a_label_map_gives_the_same_classes_in_every_format(tmp_path, way):
    file, write, label_map = WAYS[way]
    names = () if label_map else ("a", "b", "c")
    source = folder(tmp_path, file, write, label_map=label_map, class_names=names)
    np.testing.assert_array_equal(source.read(0)[1], CLASSES)
    assert source.totals.pixels[[0, 1, 2, 255]].tolist() == [480, 480, 720, 240]
    assert datasets.describe(recipe(label_map=label_map, class_names=names)).class_names == ("a", "b", "c")


def test_one_bit_and_the_order_of_class_names(tmp_path):
    source = folder(tmp_path, "0.png", lambda p: one_bit().save(p), label_map="{1: 'b', 0: 'a'}", class_names=("a", "b"))
    np.testing.assert_array_equal(source.read(0)[1], CLASSES == 1)
    source = folder(tmp_path / "white", "0.tif", lambda p: tifffile.imwrite(p, CLASSES == 1), class_names=("a", "b"))
    np.testing.assert_array_equal(source.read(0)[1], CLASSES == 1)
    assert datasets.describe(recipe(label_map="{1: 'b', 0: 'a'}")).class_names == ("b", "a")


def test_ignore_index(tmp_path):
    source = folder(
        tmp_path, "0.png", lambda p: Image.fromarray(values(0, 1, 2, 9)).save(p), ignore_index=9, class_names=tuple("abc")
    )
    np.testing.assert_array_equal(source.read(0)[1], CLASSES)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("name,r,g,b\na,255,0,0\nb,0,0,255\nc, 7, 8, 9\n", ("a", "b", "c", "void")),
        ("\ufeffr,g,b,name,ignored\n255,0,0,a,0\n0,0,255,b,0\n7,8,9,c,0\n", ("a", "b", "c")),
        ("255,0,0,a\n0,0,255,b\n7,8,9,c\n", ("a", "b", "c", "void")),
    ],
)
def test_a_csv_of_colors(tmp_path, text, names):
    void = "7,7,7,void" if "r,g,b,name" in text or text[0].isdigit() else "void,7,7,7"
    (tmp_path / "class_dict.csv").write_text(f"{text}{void}{',1' if 'ignored' in text else ''}\n", encoding="utf-8")
    source = folder(tmp_path, "0.png", lambda p: Image.fromarray(colored()).save(p), label_map="class_dict.csv")
    np.testing.assert_array_equal(source.read(0)[1], CLASSES if len(names) == 3 else np.where(CLASSES == 255, 3, CLASSES))
    info = datasets.describe(recipe(root=str(tmp_path), label_map="class_dict.csv"))
    assert (info.class_names, info.colors[2]) == (names, (7, 8, 9))


def test_a_run_saves_what_its_csv_says(tmp_path):
    """All parts of a mixture have this map, also if another CSV of the same name is in their directories."""
    config = base_config()
    (tmp_path / "map.csv").write_text("index,name,ignored\n0,a,0\n1,b,0\n255,void,1\n")
    config.dataset.update(name="folder", root=str(tmp_path), label_map="map.csv")
    assert runs.prepare(config).dataset.label_map == "{0: 'a', 1: 'b', 255: None}"
    assert config.dataset.class_names == ("a", "b")


def test_an_unknown_value_or_color_is_named_once_for_all_files(tmp_path):
    for index in range(3):
        fakes.write_image(tmp_path / f"images/train/{index}.png", fakes.pair("train", index)[0])
        fakes.write_image(tmp_path / f"labels/train/{index}.png", values(0, 100, 250, 7) if index else colored())
    for label_map, sentence in (
        (
            "{0: 'a', 100: 'b', 250: 'c'}",
            r"0.png: label color RGB \(255, 0, 0\) at 480 pixels is not in .*has 0, 100, 250; add",
        ),
        ("{0: 'a', 100: 'b', (7, 8, 9): 'c', (255, 0, 0): 'a', (0, 0, 255): 'b', 7: None}", "1.png: label value 250 at 720"),
    ):
        with pytest.raises(UserError, match=rf"{sentence}.* \(and [12] more wrong pairs\)"):
            sources.open_source(recipe(root=str(tmp_path), label_map=label_map), "train")


@pytest.mark.parametrize(
    ("label_map", "sentence"),
    [
        ("{0: 'a', 1}", r"label_map=\{0: 'a', 1\}: .*expected \{value"),
        ("{0, 1}", r"label_map=\{0, 1\}: is no dict; expected \{value"),
        ("{0: 'a', (1, 2): 'b'}", r"\(1, 2\): 'b' is no entry"),
        ("{0: 'a', 1: 2.5}", "1: 2.5 is no entry"),
        ("{0: 'a', 1: 'b', 1: 'a'}", "1 is there twice; keep one"),
        ("{0: __import__('os')}", "malformed node"),
        ("nowhere.csv", "nowhere.csv: no such file"),
        ("{0: 'a', 1: 'z'}", "1 is class 'z', which is none of a, b"),
        ("{0: 0, 1: 2}", "1 is class 2, which is none of a, b"),
    ],
)
def test_a_wrong_map_is_one_sentence(tmp_path, label_map, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        folder(tmp_path, "0.png", lambda p: Image.fromarray(CLASSES).save(p), label_map=label_map, class_names=("a", "b"))
    assert "\n" not in str(error.value)


def test_wrong_values_without_a_map(tmp_path):
    for number, (array, sentence) in enumerate(
        [
            (values(1, 2, 3, 255), 'label value 3 at 720 pixels, expected 0..2 .*either 0 is void .*label_map="{0: None, '),
            (values(0, 1, 999, 2, np.uint16), "label value 999 at 720 pixels is not in the classes, 0, 1, 2, 255; set dataset"),
        ]
    ):
        with pytest.raises(UserError, match=rf"0.tif: {sentence}"):
            folder(tmp_path / str(number), "0.tif", lambda p, a=array: Image.fromarray(a).save(p), class_names=("a", "b", "c"))


def test_arrays_that_are_no_labels(tmp_path):
    with pytest.raises(UserError, match=r"0.tif: has value 0.5; expected whole numbers"):
        folder(tmp_path, "0.tif", lambda p: tifffile.imwrite(p, np.full((40, 48), 0.5, np.float32)), class_names=("a", "b"))
    for number, (array, sentence) in enumerate(
        [
            (np.full((40, 48), 0.5), "0.npy: has value 0.5; expected whole numbers"),
            (np.zeros((40, 48, 3)), r"is float64\[40, 48, 3\]; expected"),
            (np.zeros((40, 48, 2), np.uint8), r"is uint8\[40, 48, 2\]; expected"),
            (np.array([{}]), "cannot be read because it is damaged .*allow_pickle=False"),
        ]
    ):
        with pytest.raises(UserError, match=sentence):
            folder(tmp_path / str(number), "0.npy", lambda p, array=array: np.save(p, array), class_names=("a", "b"))


# A shift by one


def test_names_one_fewer_than_values_are_asked_about(tmp_path):
    with pytest.raises(
        UserError, match=r'0 is void .*"\{0: None, 1: 0, 2: 1, 3: 2\}".* missing, .*"\{0: 0, 1: 1, 2: 2, 3: 3\}"'
    ):
        folder(tmp_path, "0.png", lambda p: Image.fromarray(values(1, 2, 3, 0)).save(p), class_names=("a", "b", "c"))


def test_a_boundary_of_value_0_is_asked_about(tmp_path):
    """Areas of values 1 and 2, 24 pixels wide, with lines of 0 between them, as in ISPRS Potsdam."""
    label = np.repeat([0, 1, 0, 2, 0, 1], [2, 22, 2, 22, 2, 22]).astype(np.uint8)[None].repeat(60, axis=0)
    fields = {"root": str(tmp_path), "class_names": ("road", "roof", "tree"), "split_fraction": 0.0}
    fakes.write_image(tmp_path / "images/train/0.png", np.zeros((60, 72, 3), np.uint8))
    fakes.write_image(tmp_path / "labels/train/0.png", label)
    question = (
        r'only in thin lines.* class 0 is \'road\'; .*"\{0: None, 1: 0, 2: 1, 3: 2\}"; otherwise, .*"\{0: 0, 1: 1, 2: 2\}"'
    )
    with pytest.raises(UserError, match=question):
        sources.open_source(recipe(**fields), "train")
    assert "thin lines" in survey.survey(recipe(**fields), "train", 3).problems[0]
    void = sources.open_source(recipe(**fields, label_map="{0: None, 1: 0, 2: 1, 3: 2}"), "train")
    np.testing.assert_array_equal(void.read(0)[1], label - np.uint8(1))
    assert (sources.open_source(recipe(**fields, label_map="{0: 0, 1: 1, 2: 2}"), "train").read(0)[1] == label).all()
    assert (
        sources.open_source(recipe(**fields | {"class_names": ("boundary", "roof", "tree")}), "train").totals.pixels[0] == 360
    )
    label[:20, 2:24] = 0  # an area
    fakes.write_image(tmp_path / "labels/train/0.png", label)
    assert (sources.open_source(recipe(**fields), "train").read(0)[1] == label).all()


def test_results_of_another_map_are_not_used(tmp_path):
    """The findings of the file check, the counts of classes and cached examples depend on the map."""
    write = lambda p: Image.fromarray(values(0, 100, 250, 7)).save(p)  # noqa: E731
    first = folder(tmp_path, "0.png", write, label_map=BY_VALUE)
    other = recipe(root=str(tmp_path), label_map="{0: 'a', 100: 'c', 250: 'b', 7: None}", class_names=("a", "b", "c"))
    second = sources.open_source(other, "train")
    assert second.totals.pixels[:3].tolist() == first.totals.pixels[[0, 2, 1]].tolist() == [480, 720, 480]
    assert survey.class_counts(first, recipe(), first.read).tolist() == [[480, 480, 720]]
    assert survey.class_counts(second, recipe(), second.read).tolist() == [[480, 720, 480]]
    assert first.fingerprint != second.fingerprint


def test_a_map_does_not_excuse_the_classes_of_a_benchmark(tmp_path):
    """In dataset.mixture, a benchmark's labels are not read with the map, so its classes have to be those of the map."""
    dataset = recipe(root=str(tmp_path), name="potsdam", label_map=BY_VALUE, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match=r"class 0 of dataset.name='potsdam' .* is 'impervious_surface', but 'a' in"):
        sources.open_source(dataset, "train")
