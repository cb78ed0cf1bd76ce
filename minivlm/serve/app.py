"""Ray Serve around the routes: the replica, the application, and starting and stopping it from a job.

serve run serve_app:app            or, from a job,            base_url = start_server(config)
"""

import errno
import hashlib
import ipaddress
import os
import re
import socket
import time
import urllib.error
import urllib.request

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions

from minivlm.config import Config, ConfigError
from minivlm.data.images import ImageLimits
from minivlm.errors import JobError
from minivlm.serve.api import build_api
from minivlm.serve.chat import Served
from minivlm.serve.engine import Engine
from minivlm.tracking.registry import resolve_champion

APP_NAME = "minivlm"
KEY_VARIABLE = "MINIVLM_API_KEY"
PROXY_TIMEOUT_S = 600.0
HEADROOM_REQUESTS = 32
READY_TIMEOUT_S = 120.0
POLL_EVERY_S = 0.2


class ServeError(JobError):
    """The endpoint did not start; the message says why and what to type."""


class ChatServer:
    """One replica. It resolves the champion once, here, so all its answers come from one version."""

    def __init__(self, config: Config, key_sha256: bytes | None) -> None:
        settings, data = config.serve, config.data
        champion = resolve_champion(config)
        torch.set_num_threads(settings.threads_per_replica)
        self.served = Served(config.tracking.model_name, str(champion.version), settings.max_new_tokens, key_sha256)
        self.engine = Engine(
            champion.path,
            limits=ImageLimits(
                max_bytes=data.max_image_bytes,
                max_pixels=data.max_image_pixels,
                max_side=data.max_image_side_px,
                max_aspect=data.max_aspect_ratio,
            ),
            encode_precision=config.clip.encode_precision,
            device="cuda" if settings.gpus_per_replica else "cpu",
            max_requests=settings.max_ongoing_requests + settings.max_queued_requests,
            timeout_s=settings.request_timeout_s,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve calls this after the constructor; the routes need the engine."""
        return build_api(self.engine, self.served)

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        if not self.engine.is_ready:
            raise RuntimeError("the engine is closed")


def build_app(config: Config) -> serve.Application:
    """The application of a configuration. Reads no weights and asks no registry: replicas do, when they start.

    A replica admits requests itself, so that a refusal is OpenAI's JSON with 429; Serve's own limit lies above.

    Raises:
        ConfigError: serve.host is not loopback and $MINIVLM_API_KEY is empty.
    """
    settings = config.serve
    key = os.environ.get(KEY_VARIABLE, "")
    check_exposure(settings.host, key)
    deployment = serve.deployment(
        serve.ingress()(ChatServer),
        name="ChatServer",
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=settings.max_ongoing_requests + settings.max_queued_requests + HEADROOM_REQUESTS,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        max_constructor_retry_count=2,
    )
    resolved = config.model_copy(update={"storage_path": config.root})
    return deployment.bind(resolved, hashlib.sha256(key.encode()).digest() if key else None)


def start_server(config: Config) -> str:
    """Serve the champion on config.serve.host and port, and return once it answers. Ray must be initialised.

    Where Serve already runs on this cluster, its application is replaced; host and port stay as they were started.

    Returns:
        Base URL without a slash at the end, for example `http://127.0.0.1:8000`.

    Raises:
        ConfigError: occupied port, or a host that needs an API key.
        ServeError: a replica did not start, or nothing answered in time.
        Whatever resolve_champion raises where there is no champion yet.
    """
    host, port = config.serve.host, config.serve.port
    app = build_app(config)
    resolve_champion(config)
    if not serve.status().proxies:
        check_port_free(host, port)
        serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=PROXY_TIMEOUT_S))
    try:
        serve.run(app, name=APP_NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:
        cause = failure_cause(_report() or str(error))
        hint = "" if "python -m" in cause else ". Where nothing was trained yet, type: python -m jobs.pipeline"
        raise ServeError(f"The endpoint did not start: {cause}{hint}") from None
    base_url = f"http://{_dialled(host)}:{port}"
    _wait_ready(base_url)
    return base_url


def stop_server() -> None:
    """Take the application and Serve itself down, and free the port; without a server this does nothing."""
    serve.shutdown()


def check_port_free(host: str, port: int) -> None:
    """Raise ConfigError, with what to type, where something already listens on the port or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"serve.port {port} on {host} is in use by another program: type serve.port={port + 1}, "
                    f"or find and end what listens there (ss -ltnp 'sport = :{port}')"
                ) from None
            raise ConfigError(
                f"cannot listen on serve.host {host}, serve.port {port} ({error.strerror}): type serve.host=127.0.0.1"
            ) from None


def check_exposure(host: str, key: str) -> None:
    """Raise ConfigError where `host` can be reached from other machines and there is no API key."""
    if not key and not _is_loopback(host):
        raise ConfigError(
            f"serve.host is {host}, which other machines can reach, and ${KEY_VARIABLE} is empty: "
            f"type export {KEY_VARIABLE}=$(openssl rand -hex 24), or serve.host=127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _dialled(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _report() -> str:
    """What Serve says about the deployments of this application, tracebacks included."""
    application = serve.status().applications.get(APP_NAME)
    return "\n".join(item.message for item in application.deployments.values()) if application else ""


def failure_cause(message: str) -> str:
    """The line of Serve's report that names the error, without the traceback around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b.*: ", line)]
    cause = (errors or lines or ["no reason was given"])[-1].rstrip(".")
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", cause)


def _wait_ready(base_url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base_url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_EVERY_S)
    raise ServeError(
        f"{base_url}/ready did not answer within {READY_TIMEOUT_S:g} s: look at the replica's log in the Ray dashboard "
        "(Serve), or type: ray logs"
    )
