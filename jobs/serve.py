"""Serve @champion behind an OpenAI-compatible endpoint and a chat page until Ctrl-C.

    python -m jobs.serve --config configs/tiny.yaml serve.port=8001

The same application on a cluster: MINIVLM_CONFIG=configs/gpu.yaml serve run serve_app:app
"""

import signal
from pathlib import Path

from jobs.common import CONFIG, OVERRIDES, run_job
from minivlm.config import load_config
from minivlm.serve.app import check_port_free, start_server, stop_server
from minivlm.workflow.cluster import connect


def main(overrides: list[str] = OVERRIDES, config: Path = CONFIG) -> None:
    settings = load_config(config, overrides or [])
    check_port_free(settings.serve.host, settings.serve.port)
    connect(settings)
    print(f"serving at {start_server(settings)}/ (Ctrl-C stops it)", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        stop_server()


if __name__ == "__main__":
    run_job(main)
