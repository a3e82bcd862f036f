"""The offline API on a random model: what goes in, what comes out, what is refused."""

import dataclasses
import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from minisgl import LLM, RequestOutput, SamplingParams
from minisgl.config import EngineConfig
from minisgl.core.request import NEUTRAL, RANGES
from minisgl.llm import make_config
from tests.server.small_tokenizers import CORPUS
from tests.world.engine import make_engine, make_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
OPTIONS = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "max_total_tokens": 2048,
    "max_running_requests": 8,
    "log_level": "warning",
}


@pytest.fixture(scope="module")
def llm(model_directory: Path):
    with LLM(model_directory, **OPTIONS) as llm:
        yield llm


def test_one_prompt_gives_one_output_and_a_list_a_list_in_order(llm):
    texts = [text[:length] for text, length in zip(CORPUS[:4], (5, 60, 17, 30), strict=True)]
    mixed = [texts[0], llm.tokenizer.encode(texts[1]), tuple(llm.tokenizer.encode(texts[2]))]
    together = llm.generate([*mixed, texts[3]], GREEDY, use_tqdm=False)
    for text, output in zip(texts, together, strict=True):
        alone = llm.generate(text, GREEDY, use_tqdm=False)
        assert isinstance(alone, RequestOutput)
        assert alone.prompt == text
        assert output.prompt_token_ids == alone.prompt_token_ids == llm.tokenizer.encode(text)
        assert output.token_ids == alone.token_ids
        assert output.text == alone.text == llm.tokenizer.decode(output.token_ids)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.token_ids) == 24
        assert 0 < output.ttft <= output.e2e
    assert together[1].prompt is None
    assert llm.generate([], GREEDY) == []
    assert isinstance(llm.generate([texts[0]], use_tqdm=False, sampling_params=GREEDY), list)


@pytest.mark.filterwarnings("error")  # as numpy's of an overflow
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "seed"])
def test_the_ends_of_a_range_compute_without_a_warning(llm, name):
    least, most = RANGES[name]
    for value in (least or 5e-324, most):
        for temperature in (0.0, 1e-5, 1.0):
            params = SamplingParams(
                **{"temperature": temperature, "seed": 3, name: value}, max_tokens=4, logprobs=1
            )
            (choice,) = llm.generate("a b a", params, use_tqdm=False).outputs
            assert all(math.isfinite(entry.logprob) for entry in choice.logprobs)
            if (name, value) in (("top_p", 5e-324), ("min_p", 1.0)):  # the likeliest alone
                assert choice.token_ids == [entry.top_ids[0] for entry in choice.logprobs]


def test_a_models_recommendation_holds_where_a_request_says_nothing(model_directory, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "model")
    file = directory / "generation_config.json"
    file.write_text(json.dumps({"top_k": 1, "repetition_penalty": 5.0}))
    prompt, seeded = "a b", SamplingParams(max_tokens=12, seed=5, ignore_eos=True)

    def ids(llm, **changes):
        return llm.generate(prompt, replace(seeded, **changes), use_tqdm=False).token_ids

    with LLM(directory, **OPTIONS) as llm, LLM(model_directory, **OPTIONS) as plain:
        assert llm.info.sampling_defaults == NEUTRAL | {"top_k": 1, "repetition_penalty": 5.0}
        recommended = ids(plain, temperature=0.0, repetition_penalty=5.0)
        assert ids(llm) == recommended != ids(plain)
        assert ids(llm, top_k=0, repetition_penalty=1.0) == ids(plain)
        assert ids(llm, temperature=0.0, repetition_penalty=1.0) == ids(plain, temperature=0.0)
        said = llm.generate(prompt, use_tqdm=False).token_ids  # without any parameters
        assert said[:12] == recommended[: len(said)]
    file.write_text(json.dumps({"do_sample": False}))
    with LLM(directory, **OPTIONS) as greedy:
        assert ids(greedy) == ids(greedy, temperature=0.0)
        assert ids(greedy, temperature=1.0) != ids(greedy)
    with LLM(directory, sampling_defaults="openai", **OPTIONS) as llm:
        assert llm.info.sampling_defaults == NEUTRAL
        assert ids(llm) == ids(llm, temperature=1.0, top_k=0)


