"""The registry on a real SQLite database: idempotent versions, the promotion gate, the champion's download."""

import math
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from minivlm.config import Config, ConfigError
from minivlm.tracking.card import model_card, result_metrics
from minivlm.tracking.client import connect
from minivlm.tracking.registry import export_files, promote, register_candidate, resolve_champion
from minivlm.tracking.runs import start_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = Config(storage_path=tmp_path_factory.mktemp("home"))
    connect(config)
    return config


@pytest.fixture
def config(home: Config, request: pytest.FixtureRequest) -> Config:
    """A registered model of its own for every test, in one database."""
    tracking = home.tracking.model_copy(update={"model_name": request.node.name})
    return home.model_copy(update={"tracking": tracking})


@pytest.fixture
def client(config: Config) -> MlflowClient:
    return connect(config)


def make_export(folder: Path, weights: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "deep/more.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return folder


def register(config: Config, export: Path, accuracy: float, questions: str = "q1") -> int:
    with start_run(config, "register", key=config.tracking.model_name) as run:
        return register_candidate(config, export, {"eval/macro/accuracy": accuracy}, "# card", run, questions=questions)


def alias(client: MlflowClient, config: Config, name: str) -> int | None:
    found = client.get_registered_model(config.tracking.model_name).aliases
    return int(found[name]) if name in found else None


def test_the_same_export_is_registered_once(config, client, tmp_path):
    export = make_export(tmp_path / "a", "one")
    assert register(config, export, 0.5) == register(config, export, 0.6) == 1
    assert client.get_model_version(config.tracking.model_name, "1").tags["metrics"] == '{"eval/macro/accuracy": 0.6}'
    assert register(config, make_export(tmp_path / "b", "two"), 0.5) == 2


def test_the_first_candidate_becomes_champion(config, client, tmp_path):
    version = register(config, make_export(tmp_path / "a", "one"), 0.5)
    assert alias(client, config, "challenger") == 1
    result = promote(config, version)
    assert (result.promoted, result.champion) == (True, 1)
    assert alias(client, config, "champion") == 1
    assert alias(client, config, "challenger") is None
    assert promote(config, version).promoted, "asking again changes nothing"


def test_a_better_candidate_takes_over_and_leaves_the_way_back(config, client, tmp_path):
    promote(config, register(config, make_export(tmp_path / "a", "one"), 0.5))
    result = promote(config, register(config, make_export(tmp_path / "b", "two"), 0.51))
    assert (result.promoted, result.champion) == (True, 2)
    assert alias(client, config, "champion") == 2
    assert alias(client, config, "previous") == 1


@pytest.mark.parametrize("accuracy", [0.5, 0.4])
def test_a_candidate_that_is_not_better_is_refused_and_waits(config, client, tmp_path, accuracy):
    promote(config, register(config, make_export(tmp_path / "a", "one"), 0.5))
    result = promote(config, register(config, make_export(tmp_path / "b", "two"), accuracy))
    assert (result.promoted, result.champion) == (False, 1)
    assert "does not beat champion 1 with 0.5000" in result.reason
    assert alias(client, config, "champion") == 1
    assert alias(client, config, "challenger") == 2


def test_a_candidate_tested_on_other_questions_is_refused(config, tmp_path):
    promote(config, register(config, make_export(tmp_path / "a", "one"), 0.5))
    result = promote(config, register(config, make_export(tmp_path / "b", "two"), 0.9, questions="q2"))
    assert not result.promoted
    assert "other questions (q2) than champion 1 (q1)" in result.reason


def test_a_metric_that_is_not_finite_is_refused(config, tmp_path):
    result = promote(config, register(config, make_export(tmp_path / "a", "one"), math.nan))
    assert not result.promoted
    assert "not a finite number" in result.reason


def test_an_artifact_that_lost_a_file_is_refused(config, tmp_path):
    version = register(config, make_export(tmp_path / "a", "one"), 0.5)
    stored = (config.root / "mlflow" / "artifacts").rglob("more.json")
    newest = max(stored, key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    result = promote(config, version)
    assert not result.promoted
    assert "deep/more.json is missing" in result.reason


def test_an_incomplete_export_is_not_registered(config, tmp_path):
    export = make_export(tmp_path / "a", "one")
    (export / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no complete export: it lacks \*\.safetensors"):
        register(config, export, 0.5)


def test_the_champion_is_downloaded_once_and_equals_the_export(config, tmp_path):
    export = make_export(tmp_path / "a", "one")
    promote(config, register(config, export, 0.5))
    champion = resolve_champion(config)
    assert champion.path == config.root / "models" / champion.digest
    assert export_files(champion.path) == export_files(export)
    assert (champion.path / "README.md").read_text() == "# card"
    marker = champion.path / "config.json"
    written = marker.stat().st_mtime_ns
    assert resolve_champion(config) == champion
    assert marker.stat().st_mtime_ns == written


def test_a_damaged_artifact_is_never_served(config, tmp_path):
    promote(config, register(config, make_export(tmp_path / "a", "a weight of its own"), 0.5))
    for path in (config.root / "mlflow" / "artifacts").rglob("model.safetensors"):
        if path.read_text() == "a weight of its own":
            path.write_text("changed")
    with pytest.raises(ConfigError, match="is damaged"):
        resolve_champion(config)
    assert not list((config.root / "models").glob(".*tmp"))


def test_without_a_champion_the_error_names_the_command(config, client):
    with pytest.raises(ConfigError, match=r"python -m jobs\.pipeline"):
        resolve_champion(config)
    client.create_registered_model(config.tracking.model_name)
    with pytest.raises(ConfigError, match=r"python -m jobs\.pipeline"):
        resolve_champion(config)


def test_promoting_a_version_that_does_not_exist_says_so(config):
    with pytest.raises(ConfigError, match="has no version 7"):
        promote(config, 7)


def figures(accuracy: float) -> dict:
    variants = {"shuffled": {"accuracy": 0.25, "n": 100, "low": 0.2, "high": 0.3}}
    return {"n": 100, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "variants": variants}


RESULTS = {
    "name": "mpo", "stage": "mpo", "questions": "q1", "num_questions": 200,
    "macro": 0.85, "macro_low": 0.8, "macro_high": 0.9, "shuffled_macro": 0.25,
    "variants": {"shuffled": {"macro": 0.25, "n": 200, "skipped": {}}},
    "tasks": {"colour": figures(0.9), "count": figures(0.8)}, "caption": None,
}  # fmt: skip


def test_results_become_metrics_and_the_macro_mean_is_the_gate():
    metrics = result_metrics(RESULTS)
    assert metrics["eval/macro/accuracy"] == 0.85
    assert metrics["eval/count/accuracy"] == 0.8
    assert (metrics["eval/macro/shuffled"], metrics["eval/colour/shuffled"]) == (0.25, 0.25)


def test_captions_alone_are_judged_by_their_tokens():
    caption = {"n": 6, "token_accuracy": 0.95, "low": 0.9, "high": 1.0, "variants": {}}
    results = RESULTS | {"macro": None, "shuffled_macro": None, "variants": {}, "tasks": {}, "caption": caption}
    assert result_metrics(results)["eval/macro/accuracy"] == 0.95
    assert "| caption (tokens) | 6 | 95.0 [90.0, 100.0] | - |" in model_card(Config(), [results])


def test_the_card_shows_every_stage_with_interval_and_shuffled_score():
    first = RESULTS | {
        "name": "sft",
        "stage": "sft",
        "tasks": {"colour": figures(0.6), "count": figures(0.5)},
        "macro": 0.55,
    }
    card = model_card(Config(), [first, RESULTS])
    assert "| task | questions | sft | shuffled | mpo | shuffled |" in card
    assert "| colour | 100 | 60.0 [55.0, 65.0] | 25.0 | 90.0 [85.0, 95.0] | 25.0 |" in card
    assert "LlavaForConditionalGeneration.from_pretrained" in card


def test_the_card_says_which_library_loads_the_model():
    stock, own = (model_card(Config(model={"projector": kind}), [RESULTS]) for kind in ("linear", "resampler"))
    assert "LlavaForConditionalGeneration.from_pretrained(FOLDER)" in stock
    assert "LlavaForConditionalGeneration" not in own
    assert "Plain transformers cannot load it" in own
    assert "load_export(FOLDER)" in own
