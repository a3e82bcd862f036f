"""How much one body may hold and ask for."""

import json

import pytest

from minisgl.server.body import ApiError
from minisgl.server.openai import parse_completion
from tests.server.fake_engine import served_model

MODEL = served_model()


def test_choices_are_counted_over_all_prompts_before_any_is_encoded():
    content = json.dumps({"prompt": ["a"] * 1024, "n": 128}).encode()
    with pytest.raises(ApiError, match="at most 1024 choices of all prompts, got 131072") as caught:
        parse_completion(content, MODEL)
    assert caught.value.body["error"]["param"] == "n"
    for prompts, n in ((1024, 1), (8, 128)):
        content = json.dumps({"prompt": ["a"] * prompts, "n": n}).encode()
        assert len(parse_completion(content, MODEL).requests) == prompts
