"""What is checked before anything is served."""

import importlib
import socket

import pytest

from minivlm.config import ConfigError
from minivlm.serve.app import check_exposure, check_port_free, failure_cause


def test_an_occupied_port_says_what_to_type():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.port {port} .* type serve.port={port + 1}"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)


def test_a_foreign_address_says_what_to_type():
    with pytest.raises(ConfigError, match=r"type serve.host=127\.0\.0\.1"):
        check_port_free("192.0.2.1", 8000)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_need_a_key(host):
    with pytest.raises(ConfigError, match="MINIVLM_API_KEY"):
        check_exposure(host, "")
    check_exposure(host, "secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host):
    check_exposure(host, "")


def test_importing_the_application_writes_and_reads_nothing(tmp_path, monkeypatch):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"storage_path: {tmp_path}/home\n")
    monkeypatch.setenv("MINIVLM_CONFIG", str(settings))
    assert importlib.import_module("serve_app").app is not None
    assert not (tmp_path / "home").exists()


def test_of_serves_traceback_only_the_cause_is_shown():
    report = """The deployment failed to start 2 times in a row. Error:
      File "/somewhere/replica.py", line 1928, in initialize
        raise RuntimeError(traceback.format_exc()) from None
    RuntimeError: Traceback (most recent call last):
        raise TrackingError(
    minivlm.tracking.client.TrackingError: No champion: nothing was promoted yet. Run: python -m jobs.pipeline"""
    assert failure_cause(report) == "TrackingError: No champion: nothing was promoted yet. Run: python -m jobs.pipeline"
