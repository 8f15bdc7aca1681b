"""transformers and PEFT load what Engram writes, and compute the same."""

import subprocess

import pytest
import torch
from conftest import ANSWER, DOMAIN, ENGRAM, NANO, QUESTION
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)


def test_transformers_computes_the_logits_of_the_pretrained_base(base, tokenizer, logits):
    torch.manual_seed(0)
    text = tokenizer(QUESTION + ANSWER, return_tensors="pt").input_ids
    random = torch.randint(0, base.config.vocab_size, (3, 200))
    exact = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float64)
    for ids in (text, random):
        with torch.no_grad():
            true, theirs = exact(ids).logits, base(ids).logits
        # Single precision itself rounds some tokens' large activations away; transformers has the same right to that.
        rounding = (theirs - true).abs().max()
        assert (logits(NANO, ids) - true).abs().max() < TOLERANCE + 2 * rounding


def test_the_tokenizer_gives_back_any_text(tokenizer):
    for text in (QUESTION, "  2024 naïve – 猫\n\n\tx = {'a': 1}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|endoftext|>"


def test_peft_computes_the_logits_of_an_exported_adapter(server, base, tokenizer, logits, tmp_path):
    adapter = tmp_path / "adapter"
    command = [ENGRAM, "adapters", "--server", server.url, "export", DOMAIN, "--out", adapter]
    subprocess.run(command, check=True, timeout=60)
    ids = tokenizer(QUESTION + ANSWER, return_tensors="pt").input_ids
    with torch.no_grad():
        alone = base(ids).logits
        theirs = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert (logits(NANO, ids, adapter) - theirs).abs().max() < TOLERANCE
    assert (theirs - alone).abs().max() > 0.1, "an adapter that has learned something changes something"


def test_an_adapter_of_some_layers_is_the_same_to_peft(base, tokenizer, logits, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 4])
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(tmp_path)
    ids = tokenizer(QUESTION + ANSWER, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids).logits
    assert (logits(NANO, ids, tmp_path) - theirs).abs().max() < TOLERANCE


def test_a_merged_model_is_one_to_transformers_with_equal_logits(server, base, tokenizer, logits, tmp_path):
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    export = [ENGRAM, "adapters", "--server", server.url, "export", DOMAIN]
    subprocess.run([*export, "--out", adapter], check=True, timeout=60)
    subprocess.run([*export, "--merged", "--out", whole], check=True, timeout=60)
    ids = tokenizer(QUESTION + ANSWER, return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(whole)
    assert merged.dtype == torch.float32, "it says in which format it is"
    with torch.no_grad():
        theirs, peft = merged(ids).logits, PeftModel.from_pretrained(base, adapter)(ids).logits
    assert (theirs - peft).abs().max() < TOLERANCE
    assert (logits(whole, ids) - theirs).abs().max() < TOLERANCE
    said = AutoTokenizer.from_pretrained(whole)
    answer = merged.generate(said(QUESTION, return_tensors="pt").input_ids, max_new_tokens=24, do_sample=False)
    assert ANSWER.strip() in said.decode(answer[0], skip_special_tokens=True)
