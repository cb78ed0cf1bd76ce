"""Fewer tokens than features, all the way: table, batch, loss, decoding, export, serving and its token counts."""

import asyncio
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minivlm.config import Config
from minivlm.data.chat import encode_chat, encode_prompt
from minivlm.data.collate import collate, pack_batch, unpack_batch
from minivlm.data.features import FeatureCache
from minivlm.data.images import ImageLimits, open_image
from minivlm.data.tokens import EncodedSample, TokenTable
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt, generate
from minivlm.model.image_tokens import PROJECTOR_SIZES as SIZES_OF_KIND
from minivlm.model.projector import describe_projector, pixel_shuffle
from minivlm.model.vlm import sequence_logps
from minivlm.schema import Message
from minivlm.serve.api import build_api
from minivlm.serve.chat import Served
from minivlm.serve.engine import Engine
from minivlm.train.initial import initial_model
from tests.tiny_export import NUM_IMAGE_TOKENS, PROJECTOR_SIZES, build_export, data_url, png
from tests.train_processes import make_toy

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=25_000_000, max_side=8192, max_aspect=20.0)
TOKENS = {"mlp2x_gelu": NUM_IMAGE_TOKENS, "pixel_shuffle": 1, "resampler": 3}
COLOURS = ("red", "blue", "green")
ROWS = [  # colours of the pictures, conversation
    (["red"], [Message("user", "<image>\nwhat is it?"), Message("assistant", "a red circle")]),
    (["blue", "red"], [Message("user", "<image><image> and now?"), Message("assistant", "two")]),
    ([], [Message("user", "yes or no"), Message("assistant", "no")]),
]


@pytest.fixture(scope="module", params=list(TOKENS))
def kind(request):
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return build_export(tmp_path_factory.mktemp("model"), projector=kind)


@pytest.fixture(scope="module")
def features(folder):
    """digest -> [P, D] bfloat16, the way of the cache; digests are numbers of COLOURS."""
    tower = load_export_tower(folder, batch_size=1)
    return tower.encode(tower.preprocess([open_image(png(colour), LIMITS) for colour in COLOURS]))


def digest(colour):
    return f"{COLOURS.index(colour):064x}"


@pytest.fixture(scope="module")
def export(folder):
    return load_export(folder)


@pytest.fixture
def table(export, tmp_path):
    samples = []
    for index, (colours, messages) in enumerate(ROWS):
        ids, labels = encode_chat(export.tokenizer, messages, export.num_image_tokens, num_images=len(colours))
        digests = tuple(digest(colour) for colour in colours)
        samples.append(EncodedSample(str(index), np.array(ids, np.int32), np.array(labels, np.int32), digests))
    return TokenTable.write(tmp_path / "table", samples)


def make_batch(export, table, features, rows):
    def get(digests):
        return features[[int(name, 16) for name in digests]]

    pad = export.tokenizer.pad_token_id
    batch = collate(table, rows, get, image_token_id=export.image_token_id, pad_token_id=pad)
    return unpack_batch(pack_batch(batch))


def test_a_sample_holds_as_many_placeholders_as_the_projector_gives(kind, export, table):
    assert export.num_image_tokens == TOKENS[kind]
    counts = [int((table[index].input_ids == export.image_token_id).sum()) for index in range(3)]
    assert counts == [TOKENS[kind], 2 * TOKENS[kind], 0]


def test_packed_samples_score_as_each_alone(export, table, features):
    with torch.no_grad():
        together = sequence_logps(export.vlm(make_batch(export, table, features, ((0, 1), (2,)))), 3)
        alone = [sequence_logps(export.vlm(make_batch(export, table, features, ((i,),))), 1)[0] for i in range(3)]
    assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-5)


def test_a_batch_without_pictures_reaches_the_projector(export, table, features):
    export.vlm(make_batch(export, table, features, ((2,),))).logps.sum().backward()
    gradients = [parameter.grad for parameter in export.vlm.projector.parameters()]
    export.vlm.zero_grad()
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_every_parameter_of_the_projector_learns(export, table, features):
    export.vlm(make_batch(export, table, features, ((0, 1), (2,)))).logps.sum().backward()
    silent = [name for name, p in export.vlm.projector.named_parameters() if not p.grad.abs().sum() > 0]
    export.vlm.zero_grad()
    # Both pictures are of one colour, so a single query may see the same everywhere; keys need two to compare.
    assert silent == []


def test_a_table_made_for_another_projector_is_refused(export, table, features):
    batch = make_batch(export, table, features, ((0,),))
    batch["input_ids"][0, 0] = export.image_token_id
    with pytest.raises(ValueError, match=f"for 1 pictures of {export.num_image_tokens} tokens.*Prepare again"):
        export.vlm(batch)


def test_a_stage_starts_from_a_projector_of_its_settings_fitted_to_its_pictures(kind, tmp_path):
    toy = make_toy(tmp_path)
    language = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = {"projector": kind, "language_model": language, **PROJECTOR_SIZES}
    config = Config.model_validate({"model": model, "clip": {"image_size_px": 32, "patch_size_px": 16}})
    projector = initial_model(replace(toy, initial_export=None, config=config)).projector
    assert describe_projector(projector) == (kind, {name: PROJECTOR_SIZES[name] for name in SIZES_OF_KIND[kind]})
    seen = FeatureCache.open(toy.features_dir).get(TokenTable.open(toy.train_table).digests).float()
    seen = pixel_shuffle(seen, 2) if kind == "pixel_shuffle" else seen
    assert float(projector.linear_1(seen).std()) == pytest.approx(1, abs=0.05)


def test_the_server_counts_and_answers_as_evaluation_does(kind, folder, export, features):
    question = [Message("user", "<image>\nwhat is it?")]
    ids = encode_prompt(export.tokenizer, question, TOKENS[kind], num_images=1)
    (answer,) = generate(
        export.vlm,
        [Prompt(ids, features[:1])],
        max_new_tokens=6,
        eos_token_id=export.tokenizer.eos_token_id,
    )
    engine = Engine(folder, limits=LIMITS, encode_precision="float32", device="cpu", max_requests=2, timeout_s=30.0)
    picture = {"type": "image_url", "image_url": {"url": data_url(png("red"))}}
    content = [picture, {"type": "text", "text": "what is it?"}]
    body = {"model": "minivlm", "max_tokens": 6, "messages": [{"role": "user", "content": content}]}

    async def send():
        transport = httpx.ASGITransport(build_api(engine, Served("minivlm", "1", max_new_tokens=6)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json=body)

    reply = asyncio.run(send()).json()
    engine.close()
    assert reply["usage"]["prompt_tokens"] == len(ids)
    text = export.tokenizer.decode(answer, skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == text
