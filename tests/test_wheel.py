"""The wheel, installed into an environment of its own and used from another directory."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pspnet_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "pspnet_jax", "configs")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, env=settings)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the repository, in which the build leaves its files."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / "source" / part)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    done = run(sys.executable, "-m", "pip", "wheel", *options, folder / "source", folder=folder)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def commands(wheel) -> Path:
    """The commands of an environment with the wheel, and with the packages that it requires from this one."""
    environment = wheel.parent / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, folder=wheel.parent).returncode == 0
    python = environment / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=wheel.parent)
    assert done.returncode == 0, done.stderr
    [packages] = (environment / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # without their own .pth files
    return environment / "bin"


def test_the_wheel_has_all_files_of_the_package(wheel):
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path for suffix in ("py", "txt", "typed", "html", "css", "js") for path in (ROOT / "pspnet_jax").rglob(f"*.{suffix}")
    }
    recipes = {f"pspnet_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.py")}
    assert packaged == {path.relative_to(ROOT).as_posix() for path in files} | recipes


def test_the_command_and_the_recipes_are_found_from_another_directory(commands, tmp_path):
    assert run(commands / "pspnet", "--version", folder=tmp_path).stdout == f"{pspnet_jax.__version__}\n"
    code = "import pspnet_jax; from pspnet_jax.config import load_recipe as recipe; print(pspnet_jax.__file__); "
    names = ("cityscapes", "ade20k:101", "configs/voc2012.py:50", "ablations/pooling:none")
    code += f"print(*(recipe(name).name for name in {names}))"
    place, found = run(commands / "python", "-c", code, folder=tmp_path).stdout.splitlines()
    assert place.startswith(str(commands.parent))
    assert found == "cityscapes_101 ade20k_101 voc2012_50 ade20k_bins-none"


def test_checking_a_dataset_and_an_unknown_recipe(commands, tmp_path):
    done = run(commands / "pspnet", "--mode=check", "--config=quickstart", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "runs/quickstart/check").iterdir()} >= {"train_images.png", "train_classes.png"}
    done = run(commands / "pspnet", "--config=citiscapes", folder=tmp_path)
    assert done.returncode == 1
    folder = ROOT / "configs"
    names = [path.stem for path in sorted(folder.glob("*.py"))]
    recipes = ", ".join(names + [f"ablations/{path.stem}" for path in sorted(folder.glob("ablations/*.py"))])
    assert done.stderr == f"error: --config citiscapes: no such file or recipe; the recipes are {recipes}\n"
