"""Logging: one format, one handler, every line naming the process it came from."""

import logging
import sys

ROOT_LOGGER = "minisgl"
HTTP_LOGGER = "uvicorn"  # the library that reads HTTP writes to the same log


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`get_logger(__name__)`); silent below WARNING until `configure`."""
    return logging.getLogger(name if name.startswith(ROOT_LOGGER) else f"{ROOT_LOGGER}.{name}")


def configure(level: str = "info", process: str = "") -> None:
    """Send minisgl's log to stderr. Called once by whoever owns the process; again replaces it.

    level: debug, info, warning or error (any case). process: what the lines are prefixed with,
    for example "server", "engine 0" or "rank 1". ValueError names an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log_level must be debug, info, warning or error, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    who = f" {process}".replace("%", "%%") if process else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s{who} %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    for name in (ROOT_LOGGER, HTTP_LOGGER):
        root = logging.getLogger(name)
        for old in root.handlers[:]:
            root.removeHandler(old)
        root.addHandler(handler)
        root.setLevel(number)
        root.propagate = False


def shown_by() -> logging.Logger:
    """The logger whose handlers show minisgl's log: the user's where it was not configured."""
    ours = logging.getLogger(ROOT_LOGGER)
    return ours if ours.handlers else logging.getLogger()


def shows_progress() -> bool:
    """Whether to show progress bars: stderr is a terminal and the level is info or lower."""
    return sys.stderr.isatty() and logging.getLogger(ROOT_LOGGER).isEnabledFor(logging.INFO)
