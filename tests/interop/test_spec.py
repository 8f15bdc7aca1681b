"""What the server says of itself, held against the server: by schemathesis, and by promtool."""

import shutil
import subprocess

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="scripts/test-interop installs it")
from hypothesis import HealthCheck, settings  # noqa: E402

# Answers are cut short: it is their form that is looked at.
TOKENS_MAX = 4


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_request_is_answered_as_described(case):
    if isinstance(case.body, dict) and case.operation.path.endswith("completions"):
        for field in ("max_tokens", "max_completion_tokens", "n", "best_of"):
            if isinstance(case.body.get(field), int):
                case.body[field] = min(case.body[field], TOKENS_MAX)
        case.body.setdefault("max_tokens", TOKENS_MAX)
    # That a request is well formed does not make it sensible: a document takes one of three forms, and an
    # adapter has to exist.
    case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here: it comes with Prometheus")
def test_promtool_finds_nothing_but_the_prefix_of_vllm(server):
    page = server.call("/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    findings = (checked.stdout + checked.stderr).splitlines()
    # vLLM's names have a colon after the prefix, which promtool would keep for recording rules.
    assert [line for line in findings if line and not line.endswith("should not contain ':'")] == []
    for name in ("documents_live", "retention_loss", "train_tokens_total", "e2e_request_latency_seconds_bucket"):
        assert f"engram:{name}{{" in page or f"engram:{name} " in page, name
