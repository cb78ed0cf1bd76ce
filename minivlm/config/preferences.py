"""Settings of the preference pairs between SFT and MPO: whom to ask, how, and which answers make a pair."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from minivlm.config.base import Frozen


class PreferencesConfig(Frozen):
    """How the cluster builds chosen/rejected pairs from a model's own answers; see docs/preferences.md."""

    policy: Path | None = None
    """Export folder of the model that answers, that gives the reference log-probabilities and that MPO starts from: for
    a second round that of the first MPO run (it prints it). Default: the model after SFT. It must have the tokenizer
    and the vision tower of these settings."""

    prompt_style: Literal["as_is", "final_answer", "boxed", "think"] = "as_is"
    """How questions with a known answer ask for reasoning, in the row's language: `Final answer: ..` (MMPR's `en` and
    `zh`), `\\boxed{..}` (`en_v2`), or `<think>` and a box (`en_r1`); requests for a short answer at their end are
    removed. The pairs hold the question as it was asked. `as_is`: rows ask for what they want themselves."""

    num_samples: PositiveInt = 8
    """Answers sampled per question with a known answer."""

    temperature: PositiveFloat = 1.0
    top_k: PositiveInt = 50
    max_new_tokens: PositiveInt = 96
    """Longest answer, in tokens."""

    fix_answers: bool = False
    """Give the last line of right answers the truth's own spelling before pairs are made ("**the dog.**" -> "dog"). Of
    answers with `Final answer:` only."""

    max_pairs_per_question: PositiveInt = 2
    """MMPR's own cap is 15."""

    max_format_pairs_per_question: int = Field(1, ge=0)
    """Pairs of a right answer and one that breaks the asked form, in the room that right against wrong leaves. They are
    a fifth of all pairs of questions at most."""

    large_source_answers: PositiveInt = 500_000
    """A file of questions with more sampled answers than this gives at most max_pairs_per_large_source_question."""

    max_pairs_per_large_source_question: PositiveInt = 3
    max_questions: PositiveInt | None = None
    """Use only so many questions with a known answer, and so many open ones."""

    dropout_ntp_tasks: tuple[str, ...] = ()
    """Tasks without a checkable truth, such as [caption]: the rejected answer is the model's own, cut and continued
    without seeing the picture (dropout next-token prediction)."""

    dropout_ntp_ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the tokens of an open answer that are kept before it is continued blindly."""

    dropout_ntp_filter: bool = False
    """Keep only pairs whose chosen answer is the likelier one with the picture, by the model that wrote both."""

    cut_rejected: bool = False
    """Of a wrong answer that is paired with a right one, count only what comes up to the end of the line in which the
    two part: the later steps follow from the wrong one and are right in themselves, so DPO would unlearn them. For
    chains of thought in fixed steps, one per line; MMPR counts all."""

    min_pairs: PositiveInt = 8
    """Fewer pairs than this fail the job: MPO would learn nothing."""

    batch_size: PositiveInt = 256
    """Sequences decoded together by one actor."""
