"""Our preference losses against TRL's own code: losses to 1e-6, gradients to 1e-4 of each, rewards to 1e-5.

A real `DPOTrainer` (TRL 1.16.0, a test-only dependency) holds a policy and a reference of random weights, and its
`compute_loss` gets random token ids from its own collator: so log-probabilities, masks and losses are TRL's.
Ours are those of training: `TokenTable`, `collate` into packed rows, `MiniVLM.forward`, `preference_loss`. TRL has no
reward shift (ours is 0 in the first step) and takes one mean over all chosen tokens (`sft_token_mean`).
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, models
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from minivlm.data.collate import collate
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.vlm import MiniVLM, sequence_logps
from minivlm.train.losses import MPOWeights, RewardShift
from minivlm.train.stages import Batch, LossSettings, StageLoss, StepTotals, count_totals, preference_loss

VOCABULARY, WIDTH, BETA = 60, 16, 0.3
Pair = dict[str, list[int]]
CASES = [
    (["sigmoid"], [1.0], MPOWeights(1, 0, 0)),
    (["bco_pair"], [1.0], MPOWeights(0, 1, 0)),
    (["sft"], [1.0], MPOWeights(0, 0, 1)),
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], MPOWeights()),
]


def language_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    """Its policy and reference differ; its data set is never used."""
    disable_progress_bar()
    words = Tokenizer(models.WordLevel({"<pad>": 0, "word": 1, "<end>": 2}, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    settings = DPOConfig(
        str(tmp_path_factory.mktemp("trl")), beta=BETA, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    return DPOTrainer(
        language_model(0),
        language_model(1),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "word", "chosen": "word", "rejected": "word"}]),
        processing_class=tokenizer,
    )


def random_pairs(seed: int) -> list[Pair]:
    """Five pairs whose answers have 1 to 6 tokens."""
    generator = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in generator.integers(3, VOCABULARY, count)]

    return [
        {"prompt_ids": ids(2 + i), "chosen_ids": ids(1 + i), "rejected_ids": ids(int(generator.integers(1, 7)))}
        for i in range(5)
    ]


def packed_batch(pairs: list[Pair], folder: Path) -> Batch:
    """The pairs as training lays them out: two rows, each with several segments."""
    entries = []
    for pair in pairs:
        for answer in ("chosen_ids", "rejected_ids"):
            ids = np.array([*pair["prompt_ids"], *pair[answer]], np.int32)
            labels = np.where(np.arange(len(ids)) < len(pair["prompt_ids"]), IGNORE, ids).astype(np.int32)
            entries.append(EncodedSample(answer, ids, labels, ()))
    table = TokenTable.write(folder, entries, group_size=2, reference_logps=[0.0] * len(entries))
    rows = ((0, 1, 2, 3), (4, 5, 6, 7, 8, 9))
    no_pictures = torch.zeros(0, 1, WIDTH)
    return collate(table, rows, lambda digests: no_pictures, image_token_id=VOCABULARY + 1, pad_token_id=0)


def ours(policy: LlamaForCausalLM, reference: LlamaForCausalLM, batch: Batch, weights: MPOWeights) -> StageLoss:
    """One step's loss in its first step, when the reward shift is 0."""
    projector = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        batch["reference_logps"] = sequence_logps(MiniVLM(projector, reference, VOCABULARY + 1)(batch), 10)
    totals = StepTotals(*count_totals(batch).tolist())
    output = MiniVLM(projector, policy, VOCABULARY + 1)(batch)
    return preference_loss(output, batch, totals, LossSettings(BETA, weights, sft_token_mean=True), RewardShift())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("types", "type_weights", "weights"), CASES, ids=["sigmoid", "bco_pair", "sft", "mpo"])
def test_losses_gradients_and_rewards_are_those_of_trl(
    trainer: DPOTrainer, tmp_path: Path, seed: int, types: list[str], type_weights: list[float], weights: MPOWeights
):
    pairs = random_pairs(seed)
    policy, reference = language_model(0), language_model(1)
    result = ours(policy, reference, packed_batch(pairs, tmp_path / "table"), weights)
    result.loss.backward()
    trainer.loss_types, trainer.loss_weights = types, type_weights  # what its constructor keeps of its settings
    trainer.model.zero_grad()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(copy.deepcopy(pairs)))
    theirs.backward()
    assert_close(result.loss, theirs, atol=1e-6, rtol=1e-6)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    assert_close(gradients, expected, atol=1e-6, rtol=1e-4)
    logged = trainer._metrics["train"]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert float(result.metrics[name]) == pytest.approx(logged[name][-1], abs=1e-5), name
