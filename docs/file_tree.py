"""Write the file tree at the end of README.md: one line per file, the first sentence of its docstring.

python docs/file_tree.py        # rewrites the block; a test fails where it is out of date
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("jobs", "minivlm", "benchmarks")
BLOCK = re.compile(r"(?<=<!-- files -->\n```\n).*?(?=```)", re.DOTALL)


def file_tree() -> str:
    """The lines of the block."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    files = [ROOT / "serve_app.py", *(file for file in files if file.name != "__init__.py")]
    return "".join(f"{file.relative_to(ROOT).as_posix():<40}{_first_sentence(file)}\n" for file in files)


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z\])`])\. ", paragraph + " ")[0].rstrip(". ")


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda _: file_tree(), readme.read_text(encoding="utf-8")), encoding="utf-8")
