"""Patterns of names, lists of splits, and a split by fraction."""

import logging

import pytest

from pspnet_jax.data import layouts
from pspnet_jax.errors import UserError
from tests.data.test_sources import recipe


def write(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")


def pairs(root, split="train", **fields):
    """Returns {name: (image, label)} with paths below root."""
    found = layouts.list_pairs(recipe(root=str(root), **fields), split)
    return {pair.name: (pair.image.removeprefix(f"{root}/"), pair.label.removeprefix(f"{root}/")) for pair in found}


def test_patterns(tmp_path, caplog):
    write(tmp_path, "x/1_sat.jpg", "x/1_mask.png", "x/b/2_sat.JPG", "x/b/2_mask.png", "x/3_other.png", "x/notes.txt")
    with caplog.at_level(logging.WARNING, "pspnet_jax"):
        found = pairs(tmp_path, "x", images="{split}/{name}_sat.*", labels="{split}/{name}_mask.png")
    assert found == {"1": ("x/1_sat.jpg", "x/1_mask.png"), "b/2": ("x/b/2_sat.JPG", "x/b/2_mask.png")}
    (record,) = caplog.records
    assert "2 files are ignored because they match neither dataset.images nor dataset.labels: " in record.message
    assert f"{tmp_path}/x/3_other.png" in record.message
    write(tmp_path, "city/a/im_1.png", "truth/a/1_ids.tif", "truth/a/1_color.tif")
    found = pairs(tmp_path, "a", images="city/{split}/*_{name}.*", labels="truth/{split}/{name}_ids.*")
    assert found == {"1": ("city/a/im_1.png", "truth/a/1_ids.tif")}


def test_a_word_inside_the_name(tmp_path):
    write(tmp_path, "image/um_1.png", "image/uu_1.png", "gt/um_road_1.png", "gt/uu_road_1.png", "gt/um_lane_1.png")
    found = pairs(tmp_path, "train", images="image/{name}.*", labels="gt/{name}_road{tail}.png", split_fraction=1e-9)
    assert found == {f"{kind}_1": (f"image/{kind}_1.png", f"gt/{kind}_road_1.png") for kind in ("um", "uu")}


def test_labels_that_are_no_pngs_are_used_where_there_are_no_pngs(tmp_path):
    write(tmp_path, "images/train/a.png", "labels/train/a.npy")
    assert pairs(tmp_path)["a"][1] == "labels/train/a.npy"
    write(tmp_path, "labels/train/a.png")
    assert pairs(tmp_path)["a"][1] == "labels/train/a.png"


def test_the_root_is_no_pattern(tmp_path):
    for name in ("star*dir", "a{name}b"):
        write(tmp_path, f"{name}/images/train/a.png", f"{name}/labels/train/a.png")
        assert pairs(tmp_path / name) == {"a": ("images/train/a.png", "labels/train/a.png")}


@pytest.mark.parametrize(("image", "label"), [("{name}", "{name}_mask"), ("{name}_sat", "{name}"), ("{name}_i", "{name}_l")])
def test_images_and_labels_side_by_side(tmp_path, image, label):
    files = {n: (f"x/{image.format(name=n)}.png", f"x/{label.format(name=n)}.png") for n in ("1", "2")}
    write(tmp_path, *files["1"], *files["2"])
    assert pairs(tmp_path, "x", images=f"{{split}}/{image}.*", labels=f"{{split}}/{label}.png") == files


def test_a_fraction_keeps_the_split_of_each_file(tmp_path):
    fields = {"images": "im/{name}.*", "labels": "gt/{name}.*", "split_fraction": 0.25}
    write(tmp_path, *(f"{kind}/{index}.png" for index in range(400) for kind in ("im", "gt")))
    train, val = (set(pairs(tmp_path, split, **fields)) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 400
    assert 75 < len(val) < 125  # 100 +- 3 standard deviations of 8.7
    write(tmp_path, *(f"{kind}/{index}.png" for index in range(400, 500) for kind in ("im", "gt")))
    assert set(pairs(tmp_path, "val", **fields)) & (train | val) == val
    assert set(pairs(tmp_path, "val", **fields, split_seed=1)) & (train | val) != val
    with pytest.raises(UserError, match=r"split_fraction=0.0001: none of the 500 images of .* is in split 'val'; change"):
        pairs(tmp_path, "val", **fields | {"split_fraction": 0.0001})
    with pytest.raises(UserError, match=r"has no \{split\}, so every split would have the same images"):
        pairs(tmp_path, "test", **fields)


@pytest.mark.parametrize(
    "text",
    [
        "1\n2\n\n",
        "\ufeff1.jpg\r\nim/2.jpg\r\n",
        "/somewhere/else/1.jpg\n./im/2",
        "1 1\n2 -1",  # names with flags, as in VOC
        "gt/1.png\n2.png\n",  # the labels'
        "image,split\n1.jpg,train\n2.jpg,train\n3.jpg,val\n",
        "id,filename,subset\n0,im/1.jpg,train\n1,2,train\n2,3,val\n",
    ],
)
def test_lists_of_images(tmp_path, text):
    write(tmp_path, *(f"{kind}/{index}.{end}" for index in (1, 2, 3) for kind, end in (("im", "jpg"), ("gt", "png"))))
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    found = pairs(tmp_path, images="im/{name}.*", labels="gt/{name}.*", split_file="{split}.txt")
    assert found == {index: (f"im/{index}.jpg", f"gt/{index}.png") for index in "12"}


def test_a_list_may_name_images_without_a_label_if_these_are_left_out(tmp_path):
    write(tmp_path, "im/1.jpg", "im/2.jpg", "gt/1.png")
    (tmp_path / "train.txt").write_text("1\n2\n")
    fields = {"images": "im/{name}.*", "labels": "gt/{name}.*", "split_file": "{split}.txt"}
    assert {*pairs(tmp_path, **fields)} == {"1", "2"}
    assert {*pairs(tmp_path, on_error="skip", **fields)} == {"1"}


@pytest.mark.parametrize(
    "text",
    [
        "x/a b.jpg y/c.png\n",
        "x/a b.jpg,y/c.png",
        "/x/a b.jpg\ty/c.png",
        "mask,image\ny/c.png,x/a b.jpg",
        "mask;image\ny/c.png;ROOT/x/a b.jpg",
    ],
)
def test_lists_of_images_and_labels(tmp_path, text):
    (tmp_path / "list.train").write_text(text.replace("ROOT", str(tmp_path)))
    assert pairs(tmp_path, split_file="list.{split}") == {"x/a b": ("x/a b.jpg", "y/c.png")}


def test_wrong_lists(tmp_path):
    write(tmp_path, "im/1.jpg", "gt/1.png")
    for text, file, sentence in (
        ("1\n7\n8\n", "{split}.txt", "train.txt: 2 of 3 entries name none of the 1 images .* the first is '7'"),
        ("image,split\n1,val\n", "train.txt", "lists no image of split 'train'; its splits are val"),
        ("1\n", "train.txt", "names no splits"),
        ('image,split\n1,"' + 200_000 * "x", "train.txt", "train.txt: cannot be read as a table; correct its quotes"),
        ("1\nelsewhere/1.jpg\n", "{split}.txt", "'1' and 'elsewhere/1.jpg' both stand for the image im/1.jpg; list each"),
        ("split,image\ntrain,1\ntrain\n", "train.txt", "1 of 2 lines of split 'train' have no image; complete them"),
        ("image,label\nim/1.jpg,gt/1.png\nim/2.jpg,\n", "{split}.txt", "1 of 2 lines of split 'train' have no label"),
        ("", "{split}.txt", "lists no image of split 'train'"),
        ("1\n", "x.txt", "x.txt: no such file"),
    ):
        (tmp_path / "train.txt").write_text(text)
        with pytest.raises(UserError, match=sentence):
            pairs(tmp_path, images="im/{name}.*", labels="gt/{name}.*", split_file=file)
