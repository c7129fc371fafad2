"""--mode check --input: a folder becomes a recipe, which reads its labels as they are meant."""

import json
import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from pspnet_jax import config as configs
from pspnet_jax import datasets, large_files, main
from pspnet_jax.data import label_values, sources
from pspnet_jax.errors import UserError

HALF = np.repeat([[0], [1]], 8, axis=0).repeat(16, axis=1).astype(np.uint8)  # the upper half 0, the lower half 1


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def check(folder, recipe):
    return main.main(["--mode", "check", "--input", str(folder), "--output", str(recipe)])


def labels_by(recipe):
    """Returns the class names of a recipe, and the labels of both splits as it reads them."""
    config = configs.load_recipe(str(recipe))
    splits = [config.dataset.train_split, config.eval.split]
    opened = [sources.open_source(config.dataset, split, channels=config.model.channels) for split in splits]
    return config, [source.read(i)[1] for source in opened for i in range(len(source))]


def test_gray_values_with_a_void_border(tmp_path):
    values = np.where(HALF == 1, 7, 3).astype(np.uint8)
    values[0] = 255
    for i in range(6):
        write(tmp_path / f"data/pics/{i}.jpg", photo(i))
        write(tmp_path / f"data/gt/{i}_gt.png", values)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.images, config.dataset.labels) == ("pics/{name}.jpg", "gt/{name}_gt.png")
    assert len(labels) == 6
    expected = HALF.copy()
    expected[0] = 255  # ignored
    assert all((label == expected).all() for label in labels)
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.width > 400
    assert check(tmp_path / "data", tmp_path / "made.py") == 0  # nothing has changed
    (tmp_path / "made.py").write_text("mine")
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert (tmp_path / "made.py").read_text() == "mine"


def test_colors_are_named_by_a_list(tmp_path):
    colors = np.array([(128, 0, 0), (0, 0, 0)], np.uint8)
    for split in ("train", "val"):
        write(tmp_path / f"data/{split}/a.png", photo(0))
        write(tmp_path / f"data/{split}_labels/a_L.png", colors[HALF])
    (tmp_path / "data/class_dict.csv").write_text("name,r,g,b\nroad,128,0,0\nsky,0,0,0\n")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert config.dataset.label_map == "{(0, 0, 0): 'sky', (128, 0, 0): 'road'}"
    assert all((label == 1 - HALF).all() for label in labels)


def test_binary_labels_saved_as_jpeg_are_thresholded(tmp_path):
    for i in range(6):
        write(tmp_path / f"data/images/{i}.jpg", photo(i))
        noise = np.random.default_rng(i).integers(0, 9, HALF.shape).astype(np.uint8)
        write(tmp_path / f"data/masks/{i}.jpg", np.where(HALF, 255 - noise, noise).astype(np.uint8))
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert all((label == HALF).all() for label in labels_by(tmp_path / "made.py")[1])


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        ([], "it holds no files"),
        (["images/1.png", "masks/001.png"], "images/1.png and masks/001.png differ in the zeros before a number"),
        (["a/1.png", "b/1.png"], "has .* values or colors, as a photo has"),
    ],
)
def test_without_pairs_there_is_no_recipe(tmp_path, capsys, paths, sentence):
    (tmp_path / "data").mkdir()
    for i, path in enumerate(paths):
        write(tmp_path / "data" / path, photo(i))
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/data: no pairs of images and labels found")
    assert re.search(sentence, error)
    assert not (tmp_path / "made.py").exists()


