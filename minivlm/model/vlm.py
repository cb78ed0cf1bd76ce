"""The vision-language model in training: cached picture features -> projector -> language model -> log-probabilities.

`MiniVLM.forward` serves every stage. Rows hold several samples (segments) that never see each other, and logits are
computed at supervised positions only: elsewhere they would be the largest tensor and nobody would read them.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from minivlm.model.read_tokens import IGNORE, next_labels, read_tokens, take
from minivlm.model.sample_attention import is_supported
from minivlm.model.segments import Layouts, flatten_rows, segment_layouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # seconds of imports, for whoever only names what is here


class TokenLogps(NamedTuple):
    """What a forward returns about the M supervised tokens of a micro-batch, in reading order."""

    logps: Tensor
    """[M] float32, log-probability of each supervised token, in nats."""

    segments: Tensor
    """[M] int64, segment id of each."""

    aux_loss: Tensor
    """Scalar float32: load-balancing loss of a mixture of experts, already times its coefficient; else 0."""

    mean_logps: Tensor | None = None
    """[M] float32, mean log-probability over all rows of the head, in nats; None unless `returns_mean_logps`."""


class MiniVLM(nn.Module):
    """Projector and language model. The vision tower is frozen, runs elsewhere, and is not part of it."""

    def __init__(self, projector: nn.Module, language_model: "PreTrainedModel", image_token_id: int) -> None:
        super().__init__()
        self.projector = projector
        self.language_model = language_model
        self.image_token_id = image_token_id
        self.attends_by_segment = False
        """Whether the language model takes `segment_layouts` in the place of rows and a mask."""
        self.leaves_out_tails = False
        """Whether it then computes nothing behind a sample's last supervised token."""
        self.longest_product = 0
        """Tokens of the samples that then attend by products."""
        self.head_width = 0
        """Dimensions of a head of attention, if `attends_by_segment`."""
        self.is_compiled = False
        """Whether layers are compiled, and may call a kernel that is."""
        self.ends_with_read = False
        """Whether its last layer takes `ReadTokens`, and returns these only."""
        self.returns_mean_logps = False
        """Whether a forward in training mode returns `mean_logps`, which label smoothing needs."""
        self.logps_of = target_logps
        """`target_logps`, perhaps compiled."""
        text_config = language_model.config.get_text_config().to_dict()
        self.router_loss_coef = float(text_config.get("router_aux_loss_coef", 0.0))
        self.num_experts_per_token = int(text_config.get("num_experts_per_tok") or 0)

    def forward(self, batch: dict[str, Tensor]) -> TokenLogps:
        """Log-probabilities of the supervised tokens of one micro-batch.

        A micro-batch without pictures or labels still runs every module and gives a result that is connected to
        every parameter, because with ZeRO all ranks must take the same path.

        Args:
            batch: input_ids, labels, position_ids, segment_ids [B, T] int64, image_features [N, P, D_vision],
                image_index [K] int64. labels are aligned with input_ids, -100 = ignore, shifted here. No two
                samples of the micro-batch share a segment id, 0 is padding.

        Raises:
            ValueError: placeholders unlike the pictures.
        """
        batch = {**batch, "targets": next_labels(batch["labels"])}
        if self.attends_by_segment:
            is_needed = batch["segment_ids"] != 0
            if self.leaves_out_tails:
                is_needed = (batch["targets"] != IGNORE) | (batch["input_ids"] == self.image_token_id)
            padding = int(self.image_token_id == 0)  # any token but a placeholder
            batch = flatten_rows(batch, padding, is_needed)
            attention: dict[str, Any] = {"attention_mask": None, "layouts": self._layouts(batch["segment_ids"])}
            if self.ends_with_read:
                attention["read"] = read_tokens(batch["targets"])
        else:
            embedding = self.language_model.get_input_embeddings().weight
            attention = {"attention_mask": document_mask(batch["segment_ids"], embedding.dtype)}
        inputs_embeds = self.embed(batch["input_ids"], batch["image_features"], batch["image_index"])
        segment_ids = batch["segment_ids"]
        router = {"output_router_logits": True} if self.num_experts_per_token else {}
        outputs = self.language_model.get_decoder()(
            inputs_embeds=inputs_embeds,
            position_ids=batch["position_ids"],
            use_cache=False,
            **attention,
            **router,
        )
        targets = batch["targets"]
        is_read = targets != IGNORE
        hidden_states = outputs.last_hidden_state.flatten(0, 1)
        if "read" not in attention:
            hidden_states = take(hidden_states, read_tokens(targets))
        logits = self.language_model.get_output_embeddings()(hidden_states)
        with_mean = self.returns_mean_logps and self.training
        logps, mean_logps = self.logps_of(logits, targets[is_read], with_mean)
        aux_loss = logps.new_zeros(())
        if self.num_experts_per_token:
            balance = load_balancing_loss(outputs.router_logits, segment_ids != 0, self.num_experts_per_token)
            aux_loss = self.router_loss_coef * balance
        return TokenLogps(logps, segment_ids[is_read], aux_loss, mean_logps)

    def _layouts(self, segment_ids: Tensor) -> Layouts:
        config = self.language_model.config.get_text_config()
        weight = self.language_model.get_input_embeddings().weight
        takes_products = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        heads = (config.num_attention_heads, config.num_key_value_heads)
        longest = self.longest_product if takes_products else 0
        takes_spans = takes_products and self.is_compiled and is_supported(self.head_width)
        return segment_layouts(segment_ids, heads, longest, takes_spans=takes_spans)

    def embed(self, input_ids: Tensor, image_features: Tensor, image_index: Tensor) -> Tensor:
        """Token embeddings with the projected pictures in the places of their placeholders.

        Args:
            input_ids: [B, T]; a picture is as many consecutive image tokens as the projector makes of its features.
            image_features: [N, P, D_vision], any float type; cast to the projector's. N may be 0.
            image_index: [K] int64, row of image_features for the k-th picture in reading order.

        Returns:
            [B, T, D_text] in the language model's type.

        Raises:
            ValueError: the number of image tokens is not that of K pictures.
        """
        inputs_embeds: Tensor = self.language_model.get_input_embeddings()(input_ids)
        weight_type = next(self.projector.parameters()).dtype
        image_embeds = self.projector(image_features.to(weight_type)).index_select(0, image_index)
        places = (input_ids == self.image_token_id).flatten().nonzero().squeeze(1)
        num_placeholders, num_pictures = len(places), image_index.numel()
        if num_placeholders != num_pictures * image_embeds.shape[1]:
            raise ValueError(
                f"{num_placeholders} image tokens for {num_pictures} pictures of {image_embeds.shape[1]} tokens: "
                "every picture needs one `<image>` in the text, expanded for this tower and projector. Prepare again"
            )
        rows = image_embeds.flatten(0, 1).to(inputs_embeds.dtype)
        return inputs_embeds.flatten(0, 1).index_copy(0, places, rows).view_as(inputs_embeds)


