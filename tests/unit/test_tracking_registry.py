"""The registry on a real SQLite database: idempotent versions, gates, who serves and who waits, the download."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from minivlm.config import Config, ConfigError
from minivlm.tracking.client import connect
from minivlm.tracking.manifest import REQUIRED_FILES, export_files
from minivlm.tracking.registry import (
    champion_number,
    make_champion,
    promotion_lock,
    register_candidate,
    resolve_champion,
)
from minivlm.tracking.runs import Run, start_run
from minivlm.workflow.register import Candidate, PromotionResult, submit
from tests.tiny_export import build_export

WEAK, STRONG = [0.0, 1.0] * 10, [1.0] * 20
"""Scores of ten pictures with two questions each."""

FIELDS = {"source": "", "scorer": "short_answer", "question": "Which?"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Run, Path]:
    config = Config(storage_path=tmp_path_factory.mktemp("home"))
    return config, start_run(config, "register", key="k"), build_export(tmp_path_factory.mktemp("model"))


class Desk:
    """A registered model of its own for one test."""

    def __init__(self, config: Config, run: Run, export: Path, folder: Path) -> None:
        self.config, self.run, self.export, self.folder = config, run, export, folder
        self.client: MlflowClient = connect(config)

    def candidate(self, name: str, scores: list[float]) -> Candidate:
        """An export that differs from others in one weight, and its evaluation."""
        export = self.folder / name
        shutil.copytree(self.export, export)
        weights = load_file(export / "model.safetensors")
        key = next(key for key in weights if key.endswith("linear_1.weight"))
        weights[key].view(-1)[0] = len(name) + sum(map(ord, name)) / 1000
        save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
        evaluation = self.folder / f"{name}-evaluation"
        evaluation.mkdir()
        rows = [
            {"task": "colour", "question_id": f"q{i}", "cluster": str(i // 2), "score": score} | FIELDS
            for i, score in enumerate(scores)
        ]
        (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        mean = sum(scores) / len(scores)
        figures = {"macro": mean, "variants": {}, "tasks": {}, "caption": None, "questions": "q1"}
        (evaluation / "results.json").write_text(json.dumps(figures))
        return Candidate(export, evaluation, f"# {name}\n")

    def submit(self, candidate: Candidate) -> PromotionResult:
        return submit(self.config, candidate, self.run)

    def alias(self, name: str) -> int | None:
        found = self.client.get_registered_model(self.config.tracking.model_name).aliases
        return int(found[name]) if name in found else None

    def stored(self, version: int, name: str) -> Path:
        tags = self.client.get_model_version(self.config.tracking.model_name, str(version)).tags
        [path] = (self.config.root / "mlflow" / "artifacts").rglob(f"model-{tags['digest'][:12]}/{name}")
        return path


@pytest.fixture
def desk(home: tuple[Config, Run, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    config, run, export = home
    tracking = config.tracking.model_copy(update={"model_name": request.node.name})
    return Desk(config.model_copy(update={"tracking": tracking}), run, export, tmp_path)


def test_a_candidate_within_the_noise_waits_and_one_beyond_it_takes_over(desk):
    desk.submit(desk.candidate("first", WEAK))
    result = desk.submit(desk.candidate("second", [1.0, 1.0] * 4 + [0.0, 0.0] * 3 + WEAK[14:]))
    assert (result.promoted, result.champion, desk.alias("challenger")) == (False, 1, 2)
    assert result.reason.startswith(
        "version 2 is refused by gate `better`: +5.00 points on champion 1, 95 % interval -"
    )
    assert "Train further" in result.reason
    assert "version 1 stays @champion" in result.reason
    tags = desk.client.get_model_version(desk.config.tracking.model_name, "2").tags
    assert tags["gate"] == "better"
    result = desk.submit(desk.candidate("third", STRONG))
    assert result.promoted, result.reason
    assert (desk.alias("champion"), desk.alias("previous"), desk.alias("challenger")) == (3, 1, None)


def test_a_file_spoilt_in_the_store_is_refused_and_stored_anew_by_the_same_command(desk):
    candidate = desk.candidate("only", WEAK)
    with start_run(desk.config, "register", key="k") as run:
        figures = {"eval/macro/accuracy": 0.5}
        version = register_candidate(desk.config, candidate.export_dir, figures, "# card", run, questions="q1")
    path = desk.stored(version, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = desk.submit(candidate)
    assert not result.promoted
    assert "refused by gate `complete`: model.safetensors is damaged" in result.reason
    assert desk.alias("champion") is None
    assert desk.submit(candidate).promoted


def test_a_damaged_champion_is_stored_anew_by_the_same_command(desk):
    candidate = desk.candidate("whole", WEAK)
    desk.submit(candidate)
    path = desk.stored(1, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "already" in desk.submit(candidate).reason
    assert export_files(resolve_champion(desk.config).path) == export_files(candidate.export_dir)
    (path.parent / "more.bin").write_text("x")
    result = desk.submit(candidate)
    assert not result.promoted
    assert "more.bin is not in its manifest.json. Else move @champion" in result.reason


def test_a_champion_that_is_gone_refuses_the_next_one_with_what_to_type(desk):
    desk.submit(desk.candidate("lost", WEAK))
    folder = desk.stored(1, "model.safetensors").parent
    folder.rename(folder.with_name("gone"))
    result = desk.submit(desk.candidate("next", STRONG))
    assert (result.promoted, result.champion, desk.alias("challenger")) == (False, 1, 2)
    assert "refused by gate `better`: champion 1 cannot be compared with: MLflow at" in result.reason
    assert "python -m jobs.register with the settings that made it" in result.reason
    assert "delete that alias to let the next one serve" in result.reason


def test_of_two_registrations_at_once_the_better_one_serves_in_the_end(desk):
    desk.submit(desk.candidate("first", [0.0] * 20))
    both = [desk.candidate("good", [0.0, 1.0] * 10), desk.candidate("better", STRONG)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(desk.submit, both))
    better = results[1]
    assert better.promoted
    assert champion_number(desk.config) == better.version
    assert not results[0].promoted or desk.alias("previous") == results[0].version


def wait_for_waiter(lock: Path) -> None:
    """Until somebody waits for the lock, as the kernel lists it."""
    deadline = time.monotonic() + 60
    while not any(
        "->" in line and f":{lock.stat().st_ino} " in line for line in Path("/proc/locks").read_text().splitlines()
    ):
        assert time.monotonic() < deadline, "nobody asked for the lock"
        time.sleep(0.02)


def test_the_first_version_waits_for_other_registrations_then_serves_with_the_gates_on_its_card(desk):
    first = desk.candidate("first", WEAK)
    with ThreadPoolExecutor(1) as pool:
        with promotion_lock(desk.config):
            waiting = pool.submit(desk.submit, first)
            wait_for_waiter(desk.config.root / "mlflow" / "promotion.lock")
            assert not desk.client.search_registered_models(f"name = '{desk.config.tracking.model_name}'")
        result = waiting.result(timeout=120)
    assert (result.promoted, result.version, result.champion) == (True, 1, 1)
    assert [check.passed for check in result.checks] == [True] * 4
    assert (desk.alias("champion"), desk.alias("challenger")) == (1, None)
    champion = resolve_champion(desk.config)
    assert export_files(champion.path) == export_files(first.export_dir)
    card = (champion.path / "README.md").read_text()
    assert card.startswith("# first\n\n## Gate\nVersion 1 passed every gate")
    assert "| better | passed | there is no champion to beat |" in card
    assert "already" in desk.submit(first).reason, "asking again changes nothing"


def enter(desk: Desk, name: str, accuracy: float = 0.5) -> int:
    """A version of small files that never go through the gates."""
    export = desk.folder / name
    if not export.exists():
        export.mkdir()
        for file in REQUIRED_FILES:
            (export / file).write_text("{}")
        (export / "model.safetensors").write_text(name)
    metrics = {"eval/macro/accuracy": accuracy}
    return register_candidate(desk.config, export, metrics, "# card", desk.run, questions="q1")


def test_the_same_export_is_registered_once(desk):
    assert enter(desk, "one", 0.5) == enter(desk, "one", 0.6) == 1
    found = desk.client.get_model_version(desk.config.tracking.model_name, "1")
    assert found.tags["metrics"] == '{"eval/macro/accuracy": 0.6}'
    assert enter(desk, "two") == 2


def test_the_old_champion_is_the_way_back_and_a_move_that_rests_on_another_one_is_void(desk):
    one, two, three = (enter(desk, name) for name in ("one", "two", "three"))
    assert make_champion(desk.config, one, instead_of=None)
    assert make_champion(desk.config, two, instead_of=one)
    assert (desk.alias("champion"), desk.alias("previous"), desk.alias("challenger")) == (two, one, three)
    assert not make_champion(desk.config, three, instead_of=one)
    assert desk.alias("champion") == two


def test_an_incomplete_export_is_not_registered(desk):
    (desk.folder / "one").mkdir()
    with pytest.raises(ConfigError, match=r"no complete export: it lacks config\.json.*safetensors"):
        enter(desk, "one")


def test_a_damaged_artifact_is_never_served(desk):
    make_champion(desk.config, enter(desk, "one"), instead_of=None)
    desk.stored(1, "model.safetensors").write_text("changed")
    with pytest.raises(ConfigError, match="is damaged"):
        resolve_champion(desk.config)
    assert not list((desk.config.root / "models").glob(".*tmp"))


def test_the_champion_is_downloaded_once(desk):
    make_champion(desk.config, enter(desk, "one"), instead_of=None)
    champion = resolve_champion(desk.config)
    assert champion.path == desk.config.root / "models" / champion.digest
    written = (champion.path / "config.json").stat().st_mtime_ns
    assert resolve_champion(desk.config) == champion
    assert (champion.path / "config.json").stat().st_mtime_ns == written


def test_without_a_champion_the_error_names_the_command(desk):
    with pytest.raises(ConfigError, match=r"python -m jobs\.pipeline"):
        resolve_champion(desk.config)
    desk.client.create_registered_model(desk.config.tracking.model_name)
    with pytest.raises(ConfigError, match=r"python -m jobs\.pipeline"):
        resolve_champion(desk.config)


def test_promoting_a_version_that_does_not_exist_says_so(desk):
    with pytest.raises(ConfigError, match="has no version 7"):
        make_champion(desk.config, 7, instead_of=None)
