"""Sample generations during training: what the current weights answer to a few questions, greedily.

    run_dir/samples.jsonl   {"step": 100, "sample": .., "prompt": .., "truth": .., "answer": .., "num_tokens": ..,
                            "is_cut": .., "repetition": ..}, one line per question and sampling

Rank 0 answers with a whole copy of the gathered weights while the others wait, so ZeRO's shards, the trained modules'
mode and their random numbers are not touched. Called by `minivlm.train.loop` every `train.sample_every_steps` steps.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from minivlm.data.features import FeatureCache
from minivlm.data.tokenizer import load_tokenizer
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.generate import Prompt, generate
from minivlm.model.vlm import MiniVLM, cast_weights
from minivlm.train.job import StageJob, sampled_entries
from minivlm.train.metrics import SAMPLES_FILE, MetricsWriter

NGRAM = 4


@dataclass(frozen=True)
class Question:
    """One validation row, cut where its first answer begins."""

    sample_id: str
    input_ids: list[int]
    pictures: tuple[str, ...]
    """Digests of the pictures that the prompt shows."""

    truth: list[int]
    """Ids of the first answer, without the end token."""


class Sampler:
    """Writes the samples of one run; lives on rank 0."""

    def __init__(self, job: StageJob, device: torch.device, *, after_step: int) -> None:
        """
        Args:
            after_step: samples of later steps, written by a run that died, are dropped.
        """
        assert job.sample_table is not None
        table = TokenTable.open(job.sample_table)
        self._tokenizer = load_tokenizer(job.tokenizer_path)
        self._questions = [first_question(table[entry], job.image_token_id) for entry in sampled_entries(table)]
        self._job = job
        self._device = torch.device("cpu") if job.keeps_copies_on_host else device
        self._writer = MetricsWriter(job.run_dir / SAMPLES_FILE, after_step=after_step)

    def write(self, step: int, vlm: MiniVLM) -> dict[str, float]:
        """Answer the questions after `step` steps; their lines go to the file.

        Args:
            vlm: the current weights, float32 on the CPU. On another device, or in bfloat16, a copy of it is used.

        Returns:
            Means over the answers: samples/length in tokens (the end token not counted) and samples/repetition.
        """
        dtype = torch.bfloat16 if self._job.config.train.precision == "bfloat16" else torch.float32
        if self._device.type != "cpu" or dtype != torch.float32:
            vlm = copy.deepcopy(vlm).to(self._device)
            cast_weights(vlm, dtype)
        features = FeatureCache.open(self._job.features_dir)
        longest = self._job.config.evaluation.max_new_tokens
        answers = generate(
            vlm.eval(),
            [Prompt(question.input_ids, features.get(question.pictures)) for question in self._questions],
            max_new_tokens=longest,
            eos_token_id=int(self._tokenizer.eos_token_id),
        )
        repetitions = [repetition_rate(answer) for answer in answers]
        for question, answer, repetition in zip(self._questions, answers, repetitions, strict=True):
            self._writer.write(
                {
                    "step": step,
                    "sample": question.sample_id,
                    "prompt": self._text([token for token in question.input_ids if token != self._job.image_token_id]),
                    "truth": self._text(question.truth),
                    "answer": self._text(answer),
                    "num_tokens": len(answer),
                    "is_cut": len(answer) == longest,
                    "repetition": repetition,
                }
            )
        return {"samples/length": fmean(map(len, answers)), "samples/repetition": fmean(repetitions)}

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def first_question(sample: EncodedSample, image_token_id: int) -> Question:
    """The conversation up to its first answer, and that answer."""
    labels = sample.labels.tolist()
    start = next(place for place, label in enumerate(labels) if label != IGNORE)
    end = next((place for place in range(start, len(labels)) if labels[place] == IGNORE), len(labels))
    ids: list[int] = sample.input_ids.tolist()
    shown = 0
    if sample.image_sha256:
        shown = ids[:start].count(image_token_id) * len(sample.image_sha256) // ids.count(image_token_id)
    return Question(sample.sample_id, ids[:start], sample.image_sha256[:shown], ids[start : end - 1])


def repetition_rate(tokens: Sequence[int]) -> float:
    """Share of an answer's 4-grams that it has had before: 1 - distinct / all; 0 with fewer than five tokens.

    Source: Welleck et al. 2019, arXiv:1908.04319, section 6 (seq-rep-4).
    """
    ngrams = [tuple(tokens[place : place + NGRAM]) for place in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