def test_eos_that_only_the_tokenizer_names_ends_a_text(model_directory, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config))
    own = {"eos_token": "<|new|>", "chat_template": None}  # in no other file
    (directory / "tokenizer_config.json").write_text(json.dumps(own))
    with LLM(directory, **OPTIONS) as llm:
        assert llm.info.eos_token_ids == []
        eos = llm.tokenizer.eos_token_id
        assert llm.tokenizer.encode("<|new|>") == [eos]
        params = SamplingParams(max_tokens=8, min_tokens=2, logit_bias={eos: 100.0})
        output = llm.generate("a", params, use_tqdm=False)
        assert (len(output.token_ids), output.outputs[0].finish_reason) == (3, "stop")
        assert output.outputs[0].stop_reason == eos
        ignoring = replace(params, ignore_eos=True)
        assert llm.generate("a", ignoring, use_tqdm=False).token_ids == [eos] * 8


def test_params_may_differ_by_prompt_but_not_in_number(llm):
    params = [replace(GREEDY, max_tokens=count) for count in (3, 9, 1)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.token_ids) for output in outputs] == [3, 9, 1]
    with pytest.raises(ValueError, match="2 for 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2], use_tqdm=False)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-6])
def test_a_temperature_near_zero_gives_the_likeliest_tokens(llm, temperature):
    cold = replace(GREEDY, temperature=temperature)
    wanted = llm.generate("the likeliest", GREEDY, use_tqdm=False).token_ids
    assert llm.generate("the likeliest", cold, use_tqdm=False).token_ids == wanted


def test_choices_differ_and_a_seed_repeats_them_in_any_company(llm):
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=20, n=3, seed=11)
    alone = llm.generate("seeded", params, use_tqdm=False)
    assert [choice.index for choice in alone.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in alone.outputs}) == 3
    others = [SamplingParams(max_tokens=30, seed=i, temperature=0.8) for i in range(6)]
    prompts = [*"abcdef", "seeded"]
    crowded = llm.generate(prompts, [*others, params], use_tqdm=False)[-1]
    assert [c.token_ids for c in crowded.outputs] == [c.token_ids for c in alone.outputs]


def test_without_a_seed_runs_differ(llm):
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    first, second = llm.generate(["same", "same"], params, use_tqdm=False)
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_cuts_text_and_tokens_and_ends_its_choice_only(llm, length):
    whole = llm.generate("stop here", GREEDY, use_tqdm=False)
    windows = (whole.text[i : i + length] for i in range(4, len(whole.text)))
    stop = next(window for window in windows if "\ufffd" not in window)
    at = whole.text.index(stop)
    params = replace(GREEDY, stop=(stop,), n=2)
    cut = llm.generate("stop here", params, use_tqdm=False)
    for choice in cut.outputs:
        assert choice.text == whole.text[:at]
        assert choice.finish_reason == "stop"
        assert choice.stop_reason == stop
        assert choice.token_ids == whole.token_ids[: len(choice.token_ids)]
        assert stop in llm.tokenizer.decode(choice.token_ids)
        assert stop not in llm.tokenizer.decode(choice.token_ids[:-1])
    assert llm.stats().scheduler.num_running == 0
    both = llm.generate(["stop here", "stop here"], [params, GREEDY], use_tqdm=False)
    assert both[0].text == cut.text
    assert both[1].text == whole.text


def test_a_stop_token_is_named_and_gives_no_text(llm):
    whole = llm.generate("token", GREEDY, use_tqdm=False)
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    params = replace(GREEDY, stop_token_ids=(stop,))
    cut = llm.generate("token", params, use_tqdm=False)
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.outputs[0].stop_reason == stop
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1])


def test_logprobs_come_where_asked_for(llm):
    params = replace(GREEDY, logprobs=3, prompt_logprobs=0)
    plain, output = llm.generate(["logprobs"] * 2, [GREEDY, params], use_tqdm=False)
    assert plain.outputs[0].logprobs is None
    assert plain.prompt_logprobs is None
    entries = output.outputs[0].logprobs
    assert [entry.token_id for entry in entries] == output.token_ids == plain.token_ids
    assert all(entry.top_ids[0] == entry.token_id for entry in entries)
    assert all(len(entry.top_ids) == 3 for entry in entries)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1


def test_a_shared_prefix_is_cached(llm):
    prompt = CORPUS[1] + CORPUS[0]
    first = llm.generate(prompt, GREEDY, use_tqdm=False)
    second = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert second.num_cached_tokens == len(second.prompt_token_ids) - 1
    assert second.token_ids == first.token_ids


def test_chat_renders_the_models_template(llm):
    conversation = [{"role": "user", "content": "hello"}]
    answer = llm.chat(conversation, GREEDY, use_tqdm=False)
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt_token_ids == llm.tokenizer.encode(rendered, add_special_tokens=False)
    several = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert [each.token_ids for each in several] == [answer.token_ids] * 2
    with pytest.raises(ValueError, match="at least one message"):
        llm.chat([], GREEDY)


