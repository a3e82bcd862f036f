"""Package description. Installing compiles nothing: see minisgl/csrc for the native parts."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "minisgl/__init__.py").read_text())[1]


class BuildPy(build_py):
    """A checkout reads its native sources from csrc/; a wheel carries them as minisgl/csrc/src."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "minisgl/csrc/src"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


REQUIRES = [
    "torch>=2.11,<2.14",  # the versions tested; torch promises no stable behaviour beyond a minor
    "triton>=3.6,<3.10; platform_system == 'Linux'",  # 3.10 changes the default of FP fusion
    "numpy>=2.0,<3",  # 2.0 settled integer promotion (NEP 50), which the page ledger relies on
    "msgspec>=0.19,<1",  # the wire format; before 1.0 a minor release may break it
    "pyzmq>=26,<28",  # majors drop old Pythons and sockets' defaults
    "tokenizers>=0.21,<1",  # before 1.0 a minor release may break it
    "jinja2>=3.1.6,<4",  # 3.1.6 closes the last known escape from the template sandbox
    "safetensors>=0.5,<1",
    "gguf>=0.17,<1",  # constants and dequantisers of GGUF files
    "huggingface-hub>=0.30,<3",
    "starlette>=0.40,<2",
    "uvicorn>=0.30,<1",
    "uvloop>=0.21,<1; platform_system != 'Windows'",
    "h11>=0.14,<1",
    "prometheus-client>=0.20,<1",
    "nvtx>=0.2.10,<1",
    "cuda-python>=12.8,<14",  # 12.8 knows sm_100; 13 is what torch's CUDA 13 builds use
    "pybind11>=2.13,<4",  # headers only, at the first build of csrc/
    "ninja>=1.11,<2",
    "tqdm>=4.66,<5",
    "llguidance>=1.9.1,<1.10",  # what it makes of a schema is tested case by case, and may change
]

HF = ["transformers>=4.57,<6"]  # only for models that ship no tokenizer.json
BENCH = ["matplotlib>=3.9,<4"]
TEST = [
    *HF,  # the oracle of the models
    *BENCH,
    "accelerate>=1.0,<2",  # transformers' reading of GGUF files
    "httpx>=0.27,<1",
    "hypothesis>=6.100,<7",
    "jsonschema>=4.20,<5",
    "mypy>=1.15,<3",
    "openai>=2,<4",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.12,<1",
    "scipy>=1.13,<2",
]

setup(
    name="minisgl",
    version=VERSION,
    description="A small, fast, readable LLM serving engine",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="minisgl contributors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["minisgl", "minisgl.*"]),
    # Said so that an editable install is a path. A finder would be asked too late where Python
    # starts beside a clone named minisgl, which looks like a package without __init__.py.
    package_dir={"": "."},
    package_data={"minisgl": ["py.typed", "assets/**/*", "kernels/**/*.json"]},
    install_requires=REQUIRES,
    extras_require={"hf": HF, "bench": BENCH, "test": TEST},
    cmdclass={"build_py": BuildPy},
)
