import json
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Marks all examples as slow, since each trains a network; they stay short because the mark is set here."""
    for item in items:
        if item.path.parent == EXAMPLES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _one_device(one_device):
    pass


@pytest.fixture
def logged(tmp_path):
    """Reads one metric from all training lines of the run in tmp_path."""

    def read(name):
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [line[name] for line in lines if line["kind"] == "train"]

    return read