def test_ambiguous_values_are_kept_with_a_remark():
    def read(shares, texts=()):
        found = label_values.entries(label_values.Values(shares, 9, 9), dict(texts))
        return [(entry.key, entry.name, "GUESS" in entry.remark) for entry in found]

    assert read({0: 0.5, 255: 0.5}) == [(0, "class_0", False), (255, "class_255", False)]
    assert read({0: 0.5, 1: 0.2, 2: 0.3}) == [(0, "class_0", True), (1, "class_1", False), (2, "class_2", False)]
    assert read({0: 0.5, 1: 0.2, 255: 0.3}) == [(0, "class_0", False), (1, "class_1", False), (255, None, True)]
    assert read({0: 0.5, 128: 0.2, 255: 0.3})[2] == (255, "class_255", False)  # a trimap, not indices and void
    assert read({(0, 0, 0): 0.5, (9, 9, 9): 0.2, (224, 224, 192): 0.3})[2][1:] == (None, True)  # borders in VOC's colors
    assert read({0: 1.0}) == [(0, "class_0", False), (1, "class_1", False)]
    listed = {"classes.txt": "building\ntree\n"}
    assert read({1: 0.5, 2: 0.5}, listed.items()) == [(1, "building", False), (2, "tree", False)]  # counted from 1
    assert read({0: 0.6, 1: 0.4}, [("names.json", '["road", "car", "bus"]')])[2] == (2, "bus", False)  # in no sampled label
    colors = {"class_dict.csv": "name,r,g,b\nfield,0,0,0\nroad,255,255,255\n"}
    assert read({0: 0.5, 255: 0.5}, colors.items()) == [(0, "field", False), (255, "road", False)]
    assert read({0: 0.5, 1: 0.5}, colors.items()) == [(0, "field", False), (1, "road", False)]  # not the colors
    assert read({1: 0.5, 3: 0.5}, listed.items()) == [(1, "class_1", False), (3, "class_3", False)]  # the list does not fit


def test_names_tell_where_they_are_from():
    def read(shares, file, text):
        return [(entry.name, entry.remark) for entry in label_values.entries(label_values.Values(shares, 9, 9), {file: text})]

    found = read({0: 0.75, 1: 0.25}, "labels.txt", "__ignore__\n_background_\nperson\n")  # as labelme has it
    assert [name for name, _ in found] == ["_background_", "person"]
    assert found[1][1] == "25.00% of the pixels; named by labels.txt"
    assert [name for name, _ in read({0: 0.75, 1: 0.25}, "train_labels.txt", "masks/0.png\nmasks/1.png\n")] == [
        "class_0",
        "class_1",
    ]
    assert read({0: 0.5, 1: 0.3, 2: 0.2}, "labels.txt", "__ignore__\na\nb\n_void_")[2][0] is None
    same = read({"Car": 0.5, "background": 0.3, "car": 0.2}, "", "")
    assert [name for name, _ in same] == ["Car", "background", "Car"]
    assert same[2][1].endswith("GUESS: the same class as 'Car'")


def test_values_at_edges_are_a_guess():
    smooth = {0: 0.9, 16: 0.001, 64: 0.02, 143: 0.001, 255: 0.078}
    entries = label_values.entries(label_values.Values(smooth, 9, 9), {})
    assert [entry.key for entry in entries if "only at edges" in entry.remark] == [16, 64, 143]
    classes = {0: 0.01, 1: 0.08, 2: 0.39, 4: 0.002, 5: 0.01, 7: 0.01, 8: 0.02, 255: 0.4}
    assert not any("edges" in entry.remark for entry in label_values.entries(label_values.Values(classes, 9, 9), {}))


def test_numbers_of_objects_are_named_as_a_guess():
    def read(counts):
        shares = {value: 0.1 for found in counts for value in found}
        values = label_values.Values(shares, 3, 3, numbered=label_values._are_numbers(counts))
        return ["numbers its objects" in entry.remark for entry in label_values.entries(values, {})]

    assert any(read([dict.fromkeys(range(n), 9) for n in (3, 6, 12)]))
    assert not any(read([{0: 9, 2: 9, 11: 9}, {0: 9, 5: 9}, {1: 9}]))  # classes


def write_pairs(root, masks="masks/{}.png", images="images/{}.png", count=6, label=HALF):
    for i in range(count):
        write(root / images.format(i), photo(i))
        write(root / masks.format(i), label)


def test_files_of_a_stereo_camera_have_their_own_labels(tmp_path):
    """The folders' names tell nothing, and left and right could be images and labels."""
    for i in range(4):
        for side in ("left", "right"):
            write(tmp_path / f"data/x/{i:03}_{side}.jpg", photo(i))
            write(tmp_path / f"data/y/{i:03}_{side}.png", HALF)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    dataset = labels_by(tmp_path / "made.py")[0].dataset
    assert (dataset.images, dataset.labels) == ("x/{name}.jpg", "y/{name}.png")