def target_logps(logits: Tensor, targets: Tensor, with_mean: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, if asked for, the mean over the whole vocabulary, both [M] float32.

    Args:
        logits: [at least M, V]; rows beyond the targets are not read.
        targets: [M] int64.
    """
    logits = logits[: len(targets)].float()
    logps = -functional.cross_entropy(logits, targets, reduction="none")
    if not with_mean:
        return logps, None
    return logps, logps + logits.mean(dim=-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def document_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, T, T]: 0 where a token may look, -inf elsewhere.

    A token looks at itself and at earlier tokens of its own segment. Padding is segment 0 and looks at padding, so no
    row of the softmax is empty.
    """
    length = segment_ids.shape[1]
    is_same = segment_ids.unsqueeze(1) == segment_ids.unsqueeze(2)
    is_past = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    mask = torch.zeros(is_same.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~(is_same & is_past), float("-inf")).unsqueeze(1)


def load_balancing_loss(router_logits: tuple[Tensor, ...], is_token: Tensor, top_k: int) -> Tensor:
    """Push a mixture of experts to use its experts evenly; 1 * top_k when it does.

    loss = E * sum_e (share of choices that took e, top_k in all) * (mean router probability of e)

    over all tokens and layers. Transformers' own function divides by zero when a micro-batch is all padding.

    Args:
        router_logits: one [B * T, E] per layer.
        is_token: [B, T] bool, False = padding.
        top_k: experts per token.

    Returns:
        Scalar float32, the mean over this micro-batch's tokens; 0 without any.

    Source: Fedus et al. 2021, arXiv:2101.03961, Eq. 4 to 6.
    """
    logits = torch.stack(router_logits).float()
    weights = is_token.reshape(1, -1, 1).float()
    probabilities = logits.softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    total = (weights.sum() * len(router_logits)).clamp(min=1.0)
    share = (chosen * weights).sum(dim=(0, 1)) / total
    mean_probability = (probabilities * weights).sum(dim=(0, 1)) / total
    return logits.shape[-1] * (share * mean_probability).sum()


def sequence_logps(token_logps: TokenLogps, num_segments: int) -> Tensor:
    """[S] float32: summed log-probability of each segment's supervised tokens; entry s-1 is segment s."""
    sums = token_logps.logps.new_zeros(num_segments)
    return sums.index_add(0, token_logps.segments - 1, token_logps.logps)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters another float type, in place; buffers stay as they are.

    Frequencies of rotary embeddings are a buffer: rounded to bfloat16 they turn a token at position 1000 by 0.18 rad.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def count_parameters(model: MiniVLM) -> dict[str, int]:
    """Parameters of each part; a tied head counts once."""
    return {
        "projector": sum(parameter.numel() for parameter in model.projector.parameters()),
        "language_model": sum(parameter.numel() for parameter in model.language_model.parameters()),
    }
