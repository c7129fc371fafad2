import errno
import gc
import os
import pathlib
import re
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import parallel
from pspnet_jax.errors import UserError
from pspnet_jax.train import checkpoint, integrity, layout
from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.scores import SCORE
from pspnet_jax.train.step import TrainState
from tests.train import filled_state, mesh_of, tiny_config

pytestmark = pytest.mark.slow


def small_state(step, devices=8):
    """Returns a state of a few numbers that all depend on the step."""
    values = np.float32(step) + np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    state = TrainState(jnp.int32(step), {"a": {"kernel": values}}, {"a": {"mean": values + 1}}, (values + 2,), None)
    return jax.device_put(state, parallel.replicated(mesh_of(devices)))


def target(devices=8):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0, devices))


def assert_equal(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, state, other)


def save(workdir, scores, config=None):
    """Saves small states, given {step: score or None}."""
    checkpoints = Checkpoints(workdir)
    for step, score in scores.items():
        checkpoints.save(step, small_state(step), config or tiny_config())
        if score is not None:
            checkpoints.add_score(step, {SCORE: score}, {})
    checkpoints.close()


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8)])
def test_restoring_is_exact_on_any_number_of_devices(tmp_path, saved_on, restored_on):
    state = small_state(3, saved_on)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, tiny_config())
    checkpoints.close()
    restored = layout.read_state(Checkpoints(tmp_path).path(3), target(restored_on))
    assert_equal(restored, state)
    assert all(len(leaf.sharding.device_set) == restored_on for leaf in jax.tree.leaves(restored))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    grow = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = small_state(1).replace(batch_stats={"large": jnp.zeros((1000, 1000)), "a": {"mean": jnp.zeros(3)}})
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state, tiny_config())
        for _ in range(5):
            state = grow(state)
    checkpoints.close()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for step, value in ((1, 0), (2, 5)):
        np.testing.assert_array_equal(layout.read_state(Checkpoints(tmp_path).path(step), shapes).batch_stats["large"], value)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.3, 2: 0.5, 3: None, 4: 0.4, 5: None, 6: None})
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [2, 5, 6]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 5, 6]
    assert [checkpoints.find(which) for which in ("best", "latest", "5")] == [2, 6, 5]


@pytest.mark.parametrize("which", ["best", "7", "newest"])
def test_a_missing_checkpoint_is_an_error_that_lists_the_existing_ones(tmp_path, which):
    save(tmp_path, {1: None, 2: None})
    with pytest.raises(FileNotFoundError, match=rf"checkpoint '{which}': .*checkpoints has checkpoints \[1, 2\]"):
        Checkpoints(tmp_path, read_only=True).find(which)


def test_the_config_is_saved_with_the_checkpoint(tmp_path):
    config = tiny_config()
    config.eval.scales = (0.5, 1.75)
    save(tmp_path, {1: None}, config)
    restored = layout.read_config(Checkpoints(tmp_path, read_only=True).path(1))[0]
    assert restored.to_dict() == config.to_dict()  # tuples, not lists


@pytest.fixture
def _objects_that_orbax_abandons():
    """Destroys coroutines of a failed restore within its test; they cause warnings, and pytest sees these before our hook."""
    yield
    gc.collect()


