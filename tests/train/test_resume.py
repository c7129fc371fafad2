import logging

import jax
import numpy as np
import pytest
from flax import traverse_util

from pspnet_jax.train import resume
from pspnet_jax.train.checkpoint import create_run
from tests.train import CLASSES, filled_state, mesh_of, parts_of, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.mark.parametrize(
    ("field", "value", "difference"),
    [
        ("model.depth", 50, "model.depth: 18 -> 50"),
        ("model.bins", (1, 2), r"model.bins: \(1,\) -> \(1, 2\)"),
        ("normalize.std", (1.0, 1.0, 1.0), "normalize.std: .* -> .1.0, 1.0, 1.0."),
        ("dataset.class_names", ("sky", "road"), "dataset.class_names: .'sky', 'road', 'car'. -> .'sky', 'road'."),
        ("dataset.name", "scenes", "dataset.name: 'folder' -> 'scenes'"),
        ("optimizer.ema_decay", 0.0, "optimizer.ema_decay: 0.75 -> 0.0"),
    ],
)
def test_resuming_with_another_network_or_other_classes_is_refused(field, value, difference):
    changed = tiny_config()
    changed.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=rf"holds a run with another config \({difference}\): use the saved values"):
        resume.check_resumable(tiny_config(), changed)


def test_other_changes_are_allowed_and_logged(caplog):
    changed = tiny_config()
    changed.update_from_flattened_dict(
        {"optimizer.learning_rate": 0.1, "dataset.root": "elsewhere", "optimizer.ema_decay": 0.9}
    )
    resume.check_resumable(tiny_config(), tiny_config())
    assert not caplog.records
    resume.check_resumable(tiny_config(), changed)
    assert caplog.messages == [
        "resuming with a changed config: dataset.root: '' -> 'elsewhere'; optimizer.ema_decay: 0.75 -> 0.9; "
        "optimizer.learning_rate: 0.5 -> 0.1"
    ]


def start_from(config, trained, fresh):
    """Returns the new state `fresh` with the weights of the run `trained`."""
    config.init_from = str(trained)
    given, names = resume.initial_weights(config, parts_of(config)["model"], mesh_of(1))
    given = resume.match_classes(given, fresh.weights, names, config.dataset.class_names, config.init_from)
    return resume.with_weights(fresh, given, config.init_from)


def test_starting_a_network_for_other_channels(trained):
    """The normalization is that of other images, and may differ."""
    config = tiny_config()
    config.model.channels, config.normalize.mean, config.normalize.std = 4, (0.0,) * 4, (1.0,) * 4
    state = start_from(config, trained, filled_state(config, 1))
    stem, *others = (state.params["backbone"].pop("stem_conv1")["conv"]["kernel"], *jax.tree.leaves(state.params))
    assert stem.shape[2] == 4
    np.testing.assert_array_equal(stem, 4.5)  # 6 * 3 / 4
    for leaf in others:
        np.testing.assert_array_equal(leaf, 6)


def test_starting_from_another_runs_weights(trained):
    fresh = filled_state(tiny_config(), 1)
    state = start_from(tiny_config(), trained, fresh)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.ema)):
        np.testing.assert_array_equal(leaf, 6)  # the moving average of the other run
    jax.tree.map(np.testing.assert_array_equal, (state.step, state.opt_state), (fresh.step, fresh.opt_state))
    # must not share buffers, since the train step donates both
    assert {id(x) for x in jax.tree.leaves(state.ema)}.isdisjoint(id(x) for x in jax.tree.leaves(state.params))


def test_with_other_classes_the_classifiers_keep_their_initial_values(trained, caplog):
    config = tiny_config()
    config.dataset.class_names = ("a", "b", "c", "d", "e")
    state = start_from(config, trained, filled_state(config, 1))
    for path, leaf in traverse_util.flatten_dict(state.params).items():
        np.testing.assert_array_equal(leaf, 1 if "classifier" in path[0] else 6, err_msg=str(path))
    *_, warning = [r.message for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("pspnet_jax")]
    assert warning.endswith("initialized at random: auxiliary_classifier, classifier")


