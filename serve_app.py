"""The champion over HTTP: `serve run serve_app:app`.

Settings come from the file named in $MINIVLM_CONFIG, else from configs/tiny.yaml beside this file. Importing this
reads neither weights nor the registry. `serve run` listens on 127.0.0.1:8000 whatever serve.host and serve.port say.
"""

import os
from pathlib import Path

from minivlm.config import load_config
from minivlm.serve.app import build_app

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "tiny.yaml"

app = build_app(load_config(Path(os.environ.get("MINIVLM_CONFIG", DEFAULT_CONFIG))))
