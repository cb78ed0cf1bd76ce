"""Worked examples in front of a question, with their pictures: the variant few_shot. No cluster."""

import hashlib
import heapq
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from minivlm.config import ConfigError
from minivlm.data.chat import encode_prompt
from minivlm.evaluation.tasks import Question
from minivlm.inference.exports import StageExport
from minivlm.model.llava import read_llava_config
from minivlm.model.tokenizer import load_tokenizer
from minivlm.schema import Message, Sample

POOL = 256
"""Training examples kept per task and language, by a hash of their ids; each question draws its own from them."""

Pools = Mapping[tuple[str, str], Sequence[Sample]]
"""(task, language) -> examples."""


def example_pools(samples: Iterable[Sample], questions: Sequence[Question], seed: int) -> Pools:
    """Training samples of one question and one answer, for the tasks and languages that the questions have.

    The choice depends on `seed` and the samples' ids alone.
    """
    wanted = {(question.task, question.language) for question in questions if not question.source}
    heaps: defaultdict[tuple[str, str], list[tuple[int, int, Sample]]] = defaultdict(list)
    for number, sample in enumerate(samples):
        key = (sample.task, sample.language)
        if key not in wanted or [message.role for message in sample.messages] != ["user", "assistant"]:
            continue
        digest = hashlib.sha256(f"{seed}/{sample.sample_id}".encode()).hexdigest()
        entry = (-int(digest, 16), -number, sample)  # the numbers differ, so samples are never compared
        if len(heaps[key]) < POOL:
            heapq.heappush(heaps[key], entry)
        elif entry > heaps[key][0]:
            heapq.heapreplace(heaps[key], entry)
    return {key: [sample for _, _, sample in sorted(heap, reverse=True)] for key, heap in heaps.items()}


def add_shots(
    question: Question, pools: Pools, num_shots: int, seed: int
) -> tuple[tuple[Message, ...], tuple[str, ...]] | str:
    """Turns and picture digests of a question behind examples of its task and language, none about its own pictures.

    Returns:
        Turns and digests; or why there are none.
    """
    pool = pools.get((question.task, question.language), ())
    own = set(question.image_sha256)
    fitting = [sample for sample in pool if own.isdisjoint(sample.image_sha256)]
    if len(fitting) < num_shots:
        return f"fewer than {num_shots} training examples of its task and language"
    chosen = random.Random(f"{seed}/{question.question_id}").sample(fitting, num_shots)
    turns = tuple(turn for sample in chosen for turn in sample.messages)
    digests = tuple(digest for sample in chosen for digest in sample.image_sha256)
    return (*turns, *question.messages), (*digests, *question.image_sha256)


def check_context(
    export: StageExport, prompts: Mapping[str, Sequence[Message]], *, num_shots: int, max_new_tokens: int
) -> None:
    """All prompts with examples and their longest answers must fit what the export can read.

    Args:
        prompts: by the question's name.

    Raises:
        ConfigError: naming the longest one, and how many examples would fit.
    """
    settings, _ = read_llava_config(export.export_dir)
    limit = int(settings.text_config.max_position_embeddings)
    tokenizer = load_tokenizer(str(export.export_dir))
    lengths = {name: len(encode_prompt(tokenizer, turns, settings.image_seq_length)) for name, turns in prompts.items()}
    longest = max(lengths, key=lambda name: lengths[name], default="")
    if not lengths or lengths[longest] + max_new_tokens <= limit:
        return
    own = len(encode_prompt(tokenizer, prompts[longest][2 * num_shots :], settings.image_seq_length))
    per_shot = -(-(lengths[longest] - own) // num_shots)
    fitting = max(0, limit - max_new_tokens - own) // per_shot
    advice = f"type evaluation.num_shots={fitting}" if fitting else "leave few_shot out of evaluation.variants"
    raise ConfigError(
        f"few_shot: question {longest} with evaluation.num_shots={num_shots} examples has {lengths[longest]} tokens, "
        f"its answer up to {max_new_tokens} (evaluation.max_new_tokens): more than the {limit} that {export.name} can "
        f"read ({export.export_dir}): {advice}"
    )
