"""MiniMind's checkpoints: random weights in each published layout must compute the same in a stock class.

`forward` below is the published computation written out, once with each of the two rotations.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

from minivlm.model.minimind import Heads, from_state_dict, load_minimind

EARLY = {
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo", "gate": "feed_forward.w1",
    "down": "feed_forward.w2", "up": "feed_forward.w3", "norm1": "attention_norm", "norm2": "ffn_norm",
    "embed": "tok_embeddings", "head": "output", "norm": "norm", "layer": "layers.",
}  # fmt: skip
LATER = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "down": "mlp.down_proj", "up": "mlp.up_proj", "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm", "embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm",
    "layer": "model.layers.", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip


def state_dict(names, *, hidden, layers, heads, key_heads, head_dim, inner, vocab, has_norms=False, std=0.1):
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * std if std else torch.zeros(shape)

    def scale(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    embedding = matrix(vocab, hidden)
    weights = {f"{names['embed']}.weight": embedding, f"{names['norm']}.weight": scale(hidden)}
    weights[f"{names['head']}.weight"] = embedding  # tied, and saved twice
    for layer in range(layers):
        parts = {
            "q": matrix(heads * head_dim, hidden), "k": matrix(key_heads * head_dim, hidden),
            "v": matrix(key_heads * head_dim, hidden), "o": matrix(hidden, heads * head_dim),
            "gate": matrix(inner, hidden), "up": matrix(inner, hidden), "down": matrix(hidden, inner),
            "norm1": scale(hidden), "norm2": scale(hidden),
        }  # fmt: skip
        if has_norms:
            parts |= {"q_norm": scale(head_dim), "k_norm": scale(head_dim)}
        weights |= {f"{names['layer']}{layer}.{names[part]}.weight": value for part, value in parts.items()}
        if names is EARLY:
            weights[f"layers.{layer}.attention.mask"] = torch.zeros(1, 1, 4, 4)
    return weights


def rotate(x: Tensor, theta: float, *, pairs: bool) -> Tensor:
    """[T, H, D], position t turns the i-th plane by t / theta^(2i/D)."""
    length, _, size = x.shape
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, size, 2).float() / size))[:, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., : size // 2], x[..., size // 2 :])
    turned = first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()
    return torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)


def forward(weights, names, ids, *, heads, head_dim, theta, eps, pairs):
    """Logits [T, V]."""
    x = weights[f"{names['embed']}.weight"][ids]
    count = 1 + max(int(name.removeprefix(names["layer"]).split(".")[0]) for name in weights if "layers." in name)
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for layer in range(count):

        def of(part: str, layer: int = layer) -> Tensor | None:
            return weights.get(f"{names['layer']}{layer}.{names.get(part)}.weight")

        h = rms_norm(x, x.shape[-1:], of("norm1"), eps)
        q, k, v = ((h @ of(part).T).view(len(ids), -1, head_dim) for part in "qkv")
        if of("q_norm") is not None:
            q, k = rms_norm(q, (head_dim,), of("q_norm"), eps), rms_norm(k, (head_dim,), of("k_norm"), eps)
        q, k = rotate(q, theta, pairs=pairs), rotate(k, theta, pairs=pairs)
        k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + future
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).flatten(1)
        x = x + mixed @ of("o").T
        h = rms_norm(x, x.shape[-1:], of("norm2"), eps)
        x = x + (silu(h @ of("gate").T) * (h @ of("up").T)) @ of("down").T
    return rms_norm(x, x.shape[-1:], weights[f"{names['norm']}.weight"], eps) @ weights[f"{names['head']}.weight"].T


SMALL = {"hidden": 64, "layers": 2, "inner": 96, "vocab": 50}
LAYOUTS = {  # name -> names, shape of the heads, theta, epsilon, pairs, class
    "v1": (EARLY, {"heads": 16, "key_heads": 8, "head_dim": 4}, 1e4, 1e-5, True, LlamaForCausalLM),
    "minimind2": (EARLY, {"heads": 8, "key_heads": 2, "head_dim": 8}, 1e6, 1e-5, True, LlamaForCausalLM),
    "2025": (LATER, {"heads": 8, "key_heads": 2, "head_dim": 8}, 1e6, 1e-5, False, LlamaForCausalLM),
    "2026": (LATER, {"heads": 8, "key_heads": 4, "head_dim": 8}, 1e6, 1e-6, False, Qwen3ForCausalLM),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_stock_class_computes_the_same(layout):
    names, shape, theta, eps, pairs, stock = LAYOUTS[layout]
    weights = state_dict(names, **SMALL, **shape, has_norms=layout == "2026")
    model = from_state_dict(weights).eval()
    assert isinstance(model, stock)
    ids = torch.randint(50, (11,), generator=torch.Generator().manual_seed(1))
    own = {"heads": shape["heads"], "head_dim": shape["head_dim"], "theta": theta, "eps": eps, "pairs": pairs}
    torch.testing.assert_close(model(ids[None]).logits[0], forward(weights, names, ids, **own), atol=1e-4, rtol=1e-4)


def test_the_published_model_of_2026_has_its_size():
    shape = {"hidden": 768, "layers": 8, "heads": 8, "key_heads": 4, "head_dim": 96, "inner": 2432, "vocab": 6400}
    model = from_state_dict(state_dict(LATER, **shape, has_norms=True, std=0))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(63.91, abs=0.005)
    config = model.config
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (96, 8, 4)
    assert config.tie_word_embeddings


def test_a_file_becomes_a_folder_that_transformers_loads(tmp_path):
    weights = state_dict(LATER, **SMALL, heads=8, key_heads=4, head_dim=8, has_norms=True)
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "a_llm.pth")
    model = load_minimind(tmp_path / "a_llm.pth")
    model.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_heads_of_another_size_can_be_named():
    weights = state_dict(LATER, **SMALL, heads=4, key_heads=4, head_dim=16)
    assert from_state_dict(weights, Heads(4, 1e4)).config.num_attention_heads == 4
    with pytest.raises(ValueError, match="5 heads do not fit"):
        from_state_dict(weights, Heads(5, 1e4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "1 weights are missing"),
        ({"model.extra.weight": torch.zeros(2)}, "1 are left over"),
        ({"model.norm.weight": torch.zeros(3)}, "shapes do not fit"),
        ({"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}, "a mixture of experts"),
        ({"model.embed_tokens.weight": None}, "no MiniMind language model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, reason):
    weights = state_dict(LATER, **SMALL, heads=8, key_heads=2, head_dim=8) | change
    with pytest.raises(ValueError, match=reason):
        from_state_dict({name: value for name, value in weights.items() if value is not None})


class Planted:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("content", [Planted(), {"a": Planted()}, [1], {"a": 3}])
def test_what_is_no_state_dict_is_refused_and_not_run(tmp_path, content, capsys):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_minimind(tmp_path / "a.pth")
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_minimind(tmp_path / "a.pth")
