import pytest

from minisgl.config import EngineConfig, ServerConfig


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"page_size": 8}, ValueError, "page_size must be one of [1, 16, 32, 64], got 8"),
        ({"page_size": "16"}, TypeError, "page_size must be int, got '16' (str)"),
        ({"page_size": True}, TypeError, "page_size must be int, got True (bool)"),
        ({"dtype": "fp8"}, ValueError, "got 'fp8'"),
        ({"dtype": ["auto"]}, ValueError, "got ['auto']"),
        (
            {"attention_backend": "flash"},
            ValueError,
            "attention_backend must be one of ['auto', 'triton', 'gluon'], got 'flash'",
        ),
        (
            {"attention_backend": "gluon", "batch_invariant": True},
            ValueError,
            "attention_backend gluon cannot be used with batch_invariant",
        ),
        ({"device": "tpu"}, ValueError, "cuda:<index>, got 'tpu'"),
        ({"tp_size": 0}, ValueError, "tp_size must be at least 1, got 0"),
        (
            {"tp_size": 3, "nnodes": 2, "dist_init_addr": "a:1"},
            ValueError,
            "tp_size must be a multiple of nnodes (2), got 3",
        ),
        ({"nnodes": 0}, ValueError, "nnodes must be at least 1, got 0"),
        ({"node_rank": 1}, ValueError, "node_rank must be below nnodes (1), got 1"),
        ({"node_rank": -1}, ValueError, "node_rank must be at least 0, got -1"),
        (
            {"tp_size": 2, "nnodes": 2},
            ValueError,
            "where nnodes is above 1, and only there; got None with 2",
        ),
        ({"dist_init_addr": "a:1"}, ValueError, "and only there; got a:1 with 1"),
        (
            {"tp_size": 2, "nnodes": 2, "dist_init_addr": "here"},
            ValueError,
            "dist_init_addr must be host:port, got 'here'",
        ),
        (
            {"tp_size": 2, "nnodes": 2, "dist_init_addr": "here:70000"},
            ValueError,
            "dist_init_addr must be host:port, got 'here:70000'",
        ),
        ({"tp_size": 2, "device": "cuda:1"}, ValueError, "got 'cuda:1'"),
        ({"max_running_requests": -1}, ValueError, "max_running_requests must be at least 1"),
        ({"max_total_tokens": 0}, ValueError, "max_total_tokens must be at least 1, got 0"),
        ({"max_total_tokens": 1.5}, TypeError, "max_total_tokens must be int or None, got 1.5"),
        ({"mem_fraction_static": 1.5}, ValueError, "mem_fraction_static must be at most 1"),
        ({"mem_fraction_static": float("nan")}, ValueError, "must be greater than 0, got nan"),
        ({"itl_target_ms": 0}, ValueError, "itl_target_ms must be greater than 0, got 0"),
        (
            {"itl_target_ms": 20.0, "batch_policy": "decode-first"},
            ValueError,
            "itl_target_ms needs batch_policy balanced, got decode-first",
        ),
        (
            {"schedule_policy": "lpm", "disable_radix_cache": True},
            ValueError,
            "schedule_policy lpm needs the radix cache",
        ),
        ({"cuda_graph_max_bs": 0}, ValueError, "cuda_graph_max_bs must be at least 1, got 0"),
        (
            {"cuda_graph_max_bs": 8, "disable_cuda_graph": True},
            ValueError,
            "cuda_graph_max_bs needs CUDA graphs, got disable_cuda_graph",
        ),
        (
            {"piecewise_cuda_graph_max_tokens": 0},
            ValueError,
            "piecewise_cuda_graph_max_tokens must be at least 1, got 0",
        ),
        (
            {"piecewise_cuda_graph_max_tokens": 64, "disable_cuda_graph": True},
            ValueError,
            "piecewise_cuda_graph_max_tokens needs CUDA graphs, got disable_cuda_graph",
        ),
        ({"disable_radix_cache": "no"}, TypeError, "disable_radix_cache must be bool"),
        ({"log_level": "loud"}, ValueError, "log_level must be one of"),
        (
            {"speculative_num_draft_tokens": 17},
            ValueError,
            "speculative_num_draft_tokens must be at most 16, got 17",
        ),
        ({"speculative_ngram_min": 0}, ValueError, "speculative_ngram_min must be at least 1"),
        (
            {
                "speculative_algorithm": "ngram",
                "speculative_ngram_min": 5,
                "speculative_ngram_max": 4,
            },
            ValueError,
            "speculative_ngram_max must be at least speculative_ngram_min (5), got 4",
        ),
        (
            {"speculative_num_draft_tokens": 3},
            ValueError,
            "speculative_num_draft_tokens needs speculative_algorithm draft or ngram, got 'none'",
        ),
        (
            {
                "speculative_algorithm": "draft",
                "speculative_draft_model": "x",
                "speculative_ngram_max": 3,
            },
            ValueError,
            "speculative_ngram_max needs speculative_algorithm ngram, got 'draft'",
        ),
        ({"model": 3}, TypeError, "model must be str or None, got 3 (int)"),
    ],
)
def test_wrong_values_are_refused_with_field_limit_and_value(values, error, message):
    with pytest.raises(error) as caught:
        EngineConfig(**values)
    assert message in str(caught.value)


def test_values_at_the_limits_are_taken():
    EngineConfig(mem_fraction_static=1, itl_target_ms=5, device="cuda:1", page_size=64, tp_size=1)
    ServerConfig(port=0, drain_timeout=0)
    ServerConfig(port=65535)


@pytest.mark.parametrize(
    "values",
    [{"port": 65536}, {"port": -1}, {"watchdog_timeout": 0}, {"drain_timeout": float("inf")}],
)
def test_server_values_are_checked_too(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"{name} must be"):
        ServerConfig(**values)


def test_unhashable_and_unknown_values_do_not_crash_the_check():
    with pytest.raises(TypeError, match="unexpected keyword"):
        EngineConfig(page_sise=16)
