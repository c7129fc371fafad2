import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pspnet_jax import models, parallel
from pspnet_jax.train import checkpoint
from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.step import TrainState
from tests.train import tiny_config

# At the first array that it cannot read, orbax closes its event loop under the reads of the others: their callbacks and
# coroutines then fail where nobody can catch it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def abandoned_reads():
    """Lets what orbax abandons come to its end within the test, not in a later one."""
    yield
    gc.collect()


def mesh_of(devices):
    return parallel.make_mesh(jax.devices()[:devices])


def small_state(step, devices=8):
    """A state of few numbers, all of which tell the step."""
    values = np.float32(step) + np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    state = TrainState(jnp.int32(step), {"a": {"kernel": values}}, {"a": {"mean": values + 1}}, (values + 2,), None)
    return jax.device_put(state, parallel.replicated(mesh_of(devices)))


def target(devices=8):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0, devices))


def assert_equal(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, state, other)


def save(workdir, scores, config=None):
    """Saves small states; scores: {step: mean IoU or None}."""
    checkpoints = Checkpoints(workdir)
    for step, score in scores.items():
        checkpoints.save(step, small_state(step), config or tiny_config(), None if score is None else {"mean_iou": score})
    checkpoints.close()


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8)])
def test_any_number_of_devices_restores_bit_for_bit(tmp_path, saved_on, restored_on):
    state = small_state(3, saved_on)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, tiny_config(), None)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(3, target(restored_on))
    assert_equal(restored, state)
    assert all(len(leaf.sharding.device_set) == restored_on for leaf in jax.tree.leaves(restored))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    grow = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = small_state(1).replace(batch_stats={"large": jnp.zeros((1000, 1000)), "a": {"mean": jnp.zeros(3)}})
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state, tiny_config(), None)
        for _ in range(5):
            state = grow(state)
    checkpoints.close()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for step, value in ((1, 0), (2, 5)):
        np.testing.assert_array_equal(Checkpoints(tmp_path).restore(step, shapes).batch_stats["large"], value)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.3, 2: 0.5, 3: None, 4: 0.4, 5: None, 6: None})
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [2, 5, 6]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 5, 6]
    assert [checkpoints.find(which) for which in ("best", "latest", "5")] == [2, 6, 5]


@pytest.mark.parametrize("which", ["best", "7", "newest"])
def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(tmp_path, which):
    save(tmp_path, {1: None, 2: None})
    with pytest.raises(FileNotFoundError, match=rf"--checkpoint {which}: .*checkpoints has \[1, 2\]"):
        Checkpoints(tmp_path, read_only=True).find(which)


def test_the_config_travels_with_the_checkpoint(tmp_path):
    config = tiny_config()
    config.eval.scales = (0.5, 1.75)
    save(tmp_path, {1: None}, config)
    restored = Checkpoints(tmp_path, read_only=True).config(1)
    assert restored.to_dict() == config.to_dict()  # tuples, not lists


def truncate(path):
    for file in path.glob("state/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(path):
    for file in path.glob("state/**/d/*"):
        data = bytearray(file.read_bytes())
        data[20:60] = bytes(byte ^ 0xFF for byte in data[20:60])
        file.write_bytes(data)


def delete_data(path):
    for file in path.glob("state/**/d/*"):
        file.unlink()


def delete_state(path):
    shutil.rmtree(path / "state")


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


def garble_metadata(path):
    (path / "state" / "_METADATA").write_text("{garbage")


def empty_all_files(path):
    """What may be left where the power failed."""
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [truncate, garble, delete_data, delete_state, empty_folder, garble_metadata, empty_all_files]
)
def test_an_unreadable_newest_checkpoint_is_moved_aside_and_the_one_before_it_used(tmp_path, caplog, abandoned_reads, damage):
    save(tmp_path, {2: None, 3: 0.4})
    damage(tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_newest(target())
    assert_equal(restored, small_state(2))
    (warning,) = [r.message for r in caplog.records if "moved to" in r.message]
    assert "checkpoint 3 cannot be read" in warning
    assert warning.endswith(f"moved to {tmp_path}/unreadable/3, using 2")
    assert (tmp_path / "unreadable" / "3").is_dir()
    assert checkpoints.steps == [2]
    checkpoints.save(3, small_state(3), tiny_config(), None)  # training comes past this step again
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path).restore_newest(target()), small_state(3))


def test_damaged_metrics_cost_a_checkpoint_its_rank_and_nothing_else(tmp_path, caplog):
    save(tmp_path, {1: 0.5, 2: 0.6, 3: None})
    (tmp_path / "checkpoints" / "2" / "metrics" / "metrics").write_text("{")
    checkpoints = Checkpoints(tmp_path)
    assert "the metrics of checkpoint 2 cannot be read" in caplog.text
    assert checkpoints.steps == [2, 3]
    assert_equal(checkpoints.restore_newest(target()), small_state(3))
    with pytest.raises(FileNotFoundError, match="--checkpoint best"):
        checkpoints.find("best")


