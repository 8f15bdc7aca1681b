"""llama.cpp's own converters take what Engram exports, and what they make of it says what was learned."""

import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from conftest import ANSWER, DOMAIN, ENGRAM, NANO, QUESTION

LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", ".venv-interop/llama.cpp")).resolve()

# The converter knows tokenizers by a list of hashes. Ours is not on it; it splits as SmolLM's does: digits one by
# one, the rest as GPT-2.
CONVERT = """
import runpy, sys
folder, script, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
runpy.run_path(folder + "/" + script, run_name="__main__")
"""


def convert(script, *arguments):
    command = [sys.executable, "-c", CONVERT, LLAMA_CPP, script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]


def said(model, **more):
    model = llama_cpp.Llama(model_path=str(model), n_ctx=256, n_threads=1, verbose=False, **more)
    return model(QUESTION, max_tokens=24, temperature=0)["choices"][0]["text"]


@pytest.fixture
def export(server):
    return [ENGRAM, "adapters", "--server", server.url, "export", DOMAIN]


def test_a_merged_model_is_converted_and_answers(export, tmp_path):
    whole, converted = tmp_path / "whole", tmp_path / "whole.gguf"
    subprocess.run([*export, "--merged", "--out", whole], check=True, timeout=60)
    convert("convert_hf_to_gguf.py", whole, "--outfile", converted, "--outtype", "f32")
    assert ANSWER.strip() in said(converted)


def test_an_adapter_is_converted_and_answers_on_its_base(export, tmp_path):
    adapter, converted, base = tmp_path / "adapter", tmp_path / "adapter.gguf", tmp_path / "base.gguf"
    subprocess.run([*export, "--out", adapter], check=True, timeout=60)
    convert("convert_hf_to_gguf.py", NANO, "--outfile", base, "--outtype", "f32")
    convert("convert_lora_to_gguf.py", adapter, "--base", NANO, "--outfile", converted, "--outtype", "f32")
    assert ANSWER.strip() not in said(base)
    assert ANSWER.strip() in said(base, lora_path=str(converted))