def test_images_with_several_extensions(tmp_path):
    for i in range(6):
        write(tmp_path / f"data/images/{'val' if i > 3 else 'train'}/{i}.{'jpg' if i % 2 else 'png'}", photo(i))
        write(tmp_path / f"data/masks/{'val' if i > 3 else 'train'}/{i}.png", HALF)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    dataset = labels_by(tmp_path / "made.py")[0].dataset
    assert (dataset.images, dataset.labels) == ("images/{split}/{name}.*", "masks/{split}/{name}.png")


def test_a_list_that_is_not_used_is_named(tmp_path):
    write_pairs(tmp_path / "data")
    (tmp_path / "data/train.txt").write_text("0\n1\n2\n3\n")
    (tmp_path / "data/val.txt").write_text("4\n5\n77\n")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    text = (tmp_path / "made.py").read_text()
    assert re.search(r"GUESS: a fifth .*; not used: train.txt, val.txt", text)
    (tmp_path / "data/val.txt").write_text("4\n5\n")
    assert check(tmp_path / "data", tmp_path / "lists.py") == 0
    assert configs.load_recipe(str(tmp_path / "lists.py")).dataset.split_file == "{split}.txt"


def test_a_table_with_a_column_of_other_labels(tmp_path):
    write_pairs(tmp_path / "data")
    rows = [f"{i}.png,benign,{'val' if i > 3 else 'train'}\n" for i in range(6)]
    (tmp_path / "data/meta.csv").write_text("image,label,split\n" + "".join(rows))
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert len(labels_by(tmp_path / "made.py")[1]) == 6


def test_parts_of_a_label_and_other_pictures_beside_it(tmp_path):
    write_pairs(tmp_path / "data")
    write(tmp_path / "data/masks/3_1.png", HALF)
    write(tmp_path / "data/masks/legend.png", HALF)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    text = (tmp_path / "made.py").read_text()
    assert re.search(r"GUESS: 1 file\(s\), such as .*masks/3_1.png, are no parts of labels", text)
    assert "labels of other formats" not in text


def test_pages_of_a_label_are_refused(tmp_path, capsys):
    write_pairs(tmp_path / "data")
    for i in range(6):
        (tmp_path / f"data/masks/{i}.png").unlink()
        tifffile.imwrite(tmp_path / f"data/masks/{i}.tif", np.stack([HALF, 1 - HALF]), photometric="minisblack")
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert re.search(r"masks/0.tif: has 2 pages; save one label of class indices", capsys.readouterr().err)


def test_one_image_that_is_not_finite_is_left_out(tmp_path):
    write_pairs(tmp_path / "data", count=20)
    for i in range(20):
        (tmp_path / f"data/images/{i}.png").unlink()
        pixels = photo(i).astype(np.float32)
        pixels[0, 0, 0] = np.nan if i == 2 else 0
        tifffile.imwrite(tmp_path / f"data/images/{i}.tif", pixels, photometric="rgb")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert re.search(r"leaves out 1 image\(s\): .*2.tif: .*not finite", (tmp_path / "made.py").read_text())
    assert len(labels_by(tmp_path / "made.py")[1]) == 19


def coco(root, names, file="annotations.json"):
    """Writes a COCO file of images of 16x16, whose upper half is a cat."""
    half = [0, 0, 16, 0, 16, 7, 0, 7]
    content = {
        "categories": [{"id": 1, "name": "cat"}],
        "images": [{"id": i, "file_name": name, "width": 16, "height": 16} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "segmentation": [[*half]]} for i in range(len(names))],
    }
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))
    return content


def test_coco_files_of_images_in_one_folder(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        write(tmp_path / "data/images" / name, photo(i))
    for split, part in (("train", names[:4]), ("val", names[4:])):
        coco(tmp_path / "data", part, f"annotations/instances_{split}.json")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.labels, config.eval.split) == ("annotations/instances_{split}.json", "val")
    assert [label.sum() for label in labels] == [128] * 6


