"""No template loses what a user said: strings and parts, over the styles of published models."""

from typing import Any

import pytest

from minisgl.server.chat_template import ChatTemplate
from tests.server.public_templates import STYLES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "speak of ferries"}
SHORT = [{"role": "user", "content": "wie groß ist der Fluß?"}]
LONG = [*SHORT, {"role": "assistant", "content": "sehr"}, {"role": "user", "content": "und\nnun?"}]
each = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, with every content as one text part."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def lost(rendered: str, messages: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages if m["content"] not in rendered]


@pytest.fixture(scope="module")
def oracle():
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), **SPECIAL)

    def render(source, messages):
        options = {"chat_template": source, "tokenize": False, "add_generation_prompt": True}
        return tokenizer.apply_chat_template(messages, **options)

    return render


def test_there_are_thirty_styles_of_each_kind_some():
    assert len(STYLES) >= 30
    assert {style.reads for style in STYLES.values()} == {"string", "parts", "both"}
    assert {style.system for style in STYLES.values()} == {"read", "refused", "dropped"}


@each
@pytest.mark.parametrize(
    "messages", [SHORT, LONG, [SYSTEM, *LONG]], ids=["short", "long", "system"]
)
def test_either_form_renders_what_transformers_renders_of_the_form_it_reads(
    oracle, style, messages
):
    if messages[0] is SYSTEM and style.system != "read":
        pytest.skip("there is no system role")
    template = ChatTemplate(style.source, SPECIAL)
    readable = as_parts(messages) if style.reads == "parts" else messages
    expected = oracle(style.source, readable)
    assert lost(expected, messages) == []
    assert template.render(messages) == expected
    assert template.render(as_parts(messages)) == expected
    mixed = [messages[0], *as_parts(messages[1:])]
    assert template.render(mixed) == expected


@each
def test_the_other_form_would_have_lost_or_spoiled_the_text(oracle, style):
    """So the test above can fail: a template rendered as it is, in the form it cannot read."""
    if style.reads == "both":
        assert oracle(style.source, as_parts(LONG)) == oracle(style.source, LONG)
        return
    wrong = LONG if style.reads == "parts" else as_parts(LONG)
    try:
        rendered = oracle(style.source, wrong)
    except Exception:  # what a template cannot do, it refuses by whatever error comes
        return
    assert lost(rendered, LONG) or "'type'" in rendered


@each
def test_a_system_message_is_read_or_the_error_says_whose_text_is_not(style):
    template = ChatTemplate(style.source, SPECIAL)
    for messages in ([SYSTEM, *SHORT], as_parts([SYSTEM, *SHORT])):
        if style.system == "read":
            assert lost(template.render(messages), [SYSTEM, *SHORT]) == []
            continue
        words = {"dropped": r"leaves out messages\[0\], of role 'system'", "refused": "refused"}
        with pytest.raises(ValueError, match=words[style.system]):
            template.render(messages)


@each
def test_every_part_of_a_message_is_read(style):
    parts = [{"type": "text", "text": text} for text in ("first", "second")]
    template = ChatTemplate(style.source, SPECIAL)
    if style is STYLES["first part"]:
        with pytest.raises(ValueError, match=r"leaves out messages\[0\], of role 'user'"):
            template.render([{"role": "user", "content": parts}])
        return
    rendered = template.render([{"role": "user", "content": parts}])
    assert rendered.index("first") < rendered.index("second")
    if style.reads != "parts":
        assert "first\nsecond" in rendered


@pytest.mark.parametrize("said", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_nothing_said_is_nothing_lost(said):
    template = ChatTemplate(STYLES["phi 3"].source, SPECIAL)
    spoken = template.render(SHORT)
    assert template.render([{"role": "system", "content": said}, *SHORT]) == spoken


def test_what_a_template_takes_out_of_a_text_is_its_own_business():
    thought = {"role": "assistant", "content": "<think>hm</think>ja"}
    for name in ("qwen 3", "deepseek r1"):
        rendered = ChatTemplate(STYLES[name].source, SPECIAL).render([*SHORT, thought, *SHORT])
        assert "ja" in rendered
        assert "hm" not in rendered


def test_a_text_that_happens_to_stand_elsewhere_is_missed_all_the_same():
    with pytest.raises(ValueError, match=r"leaves out messages\[0\]"):
        ChatTemplate(STYLES["phi 3"].source).render([{"role": "system", "content": "user"}, *SHORT])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hi", r"messages\[1\]: Expected `object`, got `str`"),
        ({"content": "x"}, r"messages\[1\]: Object missing required field `role`"),
        ({"role": "user", "content": 5}, r"messages\[1\].content: .*, got `int`"),
        ({"role": "user", "content": ["x"]}, r"messages\[1\].content\[0\]: .*, got `str`"),
        (
            {"role": "user", "content": [{"type": "image", "url": "x"}]},
            r"messages\[1\].content\[0\]",
        ),
    ],
)
def test_what_is_no_message_is_named(message, error):
    with pytest.raises(ValueError, match=error):
        ChatTemplate(STYLES["chatml"].source).render([*SHORT, message])
