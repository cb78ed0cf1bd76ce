"""README's file tree is what the files say of themselves, and its commands exist."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_is_up_to_date():
    spec = importlib.util.spec_from_file_location("file_tree", ROOT / "docs" / "file_tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    [block] = module.BLOCK.findall(README)
    assert block == module.file_tree(), "out of date: run python docs/file_tree.py"
    assert all(len(line.split(maxsplit=1)) == 2 for line in block.splitlines())


def test_every_job_and_target_that_is_named_exists():
    jobs = set(re.findall(r"-m jobs\.([a-z_]+)", README))
    assert jobs
    assert all((ROOT / "jobs" / f"{name}.py").is_file() for name in jobs)
    targets = set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for pair in targets for name in pair if name)
