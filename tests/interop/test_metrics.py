"""What the server counts, held against promtool."""

import shutil
import subprocess

import pytest


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here: it comes with Prometheus")
def test_promtool_finds_nothing_but_the_prefix_of_vllm(server):
    # Answers are counted once one is given.
    server.call("/v1/completions", {"model": "base", "prompt": "The old house", "max_tokens": 2})
    page = server.call("/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    findings = (checked.stdout + checked.stderr).splitlines()
    # vLLM's names have a colon after the prefix, which promtool would keep for recording rules.
    assert [line for line in findings if line and not line.endswith("should not contain ':'")] == []
    for name in ("documents_live", "retention_loss", "train_tokens_total", "e2e_request_latency_seconds_bucket"):
        assert f"engram:{name}{{" in page or f"engram:{name} " in page, name
