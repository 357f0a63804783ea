"""What the tests share. The models are in tests/tiny.py; nothing here or there needs a network."""

import json
import os
import shutil
import tempfile

# both are read when huggingface_hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = HF_HOME = tempfile.mkdtemp(prefix="pifa-tests-")  # leave the user's caches alone

from pathlib import Path

import hypothesis
import pytest
import torch

import component.compress.pipeline
import PIFA
from tests import tiny

hypothesis.settings.register_profile("facts", derandomize=True, deadline=None, max_examples=40, database=None)
hypothesis.settings.load_profile("facts")
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels run on the GPU itself
torch.set_num_threads(1)  # for tiny tensors more are slower

# a calibration that a tiny model gets: short, and still more tokens than a Gram matrix has rows
SMALL = {"pruning_nsamples": 4, "reconstruct_nsamples": 4, "model_seq_len": 32, "DEV": "cpu"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: works on a real model, for minutes")


def pytest_unconfigure(config):
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture
def computed(monkeypatch) -> dict[int, torch.nn.Module]:
    """The layers that the driver of --mode m makes during the test, by index."""
    layers = {}

    def compress_layers(*given, **more):
        for index, layer in driver(*given, **more):
            layers[index] = layer
            yield index, layer

    driver = component.compress.pipeline.compress_layers
    monkeypatch.setattr(component.compress.pipeline, "compress_layers", compress_layers)
    return layers


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A LLaMA with grouped queries and tied embeddings."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny", tiny.build())


@pytest.fixture(scope="session")
def arguments(model_folder, text_file):
    """arguments(mode, flag=value, ...): a command line on the tiny model and the tiny text."""

    def make(mode: str, **changes) -> list[str]:
        return tiny.flags(mode, **{"model": model_folder, "dataset": text_file, **SMALL, **changes})

    return make


@pytest.fixture(scope="session")
def compressed(arguments, tmp_path_factory) -> Path:
    """A low-rank checkpoint of the tiny model at density 0.6. Not to be written to."""
    parent = tmp_path_factory.mktemp("lowrank")
    return Path(PIFA.run(arguments("m", density=0.6, save_path=parent))["path"])


@pytest.fixture(scope="session")
def pivoted(arguments, compressed, tmp_path_factory) -> Path:
    """The same, pivoted. Not to be written to."""
    parent = tmp_path_factory.mktemp("pivoted")
    return Path(PIFA.run(arguments("pifa", model_path=compressed, save_path=parent))["path"])


@pytest.fixture
def bad(capsys):
    """bad(argv, word, code=2): run the command, which has to fail with one line that contains `word`."""

    def check(argv: list[str], word: str, code: int = 2) -> None:
        assert PIFA.main([str(argument) for argument in argv]) == code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert lines[-1].startswith("PIFA.py: ") and word in lines[-1]
        assert sum(line.startswith("PIFA.py:") for line in lines) == 1
        assert "Traceback" not in err

    return check


@pytest.fixture
def good(capsys):
    """good(argv): run the command, which has to end well; returns the record, the last line of stdout."""

    def check(argv: list[str]) -> dict:
        assert PIFA.main([str(argument) for argument in argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1], parse_constant=pytest.fail)  # NaN is no JSON

    return check


@pytest.fixture
def instructions(tmp_path) -> Path:
    """Rows of instruction, input (of every second one) and output."""
    path = tmp_path / "tasks.jsonl"
    examples = [
        {"instruction": f"Say {word}.", "input": "aloud" * (number % 2), "output": f"{word} \u2028 {word}"}
        for number, word in enumerate(["one", "two", "three", "four", "five"])
    ]
    path.write_text("\n".join(json.dumps(example, ensure_ascii=False) for example in examples), encoding="utf-8")
    return path