def truncate(path):
    for file in path.glob("*/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(path):
    for file in path.glob("*/**/d/*"):
        data = bytearray(file.read_bytes())
        data[20:60] = bytes(byte ^ 0xFF for byte in data[20:60])
        file.write_bytes(data)


def delete_data(path):
    for file in path.glob("*/**/d/*"):
        file.unlink()


def delete_weights(path):
    shutil.rmtree(path / "weights")


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


def garble_metadata(path):
    (path / "weights" / "_METADATA").write_text("{garbage")


def empty_all_files(path):
    """As a power failure may leave them."""
    for file in path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
@pytest.mark.parametrize(
    "damage", [truncate, garble, delete_data, delete_weights, empty_folder, garble_metadata, empty_all_files]
)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_previous_one_used(tmp_path, caplog, damage):
    save(tmp_path, {2: None, 3: 0.4})
    damage(tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_newest(target())
    assert_equal(restored, small_state(2))
    (warning,) = [r.message for r in caplog.records if "moved to" in r.message]
    assert "checkpoint 3 is damaged" in warning
    assert warning.endswith(f"moved to {tmp_path}/set_aside/3; using checkpoint 2")
    assert (tmp_path / "set_aside" / "3").is_dir()
    assert checkpoints.steps == [2]
    assert checkpoints.scores.of(3) is None  # nor does it count for patience
    checkpoints.save(3, small_state(3), tiny_config())  # training reaches this step again
    checkpoints.close()
    assert_equal(Checkpoints(tmp_path).restore_newest(target()), small_state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
@pytest.mark.parametrize("damage", [truncate, garble, delete_data, delete_weights, garble_metadata])
def test_damage_is_found_without_a_manifest(tmp_path, caplog, damage):
    """Checkpoints of an older version have none, and there a flipped bit in a value is not detected."""
    save(tmp_path, {2: None, 3: 0.4})
    damage(tmp_path / "checkpoints" / "3")
    (tmp_path / "checkpoints" / "3" / "sha256" / "metadata").unlink()
    assert_equal(Checkpoints(tmp_path).restore_newest(target()), small_state(2))
    assert "checkpoint 3 is damaged" in caplog.text


def test_a_checkpoint_with_a_damaged_score_remains_usable(tmp_path, caplog):
    save(tmp_path, {1: 0.5, 2: 0.6, 3: None})
    (tmp_path / "checkpoints" / "2" / "score.json").write_text("{")
    checkpoints = Checkpoints(tmp_path)
    assert "the score of checkpoint 2 cannot be read" in caplog.text
    assert checkpoints.steps == [2, 3]
    assert_equal(checkpoints.restore_newest(target()), small_state(3))
    with pytest.raises(FileNotFoundError, match="checkpoint 'best'"):
        checkpoints.find("best")


def test_if_no_checkpoint_can_be_read_none_is_moved_and_training_does_not_start_over(tmp_path):
    save(tmp_path, {1: None, 2: None})
    for step in (1, 2):
        garble_metadata(tmp_path / "checkpoints" / str(step))
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .*checkpoints can be used \(2 is damaged .*; 1 is damaged .*\); delete the directory",
    ):
        checkpoints.restore_newest(target())
    assert checkpoints.steps == [1, 2]
    assert not (tmp_path / "set_aside").exists()


def test_a_partial_checkpoint_of_a_killed_process_is_ignored_and_removed(tmp_path):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, read_only=True).steps == [1]
    # Evaluation removes nothing, as the training may still be running.
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    checkpoints.save(3, small_state(3), tiny_config())
    checkpoints.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


def test_evaluation_reads_the_config_and_the_moving_average_onto_one_device(trained):
    config, step, variables = checkpoint.load(trained, "best", mesh_of(1))
    assert checkpoint.load(trained, step, mesh_of(1))[1] == step  # by number
    assert (config.to_dict(), step) == (tiny_config().to_dict(), 4)
    for leaf in jax.tree.leaves(variables):
        np.testing.assert_array_equal(leaf, 6)
        assert len(leaf.sharding.device_set) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
@pytest.mark.parametrize("part", ["ema", "config"])
def test_evaluating_a_damaged_checkpoint_is_a_user_error(trained, tmp_path, part):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / "4" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"checkpoint 4 in .* is damaged .*; .* choose another with --checkpoint") as error:
        checkpoint.load(tmp_path, "latest", mesh_of(1))
    assert "\n" not in str(error.value)


def test_evaluating_a_directory_without_a_run_is_a_user_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: is not a run with checkpoints; train there first"):
        checkpoint.load(tmp_path / "nowhere", "latest", mesh_of(1))
    assert not (tmp_path / "nowhere").exists()


def test_create_run_creates_a_run_and_never_overwrites_one(tmp_path):
    config = tiny_config()
    state = filled_state(config, 5)
    checkpoint.create_run(tmp_path / "run", config, state.replace(step=jnp.int32(0)))
    saved, step, variables = checkpoint.load(tmp_path / "run", "latest", mesh_of(2))
    assert (saved.to_dict(), step) == (config.to_dict(), 0)
    for leaf in jax.tree.leaves(variables):
        np.testing.assert_array_equal(leaf, 10)  # the moving average
    with pytest.raises(ValueError, match=r"run: already holds a run; choose another --workdir"):
        checkpoint.create_run(tmp_path / "run", config, state)


