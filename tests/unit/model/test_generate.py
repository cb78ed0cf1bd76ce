"""Decoding: the same answer for any batch size, streamed or not, sampled or greedy."""

import pytest
import torch

from minivlm.model.generate import Prompt, generate, stream_generate

EOS = 2


@pytest.fixture
def prompts(make_segment):
    made = [make_segment(seed, 2 + seed, 1, seed % 3) for seed in range(6)]
    return [Prompt(ids, features) for ids, _, features in made]


def greedy_without_cache(vlm, prompt, num_tokens, make_batch):
    """The slow truth: run the whole sequence again for every token."""
    ids = list(prompt.input_ids)
    for _ in range(num_tokens):
        batch = make_batch([[(ids, [-100] * len(ids), prompt.image_features)]])
        embeds = vlm.embed(batch["input_ids"], batch["image_features"], batch["image_index"])
        ids.append(int(vlm.language_model(inputs_embeds=embeds).logits[0, -1].argmax()))
    return ids[len(prompt.input_ids) :]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_greedy_is_the_repeated_full_forward(make_vlm, make_batch, prompts, architecture):
    vlm = make_vlm(architecture)
    answers = generate(vlm, prompts, max_new_tokens=40, eos_token_id=-1)
    with torch.no_grad():
        assert answers[2] == greedy_without_cache(vlm, prompts[2], 40, make_batch)
        assert answers[0][:5] == greedy_without_cache(vlm, prompts[0], 5, make_batch)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_size_never_changes_answers(make_vlm, prompts, temperature):
    vlm = make_vlm()
    settings = {"max_new_tokens": 30, "eos_token_id": EOS, "temperature": temperature, "top_k": 20, "seed": 3}
    together = generate(vlm, prompts, **settings)
    numbered = [Prompt(prompt.input_ids, prompt.image_features, row) for row, prompt in enumerate(prompts)]
    alone = [generate(vlm, [prompt], **settings)[0] for prompt in numbered]
    assert alone == together
    assert generate(vlm, numbered[4:1:-1], **settings) == together[4:1:-1]


def test_rows_stop_at_eos_and_the_others_go_on(make_vlm, prompts):
    vlm = make_vlm()
    free = generate(vlm, prompts, max_new_tokens=20, eos_token_id=-1)
    lengths = set()
    for eos in {token for row in free for token in row}:  # as each ends other rows, other rows leave the batch
        expected = [row[: row.index(eos)] if eos in row else row for row in free]
        assert generate(vlm, prompts, max_new_tokens=20, eos_token_id=eos) == expected
        lengths.add(tuple(len(row) for row in expected))
    assert len(lengths) > 5


def test_stream_gives_the_same_tokens(make_vlm, prompts):
    vlm = make_vlm()
    settings = {"max_new_tokens": 12, "eos_token_id": EOS, "temperature": 0.7, "seed": 1}
    assert list(stream_generate(vlm, prompts[3], **settings)) == generate(vlm, [prompts[3]], **settings)[0]


def test_samples_follow_the_distribution(make_vlm, prompts):
    vlm = make_vlm()
    with torch.no_grad():
        embeds = vlm.embed(torch.tensor([prompts[0].input_ids]), prompts[0].image_features, torch.arange(0))
        expected = (vlm.language_model(inputs_embeds=embeds).logits[0, -1] / 0.5).softmax(-1)
    same = [prompts[0]] * 4000
    drawn = generate(vlm, same, max_new_tokens=1, eos_token_id=-1, temperature=0.5)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected)) / 4000
    # Total variation of 4000 exact draws from 320 outcomes is about 0.5 * sum sqrt(2 p / (pi n)) < 0.12.
    assert (counts - expected).abs().sum() / 2 < 0.15


def test_top_k_one_is_greedy_and_seeds_differ(make_vlm, prompts):
    vlm = make_vlm()
    greedy = generate(vlm, prompts, max_new_tokens=6, eos_token_id=-1)
    assert generate(vlm, prompts, max_new_tokens=6, eos_token_id=-1, temperature=1.0, top_k=1) == greedy
    one, two = (generate(vlm, prompts, max_new_tokens=6, eos_token_id=-1, temperature=1.0, seed=s) for s in (1, 2))
    assert one != two


def test_no_prompts_no_answers(make_vlm):
    assert generate(make_vlm(), [], max_new_tokens=4, eos_token_id=EOS) == []


def test_empty_prompt_is_refused(make_vlm):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(make_vlm(), [Prompt([], torch.zeros(0, 5, 32))], max_new_tokens=4, eos_token_id=EOS)


@pytest.fixture
def doubtful(make_vlm):
    """A model whose tokens come in pairs that rounding can swap: their output rows differ in the last bits."""
    vlm = make_vlm()
    head = vlm.language_model.get_output_embeddings()
    with torch.no_grad():
        weight = head.weight.detach().clone()
        weight[1::2] = weight[::2] * (1 + 2e-7 * torch.randint(-1, 2, weight[::2].shape).float())
        head.weight = torch.nn.Parameter(weight)
    return vlm


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 20}])
def test_what_rounding_could_decide_is_the_same_in_any_batch(doubtful, prompts, settings):
    numbered = [Prompt(prompt.input_ids, prompt.image_features, row) for row, prompt in enumerate(prompts)]
    settings = {"max_new_tokens": 8, "eos_token_id": EOS} | settings
    together = generate(doubtful, numbered, **settings)
    for size in (1, 4):
        parts = [numbered[start : start + size] for start in range(0, len(numbered), size)]
        assert [row for part in parts for row in generate(doubtful, part, **settings)] == together
    assert generate(doubtful, numbered[::-1], **settings) == together[::-1]


def test_a_placeholder_that_the_model_wrote_is_a_token_like_any_other(doubtful, prompts):
    settings = {"max_new_tokens": 60, "eos_token_id": -1, "temperature": 3.0, "seed": 2}
    numbered = [Prompt(prompt.input_ids, prompt.image_features, row) for row, prompt in enumerate(prompts)]
    together = generate(doubtful, numbered, **settings)
    row = next(row for row, ids in enumerate(together) if doubtful.image_token_id in ids[:50])
    assert generate(doubtful, [numbered[row]], **settings) == [together[row]]
