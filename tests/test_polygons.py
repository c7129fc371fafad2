"""Polygons of COCO and labelme, in whole datasets."""

import json

import numpy as np
import pytest

from pspnet_jax import datasets, polygons
from pspnet_jax.data import sources
from pspnet_jax.errors import UserError
from tests import fakes
from tests.data.test_sources import recipe

WALL, WINDOW = [2, 1, 8, 1, 8, 6, 2, 6], [4, 2, 6, 2, 6, 4, 4, 4]  # x, y of the corners
EXPECTED = np.zeros((10, 12), np.uint8)  # outlines belong to the polygon
EXPECTED[1:7, 2:9] = 1
EXPECTED[2:5, 4:7] = 2


def write_coco(root, segmentation=(WINDOW,), **changes):
    """The window comes first in the file; category 0 is a super-category with the name of a real one."""
    fakes.write_image(root / "train/a.jpg", np.zeros((10, 12, 3), np.uint8))
    names = {7: "window", 0: "wall", 3: "wall", 9: "never"}
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 12, "height": 10}],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [
            {"image_id": 5, "category_id": 7, "area": 9, "segmentation": segmentation},
            {"image_id": 5, "category_id": 3, "area": 42, "segmentation": [WALL]},
        ],
    }
    (root / "train/_annotations.coco.json").write_text(json.dumps(content | changes))
    return recipe(root=str(root), images="{split}/{name}.*", labels="{split}/_annotations.coco.json")


def test_coco(tmp_path):
    dataset = write_coco(tmp_path / "x")
    (tmp_path / "x/train").rename(tmp_path / "valid")
    content = json.loads((tmp_path / "valid/_annotations.coco.json").read_text())
    dataset = write_coco(tmp_path, annotations=content["annotations"][:1])  # the wall, with the lower id, is only in valid
    assert datasets.describe(dataset).class_names == ("background", "wall", "window")
    dataset = write_coco(tmp_path)
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED)
    for label_map, expected in (
        ("{'window': 'hole', 'wall': 'rest', 'background': 'rest'}", EXPECTED != 2),
        ("{'window': 'window', 'wall': 'wall'}", np.array([255, 1, 0])[EXPECTED]),
    ):
        dataset.label_map = label_map
        np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], expected)
    dataset.label_map = "{'wall': 'wall', 'background': 'rest'}"
    with pytest.raises(
        UserError, match=r"coco.json: has polygons of 'window', which is not in .* has 'wall', 'background'; add"
    ):
        sources.open_source(dataset, "train")


@pytest.mark.parametrize("segmentation", [[], None])
def test_boxes_without_polygons_are_left_out_with_a_warning(tmp_path, caplog, segmentation):
    dataset = write_coco(tmp_path, segmentation)
    assert datasets.describe(dataset).class_names == ("background", "wall")
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED != 0)
    assert caplog.text.count("coco.json: 1 annotations of 2 are left out because they have no polygon") == 1


def test_annotations_of_images_that_are_not_listed_are_left_out_with_a_warning(tmp_path, caplog):
    write_coco(tmp_path)
    content = json.loads((tmp_path / "train/_annotations.coco.json").read_text())
    dataset = write_coco(tmp_path, annotations=[*content["annotations"], content["annotations"][0] | {"image_id": 77}])
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED)
    assert caplog.text.count("1 annotations are left out because their images are not listed") == 1


@pytest.mark.parametrize("text", [False, True])
def test_a_run_length_encoded_mask(tmp_path, text):
    """Columns 4 to 6, rows 2 to 4: 42 pixels before, then runs of 3 and gaps of 7. "gP" codes 6 + 32, see COCO's maskApi.c."""
    counts = [42, 3, 7, 3, 7, 3, 55]
    dataset = write_coco(tmp_path, {"size": [10, 12], "counts": encode(counts) if text else counts})
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED)


def encode(counts):
    """Encodes counts as rleToString of COCO's maskApi.c does."""
    text = ""
    for index, count in enumerate(counts):
        x, more = count - (counts[index - 2] if index > 2 else 0), True
        while more:
            bits, x = x & 31, x >> 5
            more = x != -1 if bits & 16 else x != 0
            text += chr(bits + 32 * more + 48)
    return text


def test_a_published_mask():
    """The example of a string in the tests of pycocotools' documentation: runs 0..., decoded by hand."""
    assert polygons._decode_counts("01") == [0, 1]
    assert polygons._decode_counts("Z1320") == [42, 3, 2, 3]  # Z = 42 = 32 + 10 and 1 = 32; the fourth is 0 + 3


