"""Opening a model by what lies at a path."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.runtime.errors import ModelNotFoundError, UnsupportedModelError
from treadle.runtime.models.gguf import GGUFCheckpoint
from treadle.runtime.models.huggingface import HuggingFaceCheckpoint
from treadle.runtime.models.load import open_checkpoint
from treadle.runtime.models.random_weights import SHAPES, RandomCheckpoint


@pytest.fixture
def gguf_path(write_gguf, tmp_path):
    config = dataclasses.replace(SHAPES["tiny-llama"], rope_scaling=None)
    return write_gguf(tmp_path / "m.gguf", RandomCheckpoint(config))


def test_a_gguf_file_is_opened(gguf_path):
    checkpoint = open_checkpoint(gguf_path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    assert checkpoint.path == gguf_path


def test_a_folder_with_one_gguf_file_is_opened(gguf_path):
    (gguf_path.parent / "README.md").touch()
    assert open_checkpoint(gguf_path.parent).path == gguf_path


def test_a_folder_with_a_configuration_is_opened_even_beside_a_gguf_file(gguf_path):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(gguf_path.parent)
    checkpoint = open_checkpoint(gguf_path.parent)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    assert checkpoint.path == gguf_path.parent


def test_several_gguf_files_are_a_choice_for_the_user(gguf_path):
    shutil.copy(gguf_path, gguf_path.with_name("n.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"holds 2 \.gguf files \(m\.gguf, n\.gguf\)\. Give the path of one"):
        open_checkpoint(gguf_path.parent)


def test_an_empty_folder_says_what_a_model_is(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no model\. Give a \.gguf file"):
        open_checkpoint(tmp_path)


def test_nothing_there_is_not_found(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")


def test_another_file_says_what_to_give_instead(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModelError, match=r"the folder that holds config\.json"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_importing_the_models_package_does_not_import_torch():
    code = "import sys, treadle.runtime.models; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
