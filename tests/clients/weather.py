"""What the clients' tests ask for."""

from typing import Literal

import pydantic

MESSAGES = [{"role": "user", "content": "How is the weather in Oslo?"}]


class Weather(pydantic.BaseModel):
    """The weather at a place."""

    place: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=0, le=9)
    kind: Literal["rain", "wind"]
