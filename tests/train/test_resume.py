import logging

import jax
import numpy as np
import pytest
from flax import traverse_util

from pspnet_jax.train import resume
from tests.train import filled_state, mesh_of, parts_of, tiny_config


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
def test_another_network_or_other_classes_cannot_be_resumed(field, value, difference):
    changed = tiny_config()
    changed.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=rf"holds a run with another config \({difference}\): use the saved values"):
        resume.check_resumable(tiny_config(), changed)


def test_other_changes_are_listed_and_allowed(caplog):
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


def started(config, trained, fresh):
    """The fresh state with the weights that config.init_from names."""
    config.init_from = str(trained)
    given, names = resume.initial_weights(config, parts_of(config)["model"], mesh_of(1))
    given = resume.match_classes(given, fresh.weights, names, config.dataset.class_names, config.init_from)
    return resume.with_weights(fresh, given, config.init_from)


def test_starting_from_another_runs_weights(trained):
    fresh = filled_state(tiny_config(), 1)
    state = started(tiny_config(), trained, fresh)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.ema)):
        np.testing.assert_array_equal(leaf, 6)  # the moving average of the other run
    jax.tree.map(np.testing.assert_array_equal, (state.step, state.opt_state), (fresh.step, fresh.opt_state))
    # apart from each other, or the step could not be given both to keep
    assert {id(x) for x in jax.tree.leaves(state.ema)}.isdisjoint(id(x) for x in jax.tree.leaves(state.params))


def test_other_classes_keep_their_fresh_classifiers_and_say_so(trained, caplog):
    config = tiny_config()
    config.dataset.class_names = ("a", "b", "c", "d", "e")
    state = started(config, trained, filled_state(config, 1))
    for path, leaf in traverse_util.flatten_dict(state.params).items():
        np.testing.assert_array_equal(leaf, 1 if "classifier" in path[0] else 6, err_msg=str(path))
    *_, warning = [r.message for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("pspnet_jax")]
    assert warning.endswith("drawn at random: auxiliary_classifier, classifier")


@pytest.mark.parametrize(
    ("section", "field", "value", "flag"),
    [
        ("model", "width", 16, "--config.model.width=8"),
        ("model", "stride_in", "conv1x1", "--config.model.stride_in=conv3x3"),
        ("model", "align_corners", False, "--config.model.align_corners=true"),
        ("normalize", "order", "BGR", "--config.normalize.order=RGB"),
    ],
)
def test_another_network_cannot_be_started_from_even_if_the_weights_fit(trained, section, field, value, flag):
    config = tiny_config()
    config[section][field] = value
    with pytest.raises(ValueError, match=f"init_from=.*: its network is another one; set {flag}$"):
        started(config, trained, filled_state(config, 1))


def test_a_backbone_alone_leaves_everything_else_fresh(caplog):
    fresh = filled_state(tiny_config(), 1)
    given = {
        part: {"backbone": jax.tree.map(lambda x: np.full(x.shape, 3.0, np.float32), tree["backbone"])}
        for part, tree in (("params", fresh.params), ("batch_stats", fresh.batch_stats))
    }
    state = resume.with_weights(fresh, given, "resnet18.pth")
    for path, leaf in traverse_util.flatten_dict(state.weights).items():
        np.testing.assert_array_equal(leaf, 3 if path[1] == "backbone" else 1, err_msg=str(path))
    assert "not in resnet18.pth" in caplog.text
    assert "pyramid" in caplog.text
