"""Ask a model about test pictures: the champion over HTTP, served for this, or an export through plain transformers."""

import base64
import json
import os
import urllib.request
from pathlib import Path

from PIL import Image

from minivlm.config import Config, ConfigError
from minivlm.data.images import read_image
from minivlm.data.samples import iter_rows, load_samples
from minivlm.data.settings import image_limits
from minivlm.inference.verify import verify_export
from minivlm.layout import samples_dir
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.serve.app import KEY_VARIABLE, check_port_free, start_server, stop_server

ASK_TIMEOUT_S = 60
VERIFIED_PICTURES = 8


def check_port(config: Config) -> None:
    """Raise ConfigError where `ask_champion` could not listen: better known before hours of training than after."""
    check_port_free(config.serve.host, config.serve.port)


def ask_champion(config: Config) -> str:
    """Question, answer and truth as one line."""
    samples = load_samples(samples_dir(config), split="test")
    sample = next((sample for sample in samples if len(sample.images) == 1), None)
    if sample is None:
        return "nothing asked: no test question has exactly one picture"
    question = sample.messages[0].content.replace(IMAGE_PLACEHOLDER, "").strip()
    url = start_server(config)
    try:
        reply = chat(url, config.tracking.model_name, question, Path(sample.images[0]))
    finally:
        stop_server()
    return f"{url} asked {question!r}: {reply!r} (truth: {sample.messages[1].content!r})"


def verify_with_test_pictures(config: Config, folder: Path) -> str:
    """Compare an export with plain transformers on questions about one picture each; returns what was compared.

    Where its projector is none of LLaVA's, the way over cached features is compared with that from the picture.

    Raises:
        CheckpointError: they differ.
        ConfigError: there is no such question.
    """
    asked: dict[str, tuple[Image.Image, str]] = {}
    for sample, _, _ in iter_rows(samples_dir(config), split="test"):
        question = sample.messages[0].content
        if len(sample.images) == 1 and question.startswith(IMAGE_PLACEHOLDER) and len(asked) < VERIFIED_PICTURES:
            picture, _ = read_image(Path(sample.images[0]), image_limits(config))
            asked.setdefault(sample.images[0], (picture, question.removeprefix(IMAGE_PLACEHOLDER).strip()))
    if not asked:
        raise ConfigError("Nothing to verify with: no test question has exactly one picture. Leave out --verify")
    found = verify_export(folder, list(asked.values()))
    if not found.is_stock:
        return (
            f"verified: {found.num_pictures} pictures, the same greedy texts from cached features as from the picture, "
            f"logits within {found.max_logit_difference:.1e}; plain transformers refuses the folder"
        )
    return (
        f"verified: {found.num_pictures} pictures, the same greedy texts as plain transformers, logits within "
        f"{found.max_logit_difference:.1e}"
    )


def chat(base_url: str, model: str, question: str, picture: Path) -> str:
    """One question about one picture, as the OpenAI API takes it; returns the answer's text."""
    kind = "png" if picture.suffix == ".png" else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    if key := os.environ.get(KEY_VARIABLE):
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"]
    return text
