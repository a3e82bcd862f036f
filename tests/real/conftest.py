"""The real model of these tests, from the package that `make smollm2` installs.

Where it is not to be had they are skipped, but with `--no-skips`, as in CI: then each skip fails.
"""

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import transformers

from minisgl.models.hub import model_directory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="tests that are skipped fail")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must not be skipped: {report.longrepr}"
    return report


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
