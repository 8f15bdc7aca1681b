"""The golden chat renderings are what transformers makes of the same templates."""

import json

import pytest
from conftest import NANO, ROOT
from transformers import AutoTokenizer

GOLDEN = sorted((ROOT / "tests/golden/chat").glob("*.json"))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_transformers_renders_the_golden_conversations(file):
    golden = json.loads(file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.chat_template = golden["chat_template"]
    tokenizer.bos_token, tokenizer.eos_token = golden["bos_token"], golden["eos_token"]
    for case in golden["cases"]:
        ask = {"tokenize": False, "add_generation_prompt": case["add_generation_prompt"]}
        if case["text"] is None:
            with pytest.raises(Exception, match="take turns"):
                tokenizer.apply_chat_template(case["messages"], **ask)
        else:
            assert tokenizer.apply_chat_template(case["messages"], **ask) == case["text"]
