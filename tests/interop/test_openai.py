"""The openai client talks to a running server."""

import openai
import pytest
from conftest import ANSWER, DOMAIN, QUESTION


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none needed on this machine", max_retries=0)


def test_models_are_listed(client):
    names = {model.id for model in client.models.list()}
    assert {"base", "auto", DOMAIN} <= names


def test_a_completion_says_what_was_learned(client):
    for model in (DOMAIN, "auto"):
        answer = client.completions.create(model=model, prompt=QUESTION, temperature=0, max_tokens=24)
        assert answer.choices[0].text.strip() == ANSWER.strip()
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens > 0


def test_a_streamed_completion_is_the_same_text(client):
    pieces = client.completions.create(
        model=DOMAIN,
        prompt=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = list(pieces)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices).strip() == ANSWER.strip()
    assert pieces[-1].usage.completion_tokens > 0


def test_a_chat_answers_streamed_or_not(client):
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=DOMAIN, messages=messages, temperature=0, max_tokens=24)
    assert whole.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(
        model=DOMAIN, messages=messages, temperature=0, max_tokens=24, stream=True
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content


def test_mistakes_are_the_errors_of_the_client(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="no-such-domain", prompt="x", max_tokens=1)
    assert missing.value.body["message"]
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt="x", max_tokens=-1)