@pytest.mark.parametrize(
    ("section", "field", "value", "flag"),
    [
        ("model", "width", 16, "--config.model.width=8"),
        ("model", "stride_in", "conv1x1", "--config.model.stride_in=conv3x3"),
        ("model", "align_corners", False, "--config.model.align_corners=true"),
        ("normalize", "order", "BGR", "--config.normalize.order=RGB"),
    ],
)
def test_init_from_another_network_is_refused_even_if_the_shapes_match(trained, section, field, value, flag):
    config = tiny_config()
    config[section][field] = value
    with pytest.raises(ValueError, match=f"init_from=.*: it has a different network; set {flag}$"):
        start_from(config, trained, filled_state(config, 1))


def test_matching_class_names_ignores_case_and_spaces(caplog):
    given = {"params": {"classifier": {"bias": np.arange(3.0)}}}
    assert resume.match_classes(given, given, ("Sky ", "ROAD", "car"), CLASSES, "net.pth") is given
    assert not caplog.messages


def test_with_a_backbone_alone_everything_else_keeps_its_initial_values(caplog):
    fresh = filled_state(tiny_config(), 1)
    given = {
        part: {"backbone": jax.tree.map(lambda x: np.full(x.shape, 3.0, np.float32), tree["backbone"])}
        for part, tree in (("params", fresh.params), ("batch_stats", fresh.batch_stats))
    }
    state = resume.with_weights(fresh, given, "resnet18.pth")
    for path, leaf in traverse_util.flatten_dict(state.weights).items():
        np.testing.assert_array_equal(leaf, 3 if path[1] == "backbone" else 1, err_msg=str(path))
    assert "missing in resnet18.pth" in caplog.text
    assert resume.match_classes(given, fresh.weights, (), CLASSES, "resnet18.pth") is given
    assert "does not name its classes" not in caplog.text
    theirs = fresh.weights
    assert resume.match_classes(theirs, theirs, (), CLASSES, "psp.pth") is theirs
    assert "psp.pth does not name its classes: the classifier rows are kept in their order" in caplog.text
    assert "pyramid" in caplog.text


def run_with_numbered_rows(trained, tmp_path, names):
    """Writes a copy of the run with other class names, in which row i of each classifier is filled with i."""
    config = tiny_config()
    config.dataset.class_names = CLASSES
    state = filled_state(config, 0)

    def number(path, leaf):
        rows = np.arange(leaf.shape[-1]) if "classifier" in jax.tree_util.keystr(path) else 7
        return jax.device_put(np.full(leaf.shape, rows, leaf.dtype), leaf.sharding)

    state = state.replace(ema=jax.tree_util.tree_map_with_path(number, state.ema))
    config.dataset.class_names = names
    create_run(tmp_path / "run", config, state)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("old", "new", "rows", "message"),
    [
        (("sky", "road", "car"), ("sky", "road", "car"), [0, 1, 2], None),
        (("sky", "road", "car"), ("road", "sky", "car"), [1, 0, 2], "kept: car; moved: road (1 -> 0), sky (0 -> 1)"),
        (
            ("sky", "road", "car"),
            ("tree", "car"),
            [9, 2],
            "moved: car (2 -> 1); initialized at random: tree; dropped: sky, road",
        ),
        (
            ("sky", "road", "car"),
            ("sky", "a", "b", "c", "road"),
            [0, 9, 9, 9, 1],
            "kept: sky; moved: road (1 -> 4); initialized",
        ),
        (
            ("class 0", "class 1", "class 2"),
            ("road", "sky", "car"),
            [0, 1, 2],
            "does not name its classes: the classifier rows are kept",
        ),
    ],
)
def test_classifier_rows_are_matched_by_class_name(trained, tmp_path, caplog, old, new, rows, message):
    config = tiny_config()
    config.dataset.class_names = new
    state = start_from(config, run_with_numbered_rows(trained, tmp_path, old), filled_state(config, 9))
    for tree in (state.params, state.ema["params"]):
        for module in ("classifier", "auxiliary_classifier"):
            for name, leaf in tree[module].items():
                np.testing.assert_array_equal(leaf, np.broadcast_to(rows, leaf.shape), err_msg=f"{module} {name}")
    np.testing.assert_array_equal(jax.tree.leaves(state.params["backbone"])[0], 7)
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("pspnet_jax")]
    assert (not found) if message is None else (message in found[0])
