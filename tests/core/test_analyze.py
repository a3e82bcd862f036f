"""The analysis people print: presets and HF configs, figures that agree with the cost model."""

import json

import pytest

from minisgl.analyze import load_sizes, main, ridge_streams
from minisgl.core.costmodel import DEVICES, CostModel, ModelSizes, decode_work, prefill_work
from minisgl.models.presets import PRESETS


def rows(text, heading):
    """The figures of the table below `heading`, as lists of words."""
    lines = text.split(heading)[1].splitlines()[2:]
    return [line.split() for line in lines[: lines.index("")]]


def test_a_preset_is_printed_with_the_models_own_figures(capsys):
    main(["--model", "qwen3-8b", "--device", "h100", "--batch", "1,512", "--prompt", "64,4096"])
    text = capsys.readouterr().out
    model = CostModel(load_sizes("qwen3-8b", "bfloat16"), DEVICES["h100"])
    short, long = rows(text, "prefill, one prompt alone in a step")
    assert (short[0], short[-1]) == ("64", "memory")
    assert (long[0], long[-1]) == ("4096", "compute")
    assert float(long[-3]) == pytest.approx(1e3 * model.cost(prefill_work(4096)).seconds, abs=1e-3)
    decode = rows(text, "decode, one token for each stream in a step")
    assert [row[:2] for row in decode] == [
        ["1", "1024"],
        ["512", "1024"],
        ["1", "8192"],
        ["512", "8192"],
    ]
    cost = model.cost(decode_work(512, 512 * 1024))
    assert float(decode[1][-3]) == pytest.approx(1e3 * cost.seconds, abs=1e-3)
    assert {row[-1] for row in decode} == {"memory"}


def test_a_config_json_gives_the_same_facts_as_its_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen3-0.6b"]))
    assert load_sizes(str(tmp_path), "bfloat16") == load_sizes("qwen3-0.6b", "bfloat16")
    assert load_sizes(str(tmp_path), "float32").bytes_per_weight == 4.0
    assert load_sizes("Qwen3-0.6B", "float32") == load_sizes(str(tmp_path), "float32")


def test_every_preset_and_device_can_be_analyzed(capsys):
    for shape in PRESETS:
        for device in DEVICES:
            main(["--model", shape, "--device", device])
    assert capsys.readouterr().out.count("where decode stops") == len(PRESETS) * len(DEVICES)


def sizes(*numbers, **further):
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    return ModelSizes(**dict(zip(names, numbers, strict=True)), **further)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2-1b", sizes(16, 2048, 32, 8, 64, 8192, 128256)),
        ("mistral-7b", sizes(32, 4096, 32, 8, 128, 14336, 32768)),
        ("qwen3-14b", sizes(40, 5120, 40, 8, 128, 17408, 151936)),
        (  # `intermediate` is one expert's
            "qwen3-30b-a3b",
            sizes(48, 2048, 32, 4, 128, 768, 151936, experts=128, experts_per_token=8),
        ),
    ],
)
def test_a_presets_sizes_are_the_published_ones(name, expected):
    assert load_sizes(name, "bfloat16") == expected


def test_presets_have_the_sizes_of_their_names():
    for name, billions in {
        "llama-3.1-8b": 7.5,
        "llama-3.1-70b": 69.5,
        "qwen3-30b-a3b": 30.2,
    }.items():
        assert load_sizes(name, "bfloat16").weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_ridge_is_where_the_bound_changes():
    model = CostModel(load_sizes("llama-3.1-8b", "bfloat16"), DEVICES["h100"])
    ridge = ridge_streams(model, 128)
    assert model.cost(decode_work(ridge, ridge * 128)).bound == "compute"
    assert model.cost(decode_work(ridge - 1, (ridge - 1) * 128)).bound == "memory"
    assert ridge_streams(model, 100_000) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "must be whole numbers of at least 1, got '0'"),
        (["--prompt", "1,x"], "must be whole numbers of at least 1, got '1,x'"),
        (["--tp-size", "0"], "--tp-size must be at least 1, got 0"),
        (["--peak-tflops", "-3"], "must be greater than 0, got '-3'"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "qwen3-8b", *arguments])
    assert message in capsys.readouterr().err


def test_an_unknown_architecture_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["AbacusForCausalLM"]}))
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path)])
    assert "AbacusForCausalLM" in capsys.readouterr().err
