"""The endpoint on real Ray Serve with a champion from a real registry: OpenAI's client, and the page in a browser."""

import socket
import tempfile

import httpx
import openai
import pytest
import ray

from minivlm.config import Config, ConfigError, load_config
from minivlm.serve.app import check_port_free, start_server, stop_server
from minivlm.tracking.client import TrackingError
from minivlm.tracking.registry import make_champion, register_candidate
from minivlm.tracking.runs import start_run
from tests.browser import chromium
from tests.tiny_export import build_export, data_url, png

pytestmark = pytest.mark.cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    settings = home / "settings.yaml"
    settings.write_text(f"storage_path: {home}\nserve: {{port: {free_port()}, max_new_tokens: 16}}\n")
    return load_config(settings)


@pytest.fixture(scope="module")
def base_url(config: Config, tmp_path_factory):
    export = build_export(tmp_path_factory.mktemp("model"))
    run = start_run(config, "tiny")
    version = register_candidate(config, export, {"eval/macro/accuracy": 0.5}, "# tiny", run, questions="q")
    assert make_champion(config, version, instead_of=None)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 1024 * 1024,
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(prefix="ray-"),  # short: socket paths end at 107 characters
    )
    try:
        yield start_server(config)
        stop_server()
    finally:
        ray.shutdown()


@pytest.fixture
def client(base_url):
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0)


def question(text="what is this?"):
    picture = {"type": "image_url", "image_url": {"url": data_url(png())}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, picture]}]


def test_the_openai_client_chats_about_a_picture(client):
    answer = client.chat.completions.create(model="minivlm", messages=question())
    assert answer.choices[0].message.content
    assert answer.system_fingerprint == "minivlm-1"
    assert answer.usage.completion_tokens <= 16


def test_the_openai_client_streams_the_same_answer(client):
    whole = client.chat.completions.create(model="minivlm", messages=question())
    chunks = list(client.chat.completions.create(model="minivlm", messages=question(), stream=True))
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_the_openai_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["minivlm"]


def test_a_wrong_model_is_a_not_found_error_that_names_the_right_one(client):
    with pytest.raises(openai.NotFoundError, match="ask for `minivlm`"):
        client.chat.completions.create(model="gpt-4", messages=question())


def test_a_broken_picture_is_an_unprocessable_entity_error(client):
    part = {"type": "image_url", "image_url": {"url": data_url(b"<html>")}}
    with pytest.raises(openai.UnprocessableEntityError, match="picture 1 was refused"):
        client.chat.completions.create(model="minivlm", messages=[{"role": "user", "content": [part]}])


def test_hanging_up_frees_every_place(config, base_url, client):
    body = {"model": "minivlm", "messages": question(), "stream": True, "max_tokens": 200}
    for _ in range(config.serve.max_ongoing_requests + config.serve.max_queued_requests + 1):
        with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body) as reply:
            assert reply.status_code == 200
            next(reply.iter_lines())
    assert client.chat.completions.create(model="minivlm", messages=question()).choices


def test_an_occupied_port_is_named_before_serve_starts_there(base_url, config):
    with pytest.raises(ConfigError, match=f"serve.port {config.serve.port}"):
        check_port_free(config.serve.host, config.serve.port)


def test_without_a_champion_the_error_says_what_to_run(config, base_url, tmp_path):
    empty = config.model_copy(update={"storage_path": tmp_path})
    with pytest.raises(TrackingError, match=r"python -m jobs\.pipeline"):
        start_server(empty)
    assert httpx.get(f"{base_url}/ready").status_code == 200


def test_the_page_streams_an_answer_in_a_browser(base_url, client):
    with chromium() as browser:
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(base_url)
        page.get_by_label("Choose pictures").set_input_files(
            {"name": "red.png", "mimeType": "image/png", "buffer": png()}
        )
        page.get_by_alt_text("red.png").wait_for()
        text = "<img src=x onerror=alert(1)> what is this?"
        page.get_by_label("Your question").fill(text)
        page.get_by_role("button", name="Ask").click()
        answer = page.locator("#log .assistant:not(.busy) span").first
        answer.wait_for()
        expected = client.chat.completions.create(model="minivlm", messages=question(text)).choices[0].message.content
        assert answer.text_content() == expected
        assert page.locator("#log .user img").count() == 1
        assert problems == []