def test_coco_and_files_that_do_not_agree(tmp_path):
    dataset = write_coco(tmp_path)
    fakes.write_image(tmp_path / "train/b.jpg", np.zeros((10, 12, 3), np.uint8))
    with pytest.raises(UserError, match=r"coco.json: has no entry for .*train/b.jpg; add it, or remove the image"):
        sources.open_source(dataset, "train")
    (tmp_path / "train/b.jpg").rename(tmp_path / "train/c.txt")
    image = {"id": 6, "file_name": "gone.jpg", "width": 12, "height": 10}
    content = json.loads((tmp_path / "train/_annotations.coco.json").read_text())
    write_coco(tmp_path, images=[*content["images"], image])
    with pytest.raises(UserError, match=r"train/gone.jpg: no such file; it belongs to .*coco.json"):
        sources.open_source(dataset, "train")
    for text in ("[", '{"images": 3}'):
        (tmp_path / "train/_annotations.coco.json").write_text(text)
        with pytest.raises(UserError, match=r"coco.json: cannot be read as a labelme or COCO file"):
            sources.open_source(recipe(**dataset.to_dict() | {"class_names": ("a", "b")}), "train")


def test_coco_with_folders_in_the_names_of_files(tmp_path):
    """Backslashes separate folders, too; the folders count only if they tell images apart."""
    dataset = write_coco(tmp_path, images=[{"id": 5, "file_name": "elsewhere\\a.jpg", "width": 12, "height": 10}])
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED)
    images = [{"id": 5 + i, "file_name": f"cam{i}/a.jpg", "width": 12, "height": 10} for i in range(2)]
    dataset = write_coco(tmp_path, images=images)
    (tmp_path / "train/a.jpg").unlink()
    for camera in ("cam0", "cam1"):
        fakes.write_image(tmp_path / "train" / camera / "a.jpg", np.zeros((10, 12, 3), np.uint8))
    source = sources.open_source(dataset, "train")
    assert source.names == ["cam0/a", "cam1/a"]
    np.testing.assert_array_equal(source.read(0)[1], EXPECTED)
    assert not source.read(1)[1].any()
    dataset = write_coco(tmp_path / "above", images=[images[1], {**images[0], "file_name": "a.jpg"}])
    fakes.write_image(tmp_path / "above/train/cam1/a.jpg", np.zeros((10, 12, 3), np.uint8))
    source = sources.open_source(dataset, "train")
    assert source.names == ["a", "cam1/a"]
    np.testing.assert_array_equal(source.read(0)[1], EXPECTED)
    assert not source.read(1)[1].any()
    dataset = write_coco(tmp_path / "same", images=[images[0], {**images[1], "file_name": "cam0/a.jpg"}])
    with pytest.raises(UserError, match="two images have the same file name"):
        sources.open_source(dataset, "train")


def test_a_circle_of_labelme(tmp_path):
    """It is given by its center and a point on it."""
    shape = {"label": "hole", "points": [[10, 8], [10, 13]], "shape_type": "circle"}
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [shape], "imageWidth": 20, "imageHeight": 20}))
    painted = polygons.read(str(tmp_path / "a.json"), "").paint({"background": 0, "hole": 1}.__getitem__)
    rows, columns = np.mgrid[:20, :20]
    distances = np.hypot(rows - 8, columns - 10)
    assert painted[distances < 4.5].all()
    assert not painted[distances > 6].any()


def test_labelme(tmp_path):
    """Shapes are painted in the order of the file, as labelme does."""
    corners = {"polygon": np.reshape(WALL, (4, 2)).tolist(), "rectangle": [[4, 2], [6, 4]]}
    shapes = [{"label": n, "points": corners[k], "shape_type": k} for n, k in (("wall", "polygon"), ("window", "rectangle"))]
    fakes.write_image(tmp_path / "images/train/a.png", np.zeros((10, 12, 3), np.uint8))
    (tmp_path / "labels/train").mkdir(parents=True)
    file = tmp_path / "labels/train/a.json"
    file.write_text(json.dumps({"shapes": shapes, "imageWidth": 12, "imageHeight": 10}))
    dataset = recipe(root=str(tmp_path), labels="labels/{split}/{name}.json", class_names=("background", "wall", "window"))
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED)
    dataset.class_names = ("wall", "window")
    np.testing.assert_array_equal(sources.open_source(dataset, "train").read(0)[1], EXPECTED - np.uint8(1))
    file.write_text(json.dumps({"shapes": [shapes[0] | {"shape_type": "line"}], "imageWidth": 12, "imageHeight": 10}))
    with pytest.raises(UserError, match=r"a.json: cannot be read as .* 'wall' is a line of 4 points, not a polygon"):
        sources.open_source(dataset, "train")
