"""The openai client talks to a running server."""

import json
from typing import Literal

import openai
import pydantic
import pytest
from conftest import ANSWER, DOMAIN, QUESTION, wait_for


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


def test_n_choices_are_those_of_following_seeds(client):
    ask = {"model": "base", "prompt": "The old house", "temperature": 1, "max_tokens": 8}
    answer = client.completions.create(**ask, n=3, seed=11)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        alone = client.completions.create(**ask, seed=11 + choice.index)
        assert alone.choices[0].text == choice.text
        assert alone.usage.prompt_tokens == answer.usage.prompt_tokens
    assert 3 <= answer.usage.completion_tokens <= 3 * 8
    streamed = {index: "" for index in range(3)}
    for piece in client.completions.create(**ask, n=3, seed=11, stream=True):
        for choice in piece.choices:
            streamed[choice.index] += choice.text
    assert streamed == {choice.index: choice.text for choice in answer.choices}


def test_a_completion_tells_the_logprobs_of_its_tokens(client):
    answer = client.completions.create(
        model=DOMAIN, prompt=QUESTION, temperature=0, max_tokens=24, logprobs=2
    )
    text, told = answer.choices[0].text, answer.choices[0].logprobs
    assert "".join(told.tokens) == text
    assert all(text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        # The choice is greedy, so nothing is likelier than what was chosen.
        assert logprob <= 0 and top[token] == logprob == max(top.values())


def test_a_chat_tells_the_logprobs_of_its_tokens_streamed_or_not(client):
    ask = {"model": DOMAIN, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    ask |= {"max_tokens": 24, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**ask).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].logprob == token.logprob
    streamed = []
    for piece in client.chat.completions.create(**ask, stream=True):
        if piece.choices and piece.choices[0].logprobs:
            streamed += piece.choices[0].logprobs.content
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in tokens]


def test_a_bias_forces_and_bans_tokens(client):
    ask = {"model": "base", "prompt": "The old house", "temperature": 0, "max_tokens": 4, "logprobs": 1}
    forced = client.completions.create(**ask, logit_bias={"300": 100}).choices[0].logprobs
    assert len(forced.tokens) == 4 and len(set(forced.tokens)) == 1
    banned = client.completions.create(**ask, logit_bias={"300": -100}).choices[0].logprobs
    assert forced.tokens[0] not in banned.tokens


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    name: str = pydantic.Field(max_length=12)


class Household(pydantic.BaseModel):
    street: Literal["Höhenweg", "Quai d'Orsay"]
    number: int = pydantic.Field(ge=1, le=999)
    pets: list[Pet] = pydantic.Field(max_length=2)
    note: str | None = pydantic.Field(max_length=20)


CHAT = {"model": "base", "messages": [{"role": "user", "content": "Who lives there?"}], "max_tokens": 300}


def test_a_chat_is_parsed_into_the_type_that_was_asked_for(client):
    answers = []
    for seed in range(8):
        answer = client.chat.completions.parse(**CHAT, response_format=Household, temperature=1, seed=seed)
        choice = answer.choices[0]
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Household)
        answers.append(choice.message.content)
    assert len(set(answers)) > 1
    with client.chat.completions.stream(**CHAT, response_format=Household, temperature=1, seed=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == answers[0]
    assert isinstance(final.choices[0].message.parsed, Household)
    # What is cut off is no answer of that type, and the client says so.
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**CHAT | {"max_tokens": 3}, response_format=Household)


def test_a_chat_follows_a_schema_or_is_any_object(client):
    schema = {"type": "object", "properties": {"z": {"type": "boolean"}, "a": {"enum": [1, None]}}}
    schema |= {"required": ["z", "a"], "additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**CHAT, response_format=named, n=3, seed=1, logprobs=True)
    for choice in answer.choices:
        assert list(json.loads(choice.message.content)) == ["z", "a"] and choice.finish_reason == "stop"
        assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    whatever = client.chat.completions.create(**CHAT, response_format={"type": "json_object"}, temperature=0)
    assert whatever.choices[0].message.content.startswith("{")
    for mistake in ({"type": "xml"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**CHAT, response_format=mistake)
        assert refused.value.param.startswith("response_format")


def test_penalties_and_the_additions_of_vllm_are_taken(client):
    ask = {"model": "base", "prompt": "The old house", "temperature": 0.8, "seed": 5, "max_tokens": 8}
    more = {"min_p": 0.05, "top_k": 40, "repetition_penalty": 1.2}
    answer = client.completions.create(**ask, presence_penalty=0.5, frequency_penalty=-0.5, extra_body=more)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_mistakes_are_the_errors_of_the_client(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="no-such-domain", prompt="x", max_tokens=1)
    assert missing.value.body["message"]
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt="x", max_tokens=-1)
    for mistake in ({"n": 17}, {"logit_bias": {"999999": 1}}, {"logprobs": 21}, {"presence_penalty": 3}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="base", prompt="x", max_tokens=1, **mistake)
        assert refused.value.param == next(iter(mistake))


def test_each_generation_is_a_model(client, server):
    current = client.models.retrieve(DOMAIN).generation
    named = client.models.retrieve(f"{DOMAIN}@{current}")
    assert named.root == client.models.retrieve("base").root and named.parent == "base"
    answer = client.completions.create(model=named.id, prompt=QUESTION, temperature=0, max_tokens=24)
    assert answer.choices[0].text.strip() == ANSWER.strip()


def test_tokens_are_counted_as_they_are_billed(client, server):
    told = server.call("/tokenize", {"prompt": QUESTION})
    answer = client.completions.create(model="base", prompt=QUESTION, max_tokens=1)
    assert told["count"] == len(told["tokens"]) == answer.usage.prompt_tokens
    assert server.call("/detokenize", {"tokens": told["tokens"]})["prompt"].strip() == QUESTION
    messages = [{"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="base", messages=messages, max_tokens=1)
    assert server.call("/tokenize", {"messages": messages})["count"] == chat.usage.prompt_tokens


def test_an_answer_ends_when_its_client_leaves(client, server):
    def running():
        page = server.call("/metrics")
        return int(next(line.split()[-1] for line in page.splitlines() if line.startswith("engram:num_requests_running")))

    # Enough to be busy for long.
    ask = {"model": "base", "prompt": "The old house", "max_tokens": 400, "n": 4, "stream": True}
    stream = client.completions.create(**ask)
    next(iter(stream))
    assert running() == 1
    stream.close()
    wait_for("given up", lambda: running() == 0, 2)


def test_embeddings_are_the_same_packed_or_not_and_nearest_to_their_like(client):
    texts = ["The ferry leaves at dawn.", "The ferry leaves at dusk.", "def area(width): return width * width"]
    vectors = [item.embedding for item in client.embeddings.create(model="base", input=texts).data]
    plain = client.embeddings.create(model="base", input=texts, encoding_format="float")
    assert [item.embedding for item in plain.data] == vectors
    assert plain.usage.total_tokens > 0

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert abs(cosine(vectors[0], vectors[0]) - 1) < 1e-4
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="auto", input="x")
    assert refused.value.param == "model"
