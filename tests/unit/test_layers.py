"""Imports only point down, heavy libraries stay in the named files, and pure modules stay pure.

The rules are DESIGN.md's layer list. Every import statement counts, also those inside functions and under
TYPE_CHECKING, and `importlib.import_module("name")`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = (  # top to bottom; names on one line do not import each other
    {"workflow"},
    {"tune", "serve"},
    {"train", "preferences", "evaluation"},
    {"inference"},
    {"data"},
    {"model", "scoring", "tracking"},
    {"config", "errors", "schema", "storage", "layout", "log", "priority"},
)
SAME_LINE_ALLOWED = {("layout", "config"), ("layout", "storage")}

HOMES = {  # library -> files that may import it
    "ray": (
        "minivlm/data/stream.py", "minivlm/data/encode.py", "minivlm/data/scores.py", "minivlm/data/embeddings.py",
        "minivlm/inference/*.py", "minivlm/train/environment.py", "minivlm/train/launch.py",
        "minivlm/train/feed.py", "minivlm/train/contrastive.py", "minivlm/tune/search.py", "minivlm/tune/trial.py",
        "minivlm/serve/app.py", "minivlm/log.py", "minivlm/workflow/cluster.py", "jobs/*.py", "serve_app.py",
    ),
    "deepspeed": ("minivlm/train/engine.py",),
    "mlflow": ("minivlm/tracking/*.py",),
}  # fmt: skip
PURE = (
    "minivlm/model/*.py", "minivlm/scoring/*.py", "minivlm/train/losses.py", "minivlm/train/stages.py",
    "minivlm/data/chat.py", "minivlm/data/plan.py", "minivlm/data/collate.py", "minivlm/data/tokens.py",
    "minivlm/data/features.py", "minivlm/data/images.py", "minivlm/data/tokenizer.py",
    "minivlm/data/video.py", "minivlm/data/frames.py", "minivlm/data/clips.py",
)  # fmt: skip
IMPURE = ("ray", "deepspeed", "mlflow", "pydantic", "minivlm.config")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, at any depth; relative imports start with a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def sources(root: Path) -> dict[str, Path]:
    """Checked files by their path below `root`."""
    paths = [*root.glob("minivlm/**/*.py"), *root.glob("jobs/**/*.py"), *root.glob("serve_app.py")]
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def layer_of(part: str) -> int | None:
    return next((index for index, names in enumerate(LAYERS) if part in names), None)


def own_part(name: str) -> str | None:
    """`minivlm/data/plan.py` -> data; `minivlm/log.py` -> log; None for jobs and serve_app, which may import all."""
    parts = Path(name).with_suffix("").parts
    return parts[1] if parts[0] == "minivlm" and parts[1] != "__init__" else None


def layer_violations(root: Path) -> Iterator[str]:
    for name, path in sources(root).items():
        own = own_part(name)
        if own is not None and layer_of(own) is None:
            yield f"{name}: `{own}` is in no layer: add it to LAYERS and to DESIGN's list"
            continue
        for line, target in imported_names(path):
            where = f"{name}:{line} imports {target}"
            if target.startswith("."):
                yield f"{where}: write it absolute"
            if not target.startswith(("minivlm.", "jobs.", "serve_app")) or name.startswith(("jobs/", "serve_app")):
                continue
            part = target.split(".")[1] if target.startswith("minivlm.") else ""
            goal = layer_of(part)
            if goal is None:
                yield f"{where}: not in a layer below"
            elif own is not None and part != own and goal <= layer_of(own) and (own, part) not in SAME_LINE_ALLOWED:
                yield f"{where}: {own} may only import from the lines below its own"


def library_violations(root: Path) -> Iterator[str]:
    for name, path in sources(root).items():
        for line, target in imported_names(path):
            library = target.split(".")[0]
            if library in HOMES and not any(fnmatch(name, home) for home in HOMES[library]):
                yield f"{name}:{line} imports {target}: {library} belongs in {', '.join(HOMES[library])}"


def module_file(root: Path, target: str) -> str | None:
    """File of `minivlm.data.plan` or of `minivlm.data.plan.plan_epoch`."""
    parts = target.split(".")
    for length in range(len(parts), 1, -1):
        stem = "/".join(parts[:length])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
            if (root / candidate).exists():
                return candidate
    return None


def purity_violations(root: Path) -> Iterator[str]:
    """What a pure module imports, and what those modules of ours import in turn, is no Ray and no config."""
    files = sources(root)
    for start in (name for name in files if any(fnmatch(name, pure) for pure in PURE)):
        pending, seen = [start], {start}
        while pending:
            name = pending.pop()
            for line, target in imported_names(files[name]):
                if any(target == impure or target.startswith(f"{impure}.") for impure in IMPURE):
                    yield f"{start} is pure, but {name}:{line} imports {target}"
                following = module_file(root, target) if target.startswith("minivlm.") else None
                if following and following not in seen:
                    seen.add(following)
                    pending.append(following)


def violations(root: Path) -> list[str]:
    return [*layer_violations(root), *library_violations(root), *purity_violations(root)]


def test_imports_only_point_down():
    assert list(layer_violations(ROOT)) == []


def test_ray_deepspeed_and_mlflow_stay_in_their_files():
    assert list(library_violations(ROOT)) == []


def test_pure_modules_import_nothing_heavy():
    assert list(purity_violations(ROOT)) == []


def test_what_data_tasks_import_starts_without_the_slow_libraries():
    """Each new process of such a task would pay seconds for them."""
    modules = "minivlm.data.validate, minivlm.data.batches, minivlm.data.draw, minivlm.train.clip_batches"
    slow = {"torch", "transformers", "pandas", "pydantic", "scipy"}
    code = f"import sys, {modules}; print(*({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("minivlm/data/plan.py", "from minivlm.train.losses import dpo_loss", "data may only import"),
        ("minivlm/tune/search.py", "import minivlm.serve.app", "tune may only import"),
        ("minivlm/storage.py", "from minivlm import log", "storage may only import"),
        ("minivlm/train/loop.py", "def f():\n    from minivlm.workflow import steps", "train may only import"),
        ("minivlm/train/loop.py", "from jobs.common import connect", "not in a layer below"),
        ("minivlm/train/loop.py", "from .launch import run_stage", "write it absolute"),
        ("minivlm/extras/tool.py", "import math", "in no layer"),
        ("minivlm/train/launch.py", "import deepspeed", "deepspeed belongs in"),
        ("minivlm/serve/engine.py", "def f():\n    import ray", "ray belongs in"),
        ("jobs/train.py", "from mlflow.tracking import MlflowClient", "mlflow belongs in"),
        ("minivlm/evaluation/runner.py", "import importlib\nimportlib.import_module('ray.data')", "ray belongs in"),
        ("minivlm/model/vlm.py", "from pydantic import BaseModel", "minivlm/model/vlm.py is pure"),
        ("minivlm/scoring/metrics.py", "from minivlm import layout", "scoring/metrics.py is pure, but minivlm/layout"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, code, complaint):
    (tmp_path / "minivlm").mkdir()
    (tmp_path / "minivlm" / "layout.py").write_text("from minivlm.config import Config\n")
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    assert violations(tmp_path) == []
    planted.write_text(code)
    assert any(complaint in violation for violation in violations(tmp_path)), violations(tmp_path)


def test_what_is_allowed_raises_no_complaint(tmp_path):
    for file, code in {
        "minivlm/layout.py": "from minivlm.config import Config\nfrom minivlm.storage import content_hash",
        "minivlm/data/encode.py": "import ray\nfrom minivlm.model.vision import VisionTower",
        "minivlm/tracking/runs.py": "import mlflow\nfrom minivlm import layout",
        "minivlm/model/vlm.py": "import torch\nfrom minivlm.model.projector import build_projector",
        "jobs/train.py": "import ray\nfrom minivlm.workflow.steps import train",
    }.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert violations(tmp_path) == []