def test_evaluation_reads_only_the_moving_average(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for part in ("optimizer", "weights"):
        shutil.rmtree(tmp_path / "checkpoints" / "4" / part)
    _, _, variables = checkpoint.load(tmp_path, "4", mesh_of(1))
    assert {float(leaf.max()) for leaf in jax.tree.leaves(variables)} == {6.0}


@pytest.fixture
def old_run(tmp_path):
    """A run of tiny_config at step 4, written by version 0.1.0. Element n of leaf i is (n mod 16) / 16 + (i mod 8) + 1/2."""
    with zipfile.ZipFile(pathlib.Path(__file__).with_name("run_of_0.1.0.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def config_of_0_1():
    """tiny_config as version 0.1.0 saved it, whose defaults were the plain head and 4 windows."""
    config = tiny_config()
    config.model.factored_head, config.eval.batch_size = False, 4
    return config.to_dict()


def test_a_run_of_version_0_1_is_evaluated_with_its_own_config(old_run, caplog):
    config, step, variables = checkpoint.load(old_run, "best", mesh_of(2))
    assert (step, config.to_dict()) == (4, config_of_0_1())  # including renamed fields
    assert not [r for r in caplog.records if r.name.startswith("pspnet_jax")]
    number = {}  # index of each leaf in the old state: step, params, batch_stats, opt_state, average
    shapes = filled_state(tiny_config(), 0)
    old = (
        shapes.step,
        shapes.params,
        shapes.batch_stats,
        shapes.opt_state,
        {"params": shapes.params, "batch_stats": shapes.batch_stats},
    )
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(old)[0]):
        number[jax.tree_util.keystr(path)] = i
    checked = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        values = np.arange(leaf.size) % 16 / 16 + number["[4]" + jax.tree_util.keystr(path)] % 8 + 0.5
        np.testing.assert_array_equal(leaf, values.reshape(leaf.shape).astype(np.float32))
        checked += 1
    assert checked == len(jax.tree.leaves(shapes.weights))


def test_a_run_of_version_0_1_resumes(old_run):
    """Its momentum, schedule count and moving average are restored, and new checkpoints have the current layout."""
    checkpoints = Checkpoints(old_run)
    assert checkpoints.read_config()[0].to_dict() == config_of_0_1()
    state = checkpoints.restore_newest(filled_state(tiny_config(), 0))
    assert int(state.step) == 4
    (count,) = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]
    assert int(count) == 4
    assert float(jax.tree.leaves(state.opt_state)[0][0]) % 1 == 0.5
    checkpoints.save(5, state.replace(step=jnp.int32(5)), tiny_config())
    checkpoints.close()
    again = Checkpoints(old_run).restore_newest(filled_state(tiny_config(), 0))
    assert_equal(again.replace(step=state.step), state)


def fail_reads(monkeypatch, error, times):
    """Makes the first `times` reads of a checkpoint fail."""
    real, left = integrity.ocp.StandardCheckpointHandler.restore, [times]

    def restore(self, *args, **more):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return real(self, *args, **more)

    monkeypatch.setattr(integrity.ocp.StandardCheckpointHandler, "restore", restore)
    monkeypatch.setattr(integrity, "PAUSES", (0.0, 0.0))


UNREACHABLE = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.ESTALE, "Stale file handle"),
    TimeoutError("timed out"),
    ValueError('UNKNOWN: Error opening "zarr" driver: Failed to open "d/b1": Input/output error [tensorstore_spec=...]'),
    ValueError("UNAVAILABLE: socket closed"),
    RuntimeError("this version of orbax does not know the format"),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=range(len(UNREACHABLE)))
def test_an_unreachable_checkpoint_is_read_again_and_never_moved(tmp_path, caplog, monkeypatch, error):
    save(tmp_path, {2: None, 3: 0.4})
    fail_reads(monkeypatch, error, times=1)
    assert_equal(Checkpoints(tmp_path).restore_newest(target()), small_state(3))
    assert "checkpoint 3 could not be read" in caplog.text
    fail_reads(monkeypatch, error, times=100)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(
        UserError, match=r"checkpoint 3 in .* could not be read \(.*nothing was changed: try again when"
    ) as raised:
        checkpoints.restore_newest(target())
    assert "tensorstore_spec" not in str(raised.value)
    assert checkpoints.steps == [2, 3]
    assert not (tmp_path / "set_aside").exists()


@pytest.mark.parametrize("name", ["weights", "state", "sha256", "config", "d"])
def test_a_file_whose_stat_fails_is_unreachable_and_not_missing(tmp_path, monkeypatch, name):
    save(tmp_path, {2: None, 3: 0.4})
    checkpoints, real = Checkpoints(tmp_path), os.stat

    def stat(path, **more):
        if not isinstance(path, int) and f"/3/{name}" in f"{os.fspath(path)}".replace("/weights/d/", "/d/"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, **more)

    monkeypatch.setattr(integrity, "PAUSES", ())
    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match=r"checkpoint 3 .* could not be read .*Stale file handle"):
        checkpoints.restore_newest(target())
    monkeypatch.undo()
    assert Checkpoints(tmp_path).steps == [2, 3]