def test_images_of_a_coco_file_that_have_equal_names_elsewhere(tmp_path):
    for i in range(4):
        write(tmp_path / f"data/visualized/{i}.png", photo(i + 9))
        write(tmp_path / f"data/photos/{i}.png", photo(i))
    coco(tmp_path / "data", [f"{i}.png" for i in range(4)])
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, _ = labels_by(tmp_path / "made.py")
    assert config.dataset.images == "photos/{name}.*"
    assert "GUESS: 'visualized/{name}.*' would fit, too" in (tmp_path / "made.py").read_text()
    config.dataset.images = "{name}.png"
    with pytest.raises(UserError, match=r"annotations.json: .*png may be .*visualized/..png or .*photos/..png; put the folder"):
        sources.open_source(config.dataset, "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c["annotations"][1].update(category_id=7),
            "has annotations of category 7, which is not among its categories",
        ),
        (lambda c: c["images"][0].pop("width"), r"it has no 'width'"),
        (lambda c: c["annotations"][2]["segmentation"][0].pop(), "has a polygon with a y missing, in annotation 2"),
    ],
)
def test_the_reason_why_a_coco_file_cannot_be_read(tmp_path, capsys, change, reason):
    for i in range(4):
        write(tmp_path / f"data/images/{i}.png", photo(i))
    change(content := coco(tmp_path / "data", [f"{i}.png" for i in range(4)]))
    (tmp_path / "data/annotations.json").write_text(json.dumps(content))
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert re.search(rf"annotations.json: .*{reason}", capsys.readouterr().err)


def test_masks_are_not_taken_for_images(tmp_path, capsys):
    for part in ("hair", "nose"):
        write_pairs(tmp_path / "parts", f"masks/000{{}}_{part}.png")
    assert check(tmp_path / "parts", tmp_path / "made.py") == 1
    assert re.search(r"masks/0000_.*png: has only a few colors, as masks have, unlike .*images/0.png", capsys.readouterr().err)


def test_copies_in_another_format_are_not_for_validation(tmp_path):
    for kind in ("TIF", "PNG"):
        write_pairs(tmp_path / "data" / kind, f"Truth/{{}}.{kind.lower()}", f"Original/{{}}.{kind.lower()}")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.images, len(labels)) == ("TIF/Original/{name}.*", 6)


def test_lists_divide_folders_of_scenes(tmp_path):
    for scene, numbers in {"paris": (0, 1), "rome": (2, 3)}.items():
        for i in numbers:
            write(tmp_path / f"data/{scene}/images/{i}.png", photo(i))
            write(tmp_path / f"data/{scene}/labels/{i}.png", HALF)
    for split, names in {"train": "0.png\n2.png\n3.png", "val": "1.png"}.items():
        (tmp_path / f"data/{split}.txt").write_text(names)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.images, config.dataset.split_file) == ("*/images/{name}.png", "{split}.txt")
    assert len(labels) == 4


def test_a_list_beside_the_folders_that_it_names(tmp_path):
    write_pairs(tmp_path / "data/davis")
    for split, numbers in {"train": range(4), "val": (4, 5)}.items():
        (tmp_path / "data/davis/sets").mkdir(exist_ok=True)
        lines = "\n".join(f"/images/{i}.png /masks/{i}.png" for i in numbers)
        (tmp_path / f"data/davis/sets/{split}.txt").write_text(lines)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.dataset.split_file, len(labels)) == ("davis/sets/{split}.txt", 6)


def test_what_cannot_be_used_is_left_out_with_a_remark(tmp_path):
    write_pairs(tmp_path / "data", count=8)
    write(tmp_path / "data/masks/alone.png", HALF)
    (tmp_path / "data/masks/5.png").write_bytes((tmp_path / "data/masks/5.png").read_bytes()[:60])
    for name in "train", "val":
        (tmp_path / f"data/{name}.txt").write_text("1\n2\n3\n4\n5\n6\n7" if name == "train" else "0")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    [line] = [line for line in (tmp_path / "made.py").read_text().splitlines() if "on_error" in line]
    assert re.search(r"'skip'  # GUESS: leaves out 1 label\(s\): .*masks/5.png: cannot be read as a label", line)
    assert len(labels_by(tmp_path / "made.py")[1]) == 7


