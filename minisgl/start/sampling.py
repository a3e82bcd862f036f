"""How a model's tokens are drawn where a request says nothing: as its makers recommend."""

from pathlib import Path

from minisgl.config import EngineConfig
from minisgl.core.request import NEUTRAL, SamplingParams
from minisgl.log import get_logger
from minisgl.models.config import read_generation
from minisgl.models.fields import Fields
from minisgl.models.hub import PACKAGED

log = get_logger(__name__)


def read_sampling_defaults(config: EngineConfig, path: Path) -> dict[str, int | float]:
    """What the model at `path` recommends, by field, or is recommended for its name, and NEUTRAL
    where that says nothing either.

    All is NEUTRAL with the config's `sampling_defaults` openai. A `do_sample` of false makes the
    model greedy. Raises ValueError naming file, field and value.
    """
    recommended, file = read_generation(path)
    if config.model in PACKAGED and not recommended:
        recommended, file = PACKAGED[config.model].generation, f"recommended for {config.model}"
    recommends = config.sampling_defaults == "model" and bool(recommended)
    stated = Fields(recommended if recommends else {}, file, {})
    try:
        said = SamplingParams(**{name: stated.values.get(name) for name in NEUTRAL}).completed()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}; sampling_defaults openai leaves it out") from error
    found = {name: getattr(said, name) for name in NEUTRAL}
    if stated.given("do_sample") and not stated.boolean("do_sample"):
        found["temperature"] = 0.0
    shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
    log.info("where a request says nothing: %s (%s)", shown, file if recommends else "OpenAI's")
    return found
