"""The real model of these tests, from the package that `make smollm2` installs."""

from pathlib import Path

import pytest
import torch
import transformers

from minisgl.models.hub import model_directory


@pytest.fixture(scope="session")
def path() -> Path:
    try:
        return model_directory("smollm2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def oracle(path: Path) -> transformers.PreTrainedModel:
    """The model as transformers reads the same file, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def oracle_tokenizer(path: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