def test_deep_images_among_others_are_left_out_with_a_remark(tmp_path):
    write_pairs(tmp_path / "data")
    write(tmp_path / "data/images/0.png", photo(0)[..., 0].astype(np.uint16) * 257)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert "leaves out 1 image(s) that are not uint8 of 3 channels" in (tmp_path / "made.py").read_text()
    assert len(labels_by(tmp_path / "made.py")[1]) == 5


def test_only_the_first_image_of_a_stack_is_used_with_a_remark(tmp_path):
    pages = [Image.fromarray(photo(i)) for i in range(3)]
    for i in range(6):
        write(tmp_path / f"data/masks/{i}.png", HALF)
        (tmp_path / "data/images").mkdir(exist_ok=True)
        pages[0].save(tmp_path / f"data/images/{i}.tif", save_all=True, append_images=pages[1:])
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert re.search(r"GUESS: only the first of 3 images in .*images/0.tif is used", (tmp_path / "made.py").read_text())


def test_a_shape_in_the_transparency_is_refused(tmp_path, capsys):
    write_pairs(tmp_path / "data", label=np.dstack([np.full((16, 16, 3), 255, np.uint8), 255 * HALF]))
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert "masks/0.png: has one color, and its shape is in the transparency" in capsys.readouterr().err


