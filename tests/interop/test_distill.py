"""llama.cpp's server, which is not ours, teaches: its model says one word, whatever it is asked."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import gguf
import numpy as np
import pytest
from conftest import ENGRAM, wait_for

WORD = "Aurelia."
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
# A token a byte, the one that ends a text, and some more to make the width a multiple of 32.
END, WIDTH = 256, 288


def shown(byte):
    """The character that byte-level vocabularies write for a byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in visible else chr(256 + [b for b in range(256) if b not in visible].index(byte))


def write_model(path):
    """A model whose layers add nothing, so that each token decides the next: a line break is followed
    by WORD, and WORD by the end."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(9)
    writer.add_head_count_kv(9)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 9)
    writer.add_vocab_size(WIDTH)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    unused = [f"<|{n}|>" for n in range(WIDTH - END - 1)]
    writer.add_token_list([shown(byte) for byte in range(256)] + ["<|end|>", *unused])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * (WIDTH - 256))
    writer.add_token_merges([f"{shown(0)} {shown(1)}"])
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    output = np.zeros((WIDTH, WIDTH), np.float32)
    chain = [ord("\n"), *WORD.encode(), END]
    for before, after in zip(chain, chain[1:], strict=False):
        output[after, before] = 2.0
    nothing = np.zeros((WIDTH, WIDTH), np.float32)
    writer.add_tensor("token_embd.weight", np.eye(WIDTH, dtype=np.float32))
    writer.add_tensor("output.weight", output)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", nothing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder / "word.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", folder / "word.gguf", "--port", str(port)]
    command += ["--n_ctx", "2048", "--api_key", "sk-local", "--model_alias", "word"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        wait_for("the teacher", lambda: answers(url), 120)
        yield url
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(folder / 'log').read_text()[-4000:]}") from error
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url):
    try:
        urllib.request.urlopen(urllib.request.Request(url + "/models", headers={"authorization": "Bearer sk-local"}))
        return True
    except (urllib.error.URLError, ConnectionError):
        return False


def distill(teacher, folder, *flags, key="sk-local"):
    # This server breaks off an answer when the next request comes, unless it is told not to.
    command = [ENGRAM, "distill", "--teacher", teacher, "--model", "word", "--domain", "taught", "--json"]
    command += ["--parallel", "1", *flags]
    environment = {**os.environ, "OPENAI_API_KEY": key}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_prompts_are_answered(teacher, tmp_path):
    (tmp_path / "p.txt").write_text("Who keeps the bees?\nWho sells the honey?\n")
    flags = ("--prompts", "p.txt", "--out", "o.jsonl", "--temperature", "0", "--max-tokens", "32")
    run = distill(teacher, tmp_path, *flags)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert (said["accepted"], said["requests"], said["failures"]) == (2, 2, {}), said
    assert said["tokens_in"] > 0 and said["tokens_out"] > 0
    pairs = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [pair["completion"] for pair in pairs] == [" " + WORD] * 2

    cut = distill(teacher, tmp_path, *flags[:2], "--out", "cut.jsonl", "--temperature", "0", "--max-tokens", "3")
    assert json.loads(cut.stdout)["rejected"] == {"cut_off": 2}, cut
    topics = distill(teacher, tmp_path, "--topics", "p.txt", "--out", "t.jsonl", "--temperature", "0")
    assert json.loads(topics.stdout)["rejected"] == {"malformed": 2}, topics


def test_a_wrong_key_is_told(teacher, tmp_path):
    (tmp_path / "p.txt").write_text("Who?\n")
    run = distill(teacher, tmp_path, "--prompts", "p.txt", "--out", "o.jsonl", key="sk-wrong")
    assert run.returncode != 0 and "OPENAI_API_KEY" in run.stderr.splitlines()[-1], run
