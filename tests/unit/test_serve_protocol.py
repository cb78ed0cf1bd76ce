"""What a request may say, and how it is refused."""

import base64
import json

import pytest
from pydantic import ValidationError

from minivlm.data.chat import turn_content
from minivlm.serve.errors import ApiError, from_validation
from minivlm.serve.media import decode_data_url
from minivlm.serve.protocol import ChatRequest

USER = {"role": "user", "content": "hi"}


def parse(**fields):
    return ChatRequest.model_validate_json(json.dumps({"model": "minivlm", "messages": [USER], **fields}))


def refusal(**fields):
    with pytest.raises(ValidationError) as caught:
        parse(**fields)
    return from_validation(caught.value)


def test_text_and_a_list_of_text_parts_are_the_same():
    parts = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    assert parse(messages=[parts]).messages[0].text == parse().messages[0].text == "hi"


def test_max_completion_tokens_wins_over_the_older_name():
    assert parse(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert parse(max_tokens=5).token_limit == 5


def test_known_fields_without_effect_are_ignored():
    assert parse(user="u1", metadata={"a": "b"}, top_p=1, tools=None, response_format={"type": "text"}).n == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temprature": 1}, "temprature"),
        ({"top_p": 0.5}, "top_p"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 5, "temperature": 1.0}, "n"),
        ({"n": 2}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": "x" * 32_001}]}, "32001"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "video_url"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"stream_options": {"include_usage": True}}, "stream"),
    ],
)
def test_bad_values_are_refused_by_name(fields, named):
    error = refusal(**fields)
    assert error.status == 400
    assert named in f"{error.param} {error.message}"


def test_a_fifth_picture_is_refused():
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}] * 5
    assert "at most 4" in refusal(messages=[{"role": "user", "content": parts}]).message


def test_a_refusal_is_short_and_repeats_nothing_that_was_sent():
    secret = "s3cret" * 1000
    error = refusal(messages=[{"role": secret, "content": secret}] * 200)
    assert len(json.dumps(error.body())) < 6000
    assert "s3cret" not in json.dumps(error.body())


def test_a_long_list_of_wrong_parts_is_refused_at_its_first():
    with pytest.raises(ValidationError) as caught:
        parse(messages=[{"role": "user", "content": [0] * 30_000}])
    assert caught.value.error_count() == 1


def test_deep_nesting_is_refused_like_any_bad_json():
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(b"[" * 100_000)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(rb'{"model": "minivlm", "messages": [{"role": "user", "content": "\ud800"}]}')
    json.dumps(from_validation(caught.value).body()).encode()


def test_pictures_come_first_and_written_placeholders_are_text():
    assert turn_content("what is <image>?", 2) == "<image>\n<image>\nwhat is < image>?"


def test_data_urls_become_bytes():
    url = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    assert decode_data_url(url, max_bytes=100) == b"picture"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,",
        "",
    ],
)
def test_anything_but_a_picture_in_the_request_is_refused(url):
    with pytest.raises(ApiError) as caught:
        decode_data_url(url, max_bytes=1000)
    assert caught.value.status == 400


def test_a_picture_above_the_limit_is_refused_before_it_is_decoded():
    with pytest.raises(ApiError) as caught:
        decode_data_url("data:image/png;base64," + "@" * 4000, max_bytes=1000)
    assert caught.value.status == 422
