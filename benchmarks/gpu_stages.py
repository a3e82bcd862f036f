"""The stages of a check on a GPU machine: what each runs, for how long, and what it needs.

A group is what one command of under nine minutes runs, on a machine whose commands end after ten.
Budgets are estimates for an H100 with 16 cores until a run has said otherwise.
"""

from dataclasses import dataclass

GROUP_SECONDS = 540  # a group: all its stages, and the start of the check itself
START_SECONDS = 30  # of the check itself: imports, wheels
SHARE = 0.75  # of a stage's seconds, after which its command begins nothing more

# Packages beside torch, triton and numpy.
WORKER = ("msgspec", "safetensors", "tqdm")  # an engine in the benchmark's own process
ENGINE = (*WORKER, "zmq", "tokenizers", "jinja2")  # `minisgl.LLM`
PYTEST = ("pytest", "xdist")
NATIVE = ("pybind11", "ninja")  # building csrc/

OPTIONS = "--device {device} --out {out} --seconds {seconds} --commit {commit}"


@dataclass(frozen=True)
class Stage:
    """One command. {device}, {out}, {seconds} and {commit} in its words are filled in."""

    name: str
    group: str
    seconds: int  # after which it is ended, whatever it does
    words: str  # after the interpreter
    needs: tuple[str, ...] = ()  # packages without which it is left out
    smaller: str = ""  # words added in a dry run, which plays the GPU on a CPU; the last ones win

    def command(self, *, stand_ins: bool, **fields: object) -> list[str]:
        words = f"{self.words} {self.smaller}" if stand_ins else self.words
        return [word.format(**fields) for word in words.split()]


def benchmark(line: str) -> str:
    return f"-m benchmarks.{line} {OPTIONS}"


def gpu_tests(line: str) -> str:
    plain = "-p xdist.plugin -p no:cacheprovider --confcutdir tests/gpu"  # nothing of other tests
    return f"-m pytest -q -m gpu {plain} {OPTIONS} {line}"


ENGINE_TESTS = "tests/gpu/test_step.py tests/gpu/test_engine.py tests/gpu/test_profile.py"
QWEN_06B, QWEN_8B = "--shape qwen3-0.6b", "--shape qwen3-8b"
CHATS = "--dtype float32 --batch 1 --temperature 0.0 --workload chat --rounds 2 --requests 2"
PLAYED = "--stand-ins --dtype float32 --repeats 1"
TINY = "--shape tiny --dtype float32 --rounds 1"
FEW_STEPS = "--batch 1 3 --steps 3 --warmup 2 --input-len 9 --check 4 --chunk 16 --copy-mib 1"

STAGES = (
    # Correct first: a figure of a wrong kernel is worth nothing.
    Stage(
        "cards",
        "kernels",
        150,
        gpu_tests("-n 16 tests/gpu/test_cards.py --without hopper"),
        (*PYTEST, "triton"),
        "-n 0 --stand-ins",
    ),
    Stage("kernels", "kernels", 220, benchmark("kernels --without hopper"), ("triton",), PLAYED),
    # No interpreter has run the Gluon kernel: should it hang, it takes nothing else with it.
    Stage(
        "hopper-cards",
        "kernels",
        50,
        gpu_tests("-n 4 tests/gpu/test_cards.py --only hopper"),
        (*PYTEST, "triton"),
        "-n 0 --stand-ins",
    ),
    Stage("hopper", "kernels", 60, benchmark("kernels --only hopper"), ("triton",), PLAYED),
    Stage("build", "engine", 60, "-m minisgl.csrc build", NATIVE),
    # By file: engines that a file's tests share start once, and times are not taken in a crowd.
    Stage(
        "engine",
        "engine",
        160,
        gpu_tests(f"-n 3 --dist loadfile {ENGINE_TESTS}"),
        (*PYTEST, "triton", *ENGINE),
        "-n 0 --stand-ins",
    ),
    Stage(
        "hopper-engine",
        "engine",
        50,
        gpu_tests("-n 0 tests/gpu/test_gluon.py"),
        (*PYTEST, "triton", *ENGINE),
        "--stand-ins",
    ),
    Stage(
        "decode",
        "engine",
        90,
        benchmark(f"decode {QWEN_06B} --batch 1 16 256"),
        ("triton", *WORKER),
        f"{TINY} {FEW_STEPS}",
    ),
    Stage(
        "cascade",
        "engine",
        60,
        benchmark(f"cascade {QWEN_06B} --batch 64 --shared 4096"),
        ("triton", *WORKER),
        f"{TINY} --batch 3 --shared 40 --steps 3 --check 4",
    ),
    Stage(
        "all-reduce-tests",
        "engine",
        50,
        gpu_tests("-n 0 tests/gpu/test_all_reduce.py"),
        (*PYTEST, *NATIVE, "cuda"),
        "--stand-ins",
    ),
    Stage(
        "all-reduce",
        "engine",
        40,
        benchmark("all_reduce"),
        (*NATIVE, "cuda"),
        "--ranks 2 --rows 1 3 --hidden 72 --repeats 1 --dtype float32",
    ),
    Stage(
        "decode-8b",
        "models",
        130,
        benchmark(f"decode {QWEN_8B} --batch 1 16 64 --warmup 3 --chunk 128"),
        ("triton", *WORKER),
        f"{TINY} {FEW_STEPS}",
    ),
    # Two starts: one that compiles every kernel, and one that finds them, which has a goal.
    Stage(
        "startup-8b",
        "models",
        150,
        benchmark(f"startup {QWEN_8B} --rounds 1"),
        ("triton", *ENGINE),
        "--shape tiny",
    ),
    Stage(
        "speculative",
        "models",
        120,
        benchmark(f"speculative {CHATS}"),
        ("triton", *ENGINE),
        "--target tiny --rounds 1 --requests 1 --against draft",
    ),
    Stage(
        "offline",
        "models",
        70,
        benchmark("offline --num-requests 48"),
        ("triton", *ENGINE),
        "--num-requests 2 --input-len 8 16 --output-len 4 8",
    ),
)
GROUPS = tuple(dict.fromkeys(stage.group for stage in STAGES))
