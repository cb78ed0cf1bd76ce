"""Settings of public benchmarks that are asked beside the test split."""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from minivlm.config.base import Frozen

BenchmarkKind = Literal[
    "vqav2", "textvqa", "scienceqa", "chartqa", "docvqa", "infovqa", "ocrbench", "pope", "mme", "multiple_choice",
    "mathvista", "coco_captions",
]  # fmt: skip
KINDS: tuple[str, ...] = get_args(BenchmarkKind)


class BenchmarkConfig(Frozen):
    """One benchmark in the files that its authors publish; docs/evaluation.md lists them with prompts and scorers."""

    kind: BenchmarkKind
    """How the file is read, what is added to its questions, and how answers are scored."""

    path: Path
    """The file of questions, or a folder of parquet shards; of `mme` also the folder of its categories."""

    annotations: Path | None = None
    """File of the answers where it is another one: `vqav2` only."""

    images: Path | None = None
    """Folder that picture names are relative to. Default: the folder of `path`. Unused where rows hold pictures."""

    split: str | None = None
    """Rows of this split only, where rows name one (`scienceqa`, `coco_captions`; default there: test)."""

    name: str | None = None
    """Task name in results and report. Default: the kind. Needed to tell two files of one kind apart."""

    @property
    def task(self) -> str:
        """Task name in results and report."""
        return self.name or self.kind

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from, but for its pictures."""
        return (self.path,) if self.annotations is None else (self.path, self.annotations)

    @field_validator("kind", mode="before")
    @classmethod
    def _known(cls, kind: Any) -> Any:
        if kind not in KINDS:
            near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(KINDS)}."
            raise ValueError(f"no benchmark of this kind. {hint}")
        return kind

    @model_validator(mode="after")
    def _has_answers(self) -> "BenchmarkConfig":
        if (self.annotations is None) == (self.kind == "vqav2"):
            need = "needs `annotations`, its second file" if self.kind == "vqav2" else "has its answers in `path`"
            raise ValueError(f"kind `{self.kind}` {need}: {'add' if self.kind == 'vqav2' else 'remove'} `annotations`")
        return self