def test_a_chat_takes_parts_and_says_what_is_no_message(llm):
    parts = [{"type": "text", "text": text} for text in ("hel", "lo")]
    answer = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)
    joined = [{"role": "user", "content": "hel\nlo"}]
    assert answer.prompt_token_ids == llm.chat(joined, GREEDY, use_tqdm=False).prompt_token_ids
    for wrong in ("hello", {"role": "user", "content": "x"}, None, 5):
        with pytest.raises(TypeError, match="messages must be a list of messages, got "):
            llm.chat(wrong, GREEDY)
    for wrong, message in (
        ([["hello"]], r"messages\[0\]: Expected `object`, got `str`"),
        ([5], "messages: Expected `array`, got `int`"),
        ([{"role": "user", "content": {"text": "x"}}], r"messages\[0\].content: .* got `object`"),
        ([{"content": "x"}], r"messages\[0\]: Object missing required field `role`"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(wrong, GREEDY)


def test_a_stream_joins_to_the_text_and_lets_others_run_in_between(llm):
    whole = llm.generate("stream", GREEDY, use_tqdm=False)
    stream = llm.stream("stream", GREEDY)
    pieces = [next(stream)]
    other = llm.generate("between", GREEDY, use_tqdm=False)
    pieces += stream
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    assert other.token_ids == llm.generate("between", GREEDY, use_tqdm=False).token_ids


def test_a_stream_that_is_left_is_aborted(llm):
    stream = llm.stream("stream", replace(GREEDY, max_tokens=200))
    next(stream)
    stream.close()
    llm.generate("x", GREEDY, use_tqdm=False)
    assert llm.stats().scheduler.num_running == 0
    with pytest.raises(ValueError, match="n must be 1 where text is streamed, got 2"):
        next(llm.stream("x", SamplingParams(n=2)))


def test_arrays_are_token_ids(llm):
    ids = [[1, 2, 3], [4, 5, 6]]
    expected = [llm.generate(each, GREEDY, use_tqdm=False).token_ids for each in ids]
    for prompts in (np.array(ids), [np.array(ids[0]), ids[1]], list(np.array(ids, np.uint16))):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.token_ids for output in outputs] == expected
    for prompt in (np.array(ids[0]), torch.tensor(ids[0]), list(np.array(ids[0]))):
        assert llm.generate(prompt, GREEDY, use_tqdm=False).token_ids == expected[0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"prompt": "a"}, "prompts must be .*, got {'prompt': 'a'}"),
        ([{"prompt": "a"}], "a prompt must be a string or token ids, got {'prompt': 'a'}"),
        (b"bytes", "prompts must be .*, got b'bytes'"),
        (["a", b"bytes"], "a prompt must be .*, got b'bytes'"),
        (None, "prompts must be .*, got None"),
        (5, "prompts must be .*, got 5"),
        (np.array(5), r"prompts must be .*, got array\(5\)"),
        ({1, 2}, "prompts must be .*, got {1, 2}"),
        ([None], r"a prompt must be .*, got \[None\]"),
        (["a", 1], "a prompt must be .*, got 1"),
        ([1, "a"], r"a prompt must be .*, got \[1, 'a'\]"),
        ([1.5, 2], r"a prompt must be .*, got \[1.5, 2\]"),
        ([1, True], r"a prompt must be .*, got \[1, True\]"),
        (np.array([1.5]), r"a prompt must be .*, got array\(\[1.5\]\)"),
        (["a", [[1], [2]]], r"a prompt must be .*, got \[\[1\], \[2\]\]"),
        ([b"x" * 10_000], "got b'x+.{0,3}x+'$"),
    ],
)
def test_what_is_no_prompt_is_named(llm, prompts, message):
    with pytest.raises(TypeError, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.stats().scheduler.num_waiting == 0


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}], 3, "greedy", ["x"]])
def test_what_are_no_sampling_parameters_is_named(llm, params):
    message = f"sampling_params must be .*, got {re.escape(repr(params))}"
    with pytest.raises(TypeError, match=message):
        llm.generate(["a"], params, use_tqdm=False)
    with pytest.raises(TypeError, match=message):
        next(llm.stream("a", params))


