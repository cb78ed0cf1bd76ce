"""Ray Data jobs around the actors: answer questions, and score the answers of a token table.

One block is one decoding batch (or a few micro-batches), so results arrive block by block and the caller can commit
each as it comes. Rows of similar length stand together: batches then carry little padding.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from minivlm.config.run import EvaluationConfig
from minivlm.data.plan import plan_epoch
from minivlm.data.stream import from_tables
from minivlm.data.tokens import TokenTable
from minivlm.inference.actors import Decoding, Generator, LogProbs
from minivlm.schema import Message

_GROUPS_PER_BLOCK = 256


@dataclass(frozen=True)
class Request:
    """One prompt for one export. `seed` is that of its sampling; `weight` a guess of the work, for ordering only.

    `response_prefix` are token ids that the assistant's turn begins with: the answer is what comes behind them.
    """

    row_id: str
    export_dir: Path
    messages: tuple[Message, ...]
    image_sha256: tuple[str, ...]
    seed: int = 0
    weight: int = 0
    response_prefix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model wrote, without the end token (and behind the request's `response_prefix`)."""

    row_id: str
    text: str
    token_ids: tuple[int, ...]


def make_blocks(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Decoding batches: by export, then expected work, then prompt length. A pure function of the requests."""

    def key(request: Request) -> tuple[str, int, int, int, str]:
        size = sum(len(message.content) for message in request.messages)
        return (str(request.export_dir), request.weight, len(request.image_sha256), size, request.row_id)

    ordered = sorted(requests, key=key)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def answer_blocks(
    blocks: Sequence[Sequence[Request]], *, features_dir: Path, decoding: Decoding, pool: EvaluationConfig
) -> Iterator[list[Answer]]:
    """Answer every block on a pool of Generator actors; yields whole blocks in the order they finish.

    Raises:
        RuntimeError: a block came back with other rows than it was sent.
    """
    if not blocks:
        return
    tables = [to_table(block) for block in blocks]
    dataset = _map_actors(Generator, tables, pool, {"features_dir": str(features_dir), "decoding": decoding})
    sent = {frozenset(request.row_id for request in block) for block in blocks}
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        answers = [Answer(row["row_id"], row["text"], tuple(row["token_ids"])) for row in table.to_pylist()]
        if frozenset(answer.row_id for answer in answers) not in sent:
            raise RuntimeError(f"A block of {len(answers)} answers is none that was asked for: run the job again")
        yield answers


def score_table(
    table_dir: Path,
    *,
    export_dir: Path,
    features_dir: Path,
    micro_batch_tokens: int,
    pack_length: int,
    pool: EvaluationConfig,
) -> list[float]:
    """Log-probability of every answer in a token table, by LogProbs actors.

    Returns:
        One sum over answer tokens per entry, in nats, float32 arithmetic, in table order.

    Raises:
        RuntimeError: an entry was not scored.
    """
    table = TokenTable.open(table_dir)
    steps = plan_epoch(
        table.lengths,
        group_size=table.group_size,
        seed=0,
        epoch=0,
        global_batch_size=_GROUPS_PER_BLOCK,
        world_size=1,
        micro_batch_tokens=micro_batch_tokens,
        pack_length=pack_length,
    )
    blocks = [pa.table({"rows": [json.dumps(rows) for rows in step.micro_batches if rows]}) for step in steps]
    paths = {"features_dir": str(features_dir), "table_dir": str(table_dir), "export_dir": str(export_dir)}
    dataset = _map_actors(LogProbs, blocks, pool, paths)
    logps: dict[int, float] = {row["entry"]: row["logp"] for row in dataset.iter_rows()}
    if sorted(logps) != list(range(len(table))):
        raise RuntimeError(f"{len(logps)} of {len(table)} entries of {table_dir} were scored: run the job again")
    return [logps[entry] for entry in range(len(table))]


def to_table(block: Sequence[Request]) -> pa.Table:
    """Requests as the rows that a Generator takes."""
    return pa.Table.from_pylist(
        [
            {
                "row_id": request.row_id,
                "export_dir": str(request.export_dir),
                "messages": json.dumps([asdict(message) for message in request.messages]),
                "images": json.dumps(request.image_sha256),
                "seed": request.seed,
                "response_prefix": json.dumps(request.response_prefix),
            }
            for request in block
        ]
    )


def _map_actors(
    actor: type[Generator] | type[LogProbs],
    blocks: Sequence[pa.Table],
    pool: EvaluationConfig,
    arguments: dict[str, Any],
) -> Dataset:
    """Blocks through a pool of actors, each as it is. A CPU actor must not look for a GPU."""
    device = "cuda" if pool.gpus_per_actor > 0 else "cpu"
    dataset = from_tables(list(blocks)).map_batches(
        actor,
        fn_constructor_kwargs={**arguments, "device": device, "num_threads": pool.threads_per_actor},
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(pool.num_actors, len(blocks))),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
    )
    dataset.context.enable_progress_bars = False
    return dataset