def test_evaluation_distinguishes_damage_from_unreachable_storage(trained, monkeypatch):
    def restore(*args, **more):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(integrity, "PAUSES", ())
    monkeypatch.setattr(integrity.ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(UserError, match=r"checkpoint 4 in .* could not be read \(.*Input/output error\); it may be intact"):
        checkpoint.load(trained, "latest", mesh_of(1))


def test_arrays_of_another_network_are_listed_and_no_checkpoint_is_moved(tmp_path):
    save(tmp_path, {2: None, 3: None})
    wanted = target()
    wider = jax.ShapeDtypeStruct((2, 5), np.float32, sharding=wanted.step.sharding)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint 3 .* belongs to another network \(.*params/a/kernel \(2, 3\) -> \(2, 5\)"):
        checkpoints.restore_newest(wanted.replace(params={"a": {"kernel": wider}}))
    with pytest.raises(UserError, match=r"belongs to another network \(the optimizer state has different arrays\)"):
        checkpoints.restore_newest(wanted.replace(opt_state=(wider,)))
    assert checkpoints.steps == [2, 3]


def flip(file, position):
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.fixture
def large_state():
    """A state with arrays that are larger than a block of the file format, so that most bytes of the files are values."""
    values = np.random.default_rng(0).standard_normal((300, 100), np.float32)
    return small_state(2).replace(batch_stats={"large": jnp.asarray(values)}, opt_state=(jnp.asarray(values + 1),))


def shapes_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_twice(workdir, state):
    """Saves the state at step 2, and with other values at step 3."""
    checkpoints = Checkpoints(workdir)
    checkpoints.save(2, state, tiny_config())
    checkpoints.save(3, jax.tree.map(lambda x: x + 1, state), tiny_config(), "120 files, a1")
    checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
def test_a_flipped_bit_anywhere_never_yields_wrong_values(tmp_path, large_state, caplog):
    """Most bytes are values, whose change is detected. Others, such as spaces in JSON, may change without harm."""
    save_twice(tmp_path / "run", large_state)
    files = [path for path in sorted((tmp_path / "run/checkpoints/3").glob("*/**/*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    random, noticed, tries = np.random.default_rng(0), 0, 24
    for number in range(tries):  # half of the time any byte of all files, else any file
        file = random.choice(files, p=np.divide(sizes, sum(sizes)) if number % 2 else None)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        flip(tmp_path / "copy" / file.relative_to(tmp_path / "run"), random.integers(file.stat().st_size))
        checkpoints = Checkpoints(tmp_path / "copy")
        config, fingerprint = checkpoints.read_config()
        restored = checkpoints.restore_newest(shapes_of(large_state))
        assert_equal(restored, jax.tree.map(lambda x, old=int(restored.step) == 2: x if old else x + 1, large_state))
        assert config.to_dict() == tiny_config().to_dict()
        assert fingerprint in ("120 files, a1", "")
        noticed += int(restored.step) == 2
    print(f"\n{noticed} of {tries} flipped bits were noticed, and the others were harmless")
    assert noticed >= 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
@pytest.mark.parametrize(
    ("pattern", "text", "name"),
    [
        ("weights/**/d/*", b"", "weights/batch_stats/large"),
        ("optimizer/**/d/*", b"", "optimizer/0"),
        ("data/metadata", b"120 files", "data"),
        ("config/metadata", b"batch_size", "config"),
    ],
)
def test_what_has_changed_is_named(tmp_path, caplog, large_state, pattern, text, name):
    save_twice(tmp_path, large_state)
    file = max((tmp_path / "checkpoints/3").glob(pattern), key=lambda path: path.stat().st_size)
    flip(file, file.read_bytes().index(text) if text else file.stat().st_size // 2)
    assert int(Checkpoints(tmp_path).restore_newest(shapes_of(large_state)).step) == 2
    assert f"checkpoint 3 is damaged (content has changed since it was saved: {name}); moved to" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
def test_a_damaged_checkpoint_is_set_aside_on_another_disk(tmp_path, large_state, monkeypatch):
    save_twice(tmp_path, large_state)
    file = tmp_path / "checkpoints/3/config/metadata"
    flip(file, file.stat().st_size // 2)

    def rename(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", rename)
    assert int(Checkpoints(tmp_path).restore_newest(shapes_of(large_state)).step) == 2
    assert (tmp_path / "set_aside/3/weights").exists()
    assert not (tmp_path / "checkpoints/3").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_objects_that_orbax_abandons")
def test_what_is_missing_in_a_copy_is_named(trained, tmp_path):
    def copy(change):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        change(tmp_path / "run" / "checkpoints")
        with pytest.raises(UserError) as error:
            checkpoint.load(tmp_path / "run", "latest", mesh_of(1))
        return str(error.value)

    assert "(missing: ema/)" not in copy(lambda path: shutil.rmtree(path / "4" / "config"))
    assert "is damaged or incomplete (missing: config/)" in copy(lambda path: shutil.rmtree(path / "4" / "config"))
    assert "is damaged or incomplete (missing: ema/)" in copy(lambda path: shutil.rmtree(path / "4" / "ema"))
    message = copy(lambda path: (path / "4" / "ema" / "_METADATA").unlink())
    assert re.search(r"is damaged \(Metadata file \(named _METADATA\) does not exist at .*/4/ema\.\); to evaluate", message)
    message = copy(lambda path: [file.unlink() for file in path.glob("4/ema/d/*")])
    assert re.search(r"is damaged \(NOT_FOUND: .*/4/ema/d/\w+\"\); to evaluate", message)
    message = copy(lambda path: (path / "4").rename(path / "4.orbax-checkpoint-tmp"))
    assert "has no complete checkpoint (and 4.orbax-checkpoint-tmp, left by an interrupted save or copy)" in message
    assert "is not a run with checkpoints" in copy(shutil.rmtree)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_neither_evaluated_nor_trained_further(tmp_path, caplog, bad):
    checkpoints, config = Checkpoints(tmp_path), tiny_config()
    config.optimizer.ema_decay = 0.0
    checkpoints.save(2, small_state(2), config)
    broken = small_state(3)
    kernel = np.array(broken.params["a"]["kernel"])
    kernel[0, 1] = bad
    checkpoints.save(3, broken.replace(params={"a": {"kernel": jax.device_put(kernel, broken.step.sharding)}}), config)
    checkpoints.close()
    with pytest.raises(
        UserError,
        match=r"checkpoint 3 .* has values that are not finite \(1 of 6 values of .*params/a/kernel are NaN or infinite\)",
    ):
        checkpoint.load(tmp_path, "latest", mesh_of(1))
    assert_equal(Checkpoints(tmp_path).restore_newest(target()), small_state(2))
    assert "checkpoint 3 has values that are not finite" in caplog.text
    assert (tmp_path / "set_aside" / "3").is_dir()


def test_weights_whose_number_of_classes_contradicts_the_config_are_refused(tmp_path):
    config = tiny_config()
    state = filled_state(config, 5)
    config.dataset.class_names = ("sky", "road")
    checkpoint.create_run(tmp_path / "run", config, state)
    with pytest.raises(UserError, match="has 3 classes, but its config names 2"):
        checkpoint.load(tmp_path / "run", "latest", mesh_of(1))


@pytest.mark.parametrize("fault", ["damaged", "unreachable"])
def test_a_checkpoint_whose_score_cannot_be_read_is_kept(tmp_path, monkeypatch, caplog, fault):
    """Because it may be the best one."""
    save(tmp_path, {1: 0.9, 2: 0.5, 3: None})
    with monkeypatch.context() as patch:
        if fault == "damaged":
            os.truncate(tmp_path / "checkpoints/1/score.json", 9)
        else:
            stat = os.stat
            refuse = lambda path, **more: _raise(errno.ESTALE) if "1/score" in str(path) else stat(path, **more)  # noqa: E731
            patch.setattr(os, "stat", refuse)
        checkpoints = Checkpoints(tmp_path)
    assert "the score of checkpoint 1 cannot be read" in caplog.text
    for step in (4, 5, 6):
        checkpoints.save(step, small_state(step), tiny_config())
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps == [1, 2, 5, 6]


def _raise(code):
    raise OSError(code, os.strerror(code))


def test_the_error_for_a_directory_inside_a_run_names_the_run(trained, monkeypatch):
    with pytest.raises(
        UserError, match=rf"is not a run with checkpoints; use {re.escape(str(trained))}, which contains it, copy"
    ):
        Checkpoints(trained / "checkpoints" / "4", read_only=True)
    monkeypatch.setattr(os, "stat", lambda path, **_: _raise(errno.EACCES))
    with pytest.raises(OSError, match="Permission denied"):
        Checkpoints(trained, read_only=True)