def test_nothing_runs_when_one_prompt_cannot(llm):
    before = llm.stats().steps
    with pytest.raises(ValueError, match=r"256.*300"):
        llm.generate([[1, 2, 3], [1] * 300], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="got 350"):
        llm.generate([350], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        llm.generate("", GREEDY, use_tqdm=False)
    assert llm.stats().steps == before
    assert llm.stats().scheduler.num_waiting == 0
    assert len(llm.generate("fine", GREEDY, use_tqdm=False).token_ids) == 24


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(llm):
    """Encoded whole, the refusal would give the number."""
    long = "a word or two, " * 2**16
    for ask in (llm.generate, lambda text: llm.chat([{"role": "user", "content": text}])):
        with pytest.raises(ValueError, match=r"maximum context .* at least \d+ tokens"):
            ask(long)
    assert llm.generate("a", SamplingParams(max_tokens=1)).token_ids


def test_the_progress_bar_counts_prompts(llm, capfd):
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capfd.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_an_interrupted_call_leaves_a_usable_engine():
    engine, calls = make_engine(), 0
    llm = make_llm(engine)
    step = engine.step

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3]], params, use_tqdm=False)
    assert len(llm.generate([5, 6], params, use_tqdm=False).token_ids) == 20
    assert llm.stats().scheduler.num_running == 0


def test_a_failing_engine_raises_with_its_reason():
    with make_llm(make_engine(fail_at=3)) as llm:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        with pytest.raises(RuntimeError, match="planted fault"):
            llm.generate([[1, 2], [3]], params, use_tqdm=False)
        with pytest.raises(RuntimeError, match="planted fault"):
            llm.generate([1], params, use_tqdm=False)


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_failing_engine_tells_every_stream(model_directory, first):
    """The step that fails ends them all: none may wait for news that another one has taken."""
    engine = make_engine(fail_at=6)
    engine.info = replace(engine.info, model_path=str(model_directory))
    with make_llm(engine) as llm:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        streams = {name: llm.stream([1, 2, 3], params) for name in ("one", "two")}
        for stream in streams.values():
            next(stream)
        for stream in (streams.pop(first), *streams.values()):
            with pytest.raises(RuntimeError, match="planted fault"):
                list(stream)


def test_a_model_without_a_tokenizer_takes_token_ids():
    with make_llm(make_engine()) as llm:
        output = llm.generate([1, 2, 3], SamplingParams(max_tokens=4, seed=1), use_tqdm=False)
        assert len(output.token_ids) == 4
        assert output.text == ""
        with pytest.raises(ValueError, match="prompts must be token ids"):
            llm.generate("text")
        with pytest.raises(ValueError, match="stop needs a tokenizer"):
            llm.generate([1], SamplingParams(stop=("x",)))


def test_a_closed_llm_says_so():
    llm = make_llm(make_engine())
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1])


def test_a_broken_tokenizer_lets_the_engine_go(monkeypatch, tmp_path):
    engine = make_engine()
    closed = []
    monkeypatch.setattr(engine, "close", lambda: closed.append(True))
    engine.info = replace(engine.info, model_path=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("no JSON")
    with pytest.raises(ValueError, match="tokenizer"):
        make_llm(engine)
    assert closed == [True]


def test_ctrl_c_waits_until_a_close_is_done(monkeypatch):
    engine = make_engine()
    done = []

    def close() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append(True)

    monkeypatch.setattr(engine, "close", close)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_llm(engine).close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [True]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("page_sise", "page_size"),
        ("max_token", "max_total_tokens"),
        ("zzz", "known are .*page_size"),
    ],
)
def test_an_unknown_option_is_a_type_error_that_suggests_the_nearest(name, nearest):
    with pytest.raises(TypeError, match=f"unknown option '{name}'.*{nearest}"):
        LLM("nowhere", **{name: 1})


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, "prefill-first"),
        ({"itl_target_ms": None}, "prefill-first"),
        ({"itl_target_ms": 20.0}, "balanced"),
        ({"batch_policy": "decode-first"}, "decode-first"),
    ],
)
def test_prompts_go_first_unless_another_policy_is_asked_for(monkeypatch, options, policy):
    built = []

    def build(config):
        built.append(config)
        return make_engine()

    monkeypatch.setattr("minisgl.build.build_engine", build)
    LLM(**options).close()
    assert [config.batch_policy for config in built] == [policy]
    assert EngineConfig().batch_policy == "balanced"  # of a server, whose streams are read


def test_options_are_the_configs_fields(tmp_path):
    config = make_config(tmp_path, {"page_size": 1, "schedule_policy": "lpm"})
    assert config == EngineConfig(model=str(tmp_path), page_size=1, schedule_policy="lpm")
    with pytest.raises(ValueError, match="page_size must be one of"):
        make_config(None, {"page_size": 3})
    assert all(field.init for field in dataclasses.fields(EngineConfig))
