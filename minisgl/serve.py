"""`python -m minisgl.serve`: one engine in its own process behind an OpenAI-compatible server.

The flags are the fields of `ServerConfig`. The engine starts to load first; the HTTP stack is
imported meanwhile and listens at once, /health saying 503 until the engine is warm. SIGTERM or
Ctrl-C finishes what runs and exits 0; a second one does not wait. If the engine dies, its requests
get errors and the server exits 1 with the reason.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from minisgl.config import ServerConfig
from minisgl.flags import flags_parser, read_flags
from minisgl.log import configure, get_logger

if TYPE_CHECKING:
    from minisgl.engine.messages import EngineInfo
    from minisgl.engine.process import EngineProcess
    from minisgl.server.calls import ServedModel

FACTORY = "minisgl.build:build_engine"
BACKLOG = 2048  # connections that wait to be accepted
STOPS = (signal.SIGTERM, signal.SIGINT)
ENGINE_EXIT_SECONDS = 10  # after `drain_timeout`, until open connections are closed
LEAVE_SECONDS = 1  # the same after a second signal

log = get_logger(__name__)


def main(args: Sequence[str] | None = None) -> int:
    early: list[int] = []  # signals to stop that came before the server could act on them
    for number in STOPS:
        signal.signal(number, lambda number, _: early.append(number))
    parser = flags_parser(ServerConfig, "minisgl.serve", "Serve a model over OpenAI's API.")
    config, _ = read_flags(parser, ServerConfig, args)
    if config.node_rank != 0:
        return _run_ranks(config, early)
    configure(config.log_level, "server")
    try:
        if config.chat_template is not None:
            from minisgl.server.chat_template import read_template

            read_template(config.chat_template)  # refused before a model is loaded
        listening = _listen(config)
    except (OSError, ValueError) as error:
        print(f"minisgl.serve: {error}", file=sys.stderr)
        return 1
    if early:
        listening.close()
        return 0
    from minisgl.engine.process import EngineProcess

    process = EngineProcess(FACTORY, config)
    try:
        import uvloop  # imported here, with what follows, while the engine loads

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, process, listening, early))
    finally:
        process.close()
        listening.close()


def _run_ranks(config: ServerConfig, early: list[int]) -> int:
    """Run the ranks of a node other than 0, which serves nothing. A signal ends it at once."""
    configure(config.log_level, f"node {config.node_rank}")
    for number in STOPS:
        signal.signal(number, lambda number, _: sys.exit(0))
    if early:
        return 0
    from minisgl.build import run_ranks

    try:
        run_ranks(config)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"minisgl.serve: {error}", file=sys.stderr)
        return 1
    return 0


def _listen(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {config.host}:{config.port}: {reason}") from error


async def _serve(
    config: ServerConfig, process: "EngineProcess", listening: socket.socket, early: list[int]
) -> int:
    from minisgl.engine.client import EngineDeadError, ProcessClient
    from minisgl.server.app import Api
    from minisgl.server.connections import Bounds, HttpServer, connections_within_descriptors

    client = ProcessClient(process, watchdog_timeout=config.watchdog_timeout)
    api = Api(client)
    bounds = Bounds(connections=connections_within_descriptors())
    http = HttpServer(api.app, bounds, "info" if config.log_level == "debug" else "error")
    closing: list[asyncio.Task[None]] = []

    def stop() -> None:
        if http.should_exit:
            process.kill()  # its requests get an error
            http.leave(LEAVE_SECONDS)
            return
        log.info(
            "finishing running requests, up to %g s, then exiting; a second signal exits now",
            config.drain_timeout,
        )
        http.leave(config.drain_timeout + ENGINE_EXIT_SECONDS)
        closing.append(asyncio.create_task(client.close(config.drain_timeout)))

    for number in STOPS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    if early:
        stop()

    async def until_failure() -> str:
        """Open the API when the engine is ready; returns why it failed, once it has."""
        try:
            await client.ready()
            model = await asyncio.to_thread(_served_model, client.info, config)
        except (EngineDeadError, OSError, ValueError) as error:
            return str(error)
        api.open(model)
        _say(_banner(client.info, model.name, listening), sys.stdout)
        return await client.failed()

    serving = asyncio.create_task(http.serve([listening]))
    failing = asyncio.create_task(until_failure())
    await asyncio.wait((serving, failing), return_when=asyncio.FIRST_COMPLETED)
    if failed := failing.done() and not closing:  # a stop while loading kills the engine
        _say(f"minisgl.serve: {failing.result()}", sys.stderr)
        http.leave(ENGINE_EXIT_SECONDS)
    await serving
    await asyncio.gather(client.close(), *closing)
    failing.cancel()
    return 1 if failed else 0


def _served_model(info: "EngineInfo", config: ServerConfig) -> "ServedModel":
    from minisgl.server.answer import REASONING_FORMATS, chosen, told
    from minisgl.server.calls import ServedModel
    from minisgl.server.tokenizer import Tokenizer
    from minisgl.server.tool_formats import TOOL_FORMATS

    tokenizer = Tokenizer.from_directory(info.model_path, config.chat_template)
    template = tokenizer.chat_template.source if tokenizer.chat_template else ""
    tools = chosen(config.tool_call_parser, TOOL_FORMATS, template)
    reasoning = chosen(config.reasoning_parser, REASONING_FORMATS, template)
    log.info(
        "parser of tool calls: %s; of reasoning: %s",
        told(config.tool_call_parser, TOOL_FORMATS, tools),
        told(config.reasoning_parser, REASONING_FORMATS, reasoning),
    )
    return ServedModel(
        name=config.served_model_name or info.model,
        tokenizer=tokenizer,
        limits=info.limits,
        sampling_defaults=info.sampling_defaults,
        has_priorities=config.schedule_policy == "priority",
        tool_format=tools,
        reasoning=reasoning,
    )


def _say(text: str, stream: TextIO) -> None:
    """Write to a standard stream, whose file may be full or closed: that ends no server."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        log.warning("cannot write to %s: %s", stream.name, error.strerror)
        # What it still holds would fail again at exit, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _banner(info: "EngineInfo", name: str, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    limits = info.limits
    return (
        f"serving {name} ({info.architecture}, {info.dtype}) on {info.device} at {url}/v1\n"
        f"context {limits.max_context} tokens, KV pool {limits.pool_tokens} tokens, "
        f"up to {limits.max_rows} sequences at once"
    )


if __name__ == "__main__":
    sys.exit(main())
