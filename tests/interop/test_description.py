"""schemathesis asks a server what its description allows, and what it does not, and holds the answers to it."""

import os
import subprocess

import pytest
from conftest import running

SCHEMATHESIS = os.environ.get("SCHEMATHESIS")


@pytest.mark.skipif(not SCHEMATHESIS, reason="SCHEMATHESIS does not say where schemathesis is")
def test_every_answer_is_as_it_is_described(tmp_path_factory, tmp_path):
    with running(tmp_path_factory, "--set", "infer.max_tokens_default=4") as server:
        command = [SCHEMATHESIS, "run", f"{server.url}/openapi.json", "--max-examples", "10", "--seed", "1"]
        # What the description allows may still be refused: it cannot say that a conversation has to end in an answer,
        # that an adapter has to fit the base, or which tokens there are.
        command += ["--exclude-checks", "positive_data_acceptance", "--max-time", "200"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
