"""`fairlead serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fairlead.commands.marks import build, watermark_options
from fairlead.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from .service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@click.option("--model", required=True, help="Folder, hub id or zoo:NAME of a causal language model.")
@click.option("--name", "served", default=None, help="Name under which it is asked for (default: what --model says).")
@click.option("--decoder", default=None, help="Registered decoder, such as best-of-n (default: plain sampling).")
@click.option("--decoder-set", multiple=True, metavar="NAME=VALUE", help="A setting of the decoder; may be repeated.")
@click.option("--reward", default=None, help="Registered reward for the decoder.")
@click.option("--reward-set", multiple=True, metavar="NAME=VALUE", help="A setting of the reward; may be repeated.")
@watermark_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; others than this machine's need a key.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one and prints it.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File of keys, one a line; default: the key in FAIRLEAD_API_KEY.")
@click.option("--no-auth", is_flag=True, help="Let everybody in, from other machines too.")
@click.option("--queue", default=64, show_default=True, help="Requests that may wait; more get a 429.")
@click.option("--batch-size", default=32, show_default=True, help="Answers written at a time.")
@click.option("--max-tokens", default=1024, show_default=True, help="Longest answer that a request may ask for.")
@click.option("--max-body", default=1 << 20, show_default=True, help="Largest body, in bytes.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds for a request, waiting included.")
@click.option("--grace", default=30.0, show_default=True, help="Seconds to finish what runs when told to stop.")
def serve(
    model: str, served: str | None, decoder: str | None, decoder_set: tuple[str, ...], reward: str | None,
    reward_set: tuple[str, ...], name: str | None, settings: tuple[str, ...], key_file: Path | None, host: str, port: int,
    api_key_file: Path | None, no_auth: bool, queue: int, batch_size: int, max_tokens: int, max_body: int, timeout: float,
    grace: float,
) -> None:  # fmt: skip
    """Serve a model at /v1/completions and /v1/chat/completions, as OpenAI's clients ask for it.

    Plain sampling and token search stream word by word; other decoders answer a stream in one piece. Ctrl-C or SIGTERM
    finishes what runs and refuses what is new; the second one leaves at once.
    """
    try:
        from .app import build_app
        from .jobs import Limits
        from .limits import ApiKeys
        from .server import GracefulServer, configure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f'serving needs {error.name}; pip install "fairlead-decoding[serve]"') from None
    for option, value in (("--queue", queue), ("--batch-size", batch_size), ("--max-tokens", max_tokens), ("--max-body", max_body), ("--timeout", timeout)):
        if value <= 0:
            raise InputError(f"{option}: must be above 0, got {value}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        keys = ApiKeys.find(api_key_file)
    for warning in told:
        click.echo(f"warning: {warning.message}", err=True)
    if keys is None and host not in LOOPBACK and not no_auth:
        raise InputError(f"--host {host}: other machines could use it; give a key (FAIRLEAD_API_KEY or --api-key-file), or --no-auth")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    listener = _listen(host, port)
    limits = Limits(queue=queue, rows=batch_size, tokens=max_tokens, body=max_body, timeout=timeout)
    chosen = (decoder, decoder_set, reward, reward_set, name, settings, key_file)
    with listener, _service(model, served or model, limits, *chosen) as service:
        server = GracefulServer(configure(build_app(service, None if no_auth else keys), service), service, grace)
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"{service.name} at http://{shown}:{listener.getsockname()[1]}/v1", err=False)
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded: a port in use should be said at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot be listened at ({getattr(error, 'strerror', None) or error})") from None


def _service(
    model: str, served: str, limits: Any, decoder: str | None, decoder_set: tuple[str, ...], reward: str | None,
    reward_set: tuple[str, ...], name: str | None, settings: tuple[str, ...], key_file: Path | None,
) -> Service:  # fmt: skip
    from fairlead import registry
    from fairlead.cli import parse_settings
    from fairlead.models import load, logits_width

    from .service import Service

    for option, value, owner in (("--decoder-set", decoder_set, decoder), ("--reward-set", reward_set, reward), ("--set", settings or key_file, name)):
        if value and owner is None:
            raise InputError(f"{option}: belongs to a method that is not named; name it or leave this out")
    if reward is not None and decoder is None:
        raise InputError(f"--reward {reward}: is what a decoder chooses by; name one with --decoder, such as best-of-n")
    if name is not None:
        registry.get("watermark", name)
    search = None if decoder is None else registry.create("decoder", decoder, **parse_settings(decoder_set))
    judge = None if reward is None else registry.create("reward", reward, **parse_settings(reward_set))
    if search is not None and search.needs_reward and judge is None and not hasattr(search.config, "heuristics"):
        raise InputError(f"--decoder {decoder}: needs a reward; name one with --reward ('fairlead methods --kind reward')")
    loaded, tokenizer = load(model)
    mark = None if name is None else build(name, settings, key_file, logits_width(loaded))
    return Service(loaded, tokenizer, name=served, decoder=search, reward=judge, watermark=mark, limits=limits)