def test_other_files_beside_the_images_do_not_matter(tmp_path):
    write_pairs(tmp_path / "data", images="images/{}.jpg")
    for i in range(6):
        (tmp_path / f"data/images/{i}.json").write_text("{}")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, _ = labels_by(tmp_path / "made.py")
    assert config.dataset.images == "images/{name}.jpg"


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("labels/0.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n", "YOLO's polygons: export or convert them to COCO's JSON"),
        ("train.csv", "ImageId,EncodedPixels\n0.jpg,1 3\n", "run-length encoded masks: decode them to label images"),
        ("via.json", '{"0.jpg123": {"filename": "0.jpg", "regions": []}}', "VIA's polygons: in VIA, export them as COCO"),
        ("labels/0.json", '{"imgHeight": 16, "objects": []}', "Cityscapes' polygons: write label images"),
        ("labels.zip", "", "archives: unpack them"),
        ("labels.npz", "", "NumPy archives: save each of their arrays as .npy"),
        ("0.geojson", "{}", "a vector map: burn it into label images"),
    ],
)
def test_other_forms_are_recognized_with_an_advice(tmp_path, capsys, name, content, advice):
    write(tmp_path / "data/images/0.jpg", photo(0))
    (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_text(content)
    (tmp_path / "data/left_over.tgz").touch()
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert f"it seems to have {advice}" in capsys.readouterr().err


def test_bands_in_separate_files_are_recognized(tmp_path, capsys):
    for scene in ("aaaa", "bbbb"):
        for band in ("B02", "B03", "B8A"):
            write(tmp_path / f"data/features/{scene}/{band}.tif", photo(0)[..., 0])
        write(tmp_path / f"data/labels/{scene}.tif", HALF)
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert "it seems to have the bands of each image in separate files: stack them into one TIFF" in capsys.readouterr().err


def test_images_of_more_bands_than_pillow_reads_are_checked_without_a_word_of_pillow(tmp_path, capsys):
    for i in range(6):
        (tmp_path / "data/images").mkdir(parents=True, exist_ok=True)
        bands = np.random.default_rng(i).integers(0, 256, (16, 16, 11), np.uint8)
        tifffile.imwrite(tmp_path / f"data/images/{i}.tif", bands, photometric="minisblack", planarconfig="contig")
        write(tmp_path / f"data/labels/{i}.tif", HALF)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert (config.model.channels, len(labels)) == (11, 6)
    assert "amples per pixel" not in "".join(capsys.readouterr())


def test_empty_arrays_are_no_labels(tmp_path, capsys):
    """As in the bounding boxes of an image without objects."""
    for i in range(6):
        write(tmp_path / f"data/images/{i}.png", photo(i))
        (tmp_path / "data/labels").mkdir(exist_ok=True)
        np.save(tmp_path / f"data/labels/{i}.npy", np.zeros((0, 5)))
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert ".npy: has no pixels" in capsys.readouterr().err


def test_a_recipe_that_cannot_train_is_an_error(tmp_path, capsys):
    write_pairs(tmp_path / "data", label=HALF[::2, ::2])
    assert check(tmp_path / "data", tmp_path / "made.py") == 1
    assert re.search(r"is 8x8, but its image .*made.py is written, but cannot train as the files are", capsys.readouterr().err)


def paletted(label, colors):
    """Returns an image with a palette, in which value i has color i."""
    image = Image.fromarray(label).convert("P")
    image.putdata(label.ravel().tolist())
    image.putpalette([channel for color in colors for channel in color])
    return image


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_that_differ_between_files_count_by_color(tmp_path, suffix):
    """Labels are black above and white below, and value 0 is black in some files and white in others, as Pillow saves GIFs."""
    for i in range(6):
        write(tmp_path / f"data/images/{i}.jpg", photo(i))
        (tmp_path / "data/masks").mkdir(exist_ok=True)
        colors = [(0, 0, 0), (255, 255, 255)][:: 1 if i % 2 else -1]
        paletted(HALF if i % 2 else 1 - HALF, colors).save(tmp_path / f"data/masks/{i}.{suffix}")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert datasets.describe(config.dataset).class_names == ("color_0_0_0", "color_255_255_255")
    assert len(labels) == 6
    assert all((label == HALF).all() for label in labels)


def test_a_label_map_of_values_does_not_hide_palettes_that_differ(tmp_path):
    for i in range(4):
        write(tmp_path / f"images/train/{i}.png", photo(i))
        (tmp_path / "labels/train").mkdir(parents=True, exist_ok=True)
        colors = [(9, 0, 0), (0, 9, 0)][:: 1 if i % 2 else -1]
        paletted(HALF, colors).save(tmp_path / f"labels/train/{i}.png")
    config = configs.base_config()
    config.dataset.update(root=str(tmp_path), label_map="{0: 'a', 1: 'b'}", class_names=("a", "b"))
    with pytest.raises(UserError, match="the same value means different classes"):
        sources.open_source(config.dataset, "train")


def test_cameras_whose_masks_are_mostly_empty_are_no_copies(tmp_path, capsys):
    for camera in "abcdef":
        for i in range(10):
            write(tmp_path / f"data/cam_{camera}/images/00{i}.png", photo(i + 10 * ord(camera)))
            label = HALF if (i + ord(camera)) % 5 == 0 else 0 * HALF
            write(tmp_path / f"data/cam_{camera}/masks/00{i}.png", label)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert len(labels) == 60
    assert "{split}" in config.dataset.images


def test_a_list_saved_by_excel_and_one_with_paths_of_windows(tmp_path):
    write_pairs(tmp_path / "data", "masks/{}.png", "pics/{}.png")
    rows = [f"pics\\{i}.png,masks\\{i}.png,{'val' if i > 3 else 'train'}" for i in range(6)]
    (tmp_path / "data/splits.csv").write_text("\n".join(["\ufeffimage,label,split", *rows]), encoding="utf-8")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert config.dataset.split_file == "splits.csv"
    assert len(labels) == 6
    assert "'train'  # 4 pairs" in (tmp_path / "made.py").read_text()


@pytest.mark.parametrize("header", ["image_path,mask_path,image_id,split", "image_path,mask_path,label,split"])
def test_a_list_with_other_columns_than_files(tmp_path, header):
    write_pairs(tmp_path / "data", "segs/{}.png", "pics/{}.png")
    rows = [f"pics/{i}.png,segs/{i}.png,benign,{'val' if i > 3 else 'train'}" for i in range(6)]
    (tmp_path / "data/meta.csv").write_text("\n".join([header, *rows]))
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    assert configs.load_recipe(str(tmp_path / "made.py")).dataset.split_file == "meta.csv"


def test_two_bands_of_a_tiff_are_kept(tmp_path):
    write_pairs(tmp_path / "data", images="images/{}.tif")
    for i in range(6):
        tifffile.imwrite(tmp_path / f"data/images/{i}.tif", photo(i)[..., :2].astype(np.uint16) * 9, planarconfig="contig")
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config = configs.load_recipe(str(tmp_path / "made.py"))
    assert (config.model.channels, config.dataset.image_dtype, len(config.normalize.mean)) == (2, "uint16", 2)
    assert "GUESS: all bands; with 3, the second is ignored" in (tmp_path / "made.py").read_text()


def test_very_large_tiffs(tmp_path, monkeypatch):
    """Scaled down: Pillow refuses images of so many pixels."""
    for i in range(3):
        for kind, pixels in (("images", photo(i)), ("masks", HALF)):
            (tmp_path / f"data/{kind}").mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(tmp_path / f"data/{kind}/{i}.tif", pixels.repeat(8, 0).repeat(8, 1), tile=(64, 64))
    monkeypatch.setattr(large_files, "WHOLE", 2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert check(tmp_path / "data", tmp_path / "made.py") == 0
    config, labels = labels_by(tmp_path / "made.py")
    assert config.dataset.label_map == "{0: 'class_0', 1: 'class_1'}"
    assert labels[0].shape == (128, 128)


def test_a_damaged_image_and_a_broken_link_do_not_stop_the_check(tmp_path):
    write_pairs(tmp_path / "data", count=20)
    (tmp_path / "data/images/2.png").write_bytes(b"")
    (tmp_path / "data/masks/3.png").write_bytes(b"?")
    (tmp_path / "data/notes.txt").symlink_to(tmp_path / "nowhere")
    for _ in range(2):  # the second recipe is the same
        assert check(tmp_path / "data", tmp_path / "made.py") == 0
    text = (tmp_path / "made.py").read_text()
    assert f"1 image(s): {tmp_path}/data/images/2.png: cannot be read as an image (" in text
    assert f"1 label(s): {tmp_path}/data/masks/3.png: cannot be read as a label (" in text
    assert len(labels_by(tmp_path / "made.py")[1]) == 18


def test_the_name_of_the_recipe_depends_only_on_the_folder(tmp_path, monkeypatch):
    for name in ("mine", "random"):
        write_pairs(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main.main(["--mode=check", "--input=mine"]) == main.main(["--mode=check", "--input=random"]) == 0
    assert {path.name for path in tmp_path.glob("*.py")} == {"mine.py", "random_recipe.py"}


def test_nothing_is_written_among_the_images(tmp_path, monkeypatch, capsys):
    write_pairs(tmp_path / "flat", "{}_mask.png", "{}.png")
    monkeypatch.chdir(tmp_path / "flat")
    before = sorted(tmp_path.rglob("*"))
    assert main.main(["--mode=check", "--input=."]) == 1
    assert "holds the images or labels; choose --output DIR/flat.py" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_why_some_files_have_no_partner_is_said(tmp_path):
    for i in range(1, 13):
        write(tmp_path / f"zeros/images/{i}.png", photo(i))
        write(tmp_path / f"zeros/masks/{i:02d}.png", HALF)
        write(tmp_path / f"formats/images/{i}.jpg", photo(i))
        write(tmp_path / f"formats/masks/{i}.{'png' if i < 4 else 'tif'}", HALF)
    for name, hint in (("zeros", "differ in the zeros before a number"), ("formats", "labels of other formats are not used")):
        assert check(tmp_path / name, tmp_path / f"{name}.py") == 0
        assert hint in (tmp_path / f"{name}.py").read_text()


def test_values_that_are_no_classes_are_ignored():
    for odd in (-1, 65535, 255):
        found = label_values.entries(label_values.Values({0: 0.5, 1: 0.4, odd: 0.1}, 1, 1), {})
        assert {entry.key: entry.name for entry in found} == {0: "class_0", 1: "class_1", odd: None}
    names = {"classes.txt": "unlabeled\nroad\n"}
    found = label_values.entries(label_values.Values({0: 0.5, 1: 0.4, 255: 0.1}, 1, 1), names)
    assert [entry.name for entry in found] == ["unlabeled", "road", None]  # two classes are left