def test_where_no_checkpoint_can_be_read_nothing_is_moved_and_nothing_started_over(tmp_path, abandoned_reads):
    save(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        garble_metadata(tmp_path / "checkpoints" / str(step))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .*checkpoints can be read \(2: .*; 1: .*\); delete the directory"):
        checkpoints.restore_newest(target())
    assert checkpoints.steps == [1, 2]
    assert not (tmp_path / "unreadable").exists()


def test_half_a_checkpoint_of_a_killed_process_does_not_count_and_goes_away(tmp_path):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, read_only=True).steps == [1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # evaluation removes nothing: the training may still run
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    checkpoints.save(3, small_state(3), tiny_config(), None)
    checkpoints.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


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
        checkpoint.check_resumable(tiny_config(), changed)


def test_other_changes_are_listed_and_allowed(caplog):
    changed = tiny_config()
    changed.update_from_flattened_dict(
        {"optimizer.learning_rate": 0.1, "dataset.root": "elsewhere", "optimizer.ema_decay": 0.9}
    )
    checkpoint.check_resumable(tiny_config(), tiny_config())
    assert not caplog.records
    checkpoint.check_resumable(tiny_config(), changed)
    assert caplog.messages == [
        "resuming with a changed config: dataset.root: '' -> 'elsewhere'; optimizer.ema_decay: 0.75 -> 0.9; "
        "optimizer.learning_rate: 0.5 -> 0.1"
    ]


def filled_state(config, value):
    """The config's whole train state with `value` everywhere but in the moving average, which has twice that."""
    mesh = mesh_of(1)
    model = models.build(config.model, len(config.dataset.class_names))
    shapes = checkpoint.abstract_state(config, model, mesh)

    def fill(tree, value):
        return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, value, x.dtype), x.sharding), tree)

    return fill(shapes, value).replace(average=fill(shapes.average, 2 * value))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a checkpoint of the tiny network at step 4, all its numbers 3 and those of the moving average 6."""
    workdir, config = tmp_path_factory.mktemp("trained"), tiny_config()
    checkpoints = Checkpoints(workdir)
    checkpoints.save(4, filled_state(config, 3), config, {"mean_iou": 0.25})
    checkpoints.close()
    return workdir


def test_evaluation_reads_config_and_moving_average_on_one_device(trained):
    config, step, variables = checkpoint.load(trained, "best", mesh_of(1))
    assert (config.to_dict(), step) == (tiny_config().to_dict(), 4)
    for leaf in jax.tree.leaves(variables):
        np.testing.assert_array_equal(leaf, 6)
        assert len(leaf.sharding.device_set) == 1


@pytest.mark.parametrize("part", ["state", "config"])
def test_evaluating_an_unreadable_checkpoint_ends_in_one_sentence(trained, tmp_path, abandoned_reads, part):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / "4" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"checkpoint 4 in .* cannot be read .*; choose another with --checkpoint") as error:
        checkpoint.load(tmp_path, "latest", mesh_of(1))
    assert "\n" not in str(error.value)


def test_evaluating_where_there_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: is no run with checkpoints; train there first"):
        checkpoint.load(tmp_path / "nowhere", "latest", mesh_of(1))
    assert not (tmp_path / "nowhere").exists()


def started(config, trained, fresh):
    """The fresh state with the weights that config.init_from names."""
    config.init_from = str(trained)
    model = models.build(config.model, len(config.dataset.class_names))
    return checkpoint.with_weights(fresh, checkpoint.initial_weights(config, model, mesh_of(1)), config.init_from)


def test_starting_from_another_runs_weights(trained):
    fresh = filled_state(tiny_config(), 1)
    state = started(tiny_config(), trained, fresh)
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.average)):
        np.testing.assert_array_equal(leaf, 6)  # the moving average of the other run
    assert_equal((state.step, state.opt_state), (fresh.step, fresh.opt_state))
    # apart from each other, or the step could not be given both to keep
    assert {id(x) for x in jax.tree.leaves(state.average)}.isdisjoint(id(x) for x in jax.tree.leaves(state.params))


def test_other_classes_keep_their_fresh_classifiers_and_say_so(trained, caplog):
    config = tiny_config()
    config.dataset.class_names = ("a", "b", "c", "d", "e")
    state = started(config, trained, filled_state(config, 1))
    for path, leaf in traverse_util.flatten_dict(state.params).items():
        np.testing.assert_array_equal(leaf, 1 if "classifier" in path[0] else 6, err_msg=str(path))
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("pspnet_jax")]
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
    state = checkpoint.with_weights(fresh, given, "resnet18.pth")
    for path, leaf in traverse_util.flatten_dict({"params": state.params, "batch_stats": state.batch_stats}).items():
        np.testing.assert_array_equal(leaf, 3 if path[1] == "backbone" else 1, err_msg=str(path))
    assert "not in resnet18.pth" in caplog.text
    assert "pyramid" in caplog.text


def test_weights_alone_make_a_run_that_is_never_overwritten(tmp_path):
    config = tiny_config()
    state = filled_state(config, 5)
    checkpoint.write_weights(tmp_path / "run", config, {"params": state.params, "batch_stats": state.batch_stats}, mesh_of(1))
    saved, step, variables = checkpoint.load(tmp_path / "run", "latest", mesh_of(2))
    assert (saved.to_dict(), step) == (config.to_dict(), 0)
    for leaf in jax.tree.leaves(variables):
        np.testing.assert_array_equal(leaf, 5)
    with pytest.raises(ValueError, match=r"run: holds a run already; choose another --workdir"):
        checkpoint.write_weights(tmp_path / "run", config, variables, mesh_of(1))
