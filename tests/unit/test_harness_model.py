"""Our models inside lmms-eval: what answers there, and the entry point. lmms-eval itself is no dependency of ours."""

import ast
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from minivlm.data.chat import encode_prompt
from minivlm.inference.direct import DirectModel, read_turns
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt, generate
from minivlm.schema import Message
from tests.tiny_export import build_export

ROOT = Path(__file__).parents[2]
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
QUESTION = Message("user", "<image>\nwhat?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_export(tmp_path_factory.mktemp("tiny"))


def test_answers_are_those_of_generate_and_depend_on_the_picture(folder: Path) -> None:
    export, tower = load_export(folder), load_export_tower(folder, batch_size=1)
    ids = encode_prompt(export.tokenizer, [QUESTION], export.num_image_tokens, num_images=1)
    prompts = [Prompt(ids, tower.encode(tower.preprocess([picture]))) for picture in (RED, BLUE)]
    eos = export.tokenizer.eos_token_id
    expected = [
        (export.tokenizer.decode(answer, skip_special_tokens=True).strip(), len(answer))
        for answer in generate(export.vlm, prompts, max_new_tokens=8, eos_token_id=eos)
    ]
    found = DirectModel(folder).answer([([QUESTION], [RED]), ([QUESTION], [BLUE])], max_new_tokens=8)
    assert found == expected
    assert found[0] != found[1]


def test_turns_put_pictures_first_and_defuse_placeholders() -> None:
    messages, pictures = read_turns([("user", ["is <image>", RED, "red?", BLUE]), ("assistant", ["yes"])])
    assert messages == [Message("user", "<image>\n<image>\nis < image>\nred?"), Message("assistant", "yes")]
    assert pictures == [RED, BLUE]
    with pytest.raises(ValueError, match="only the user"):
        read_turns([("assistant", [RED])])


def test_the_entry_point_names_a_chat_model_in_lmms_evals_form() -> None:
    """Form of lmms_eval/models/registry_v2.py 0.7.3: a callable that gives a manifest, whose class is not `simple`."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, payload = groups["lmms_eval.models"]["minivlm"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    text = ast.unparse(named[payload])
    assert "ModelManifest(model_id=MODEL_ID, chat_class_path=f'{__name__}.{HarnessModel.__name__}')" in text
    model = named["HarnessModel"]
    assert [ast.unparse(base) for base in model.bases] == ["lmms"]
    assert "is_simple = False" in ast.unparse(model)
    methods = {node.name for node in model.body if isinstance(node, ast.FunctionDef)}
    assert methods >= {"generate_until", "loglikelihood", "generate_until_multi_round"}


def test_requests_are_answered_in_order_with_their_own_limits_and_stops(folder: Path) -> None:
    """Run where lmms-eval is installed (docs/evaluation.md says how); skipped elsewhere."""
    pytest.importorskip("lmms_eval")
    from minivlm.inference.harness_model import HarnessModel

    def to_messages(doc: dict[str, Image.Image]) -> list[dict[str, object]]:
        parts = [{"type": "image", "url": doc["picture"]}, {"type": "text", "text": "what?"}]
        return [{"role": "user", "content": parts}]

    plain = [
        text for text, _ in DirectModel(folder).answer([([QUESTION], [RED]), ([QUESTION], [BLUE])], max_new_tokens=8)
    ]
    model = HarnessModel(str(folder), batch_size=2)
    model.task_dict = {"task": {"test": [{"picture": RED}, {"picture": BLUE}]}}
    settings = [{"max_new_tokens": 8}, {"max_new_tokens": 1}, {"max_new_tokens": 8, "until": [plain[1][2:]]}]
    requests = [
        SimpleNamespace(args=("", to_messages, own, doc, "task", "test"))
        for own, doc in zip(settings, (0, 0, 1), strict=True)
    ]
    results = model.generate_until(requests)
    assert [result.text for result in results][::2] == [plain[0], plain[1][:2]]
    assert results[1].token_counts.output_tokens == 1
    requests[0].args[2]["do_sample"] = True
    with pytest.raises(ValueError, match="samples its answers"):
        model.generate_until(requests)
