"""How the libraries below torch are set where a process starts: short waits, bounded caches.

They read environment variables as they are loaded or first used. What the user has set stays.
"""

import os

PRODUCTS_KEPT = 16  # of a step's, by shape: those of a layer, and the logits
PRODUCT_BYTES = 2**20  # of one that is kept; 0.55 MB were seen, at every shape


def settings() -> dict[str, str]:
    """This process's environment variables, and ours where it has none of that name."""
    own = {
        # oneDNN and torch's layer over it keep up to 1,024 matrix products each, by their shapes: a
        # prompt of another length is another shape.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(PRODUCTS_KEPT),
        "LRU_CACHE_CAPACITY": str(PRODUCTS_KEPT),
    }
    if "OMP_WAIT_POLICY" not in os.environ:
        # The threads of libgomp, torch's OpenMP, wait busily for milliseconds, in which a program
        # beside them keeps the thread they wait for from running. Now they sleep soon, as libgomp
        # has it where it knows of more threads than cores.
        own["GOMP_SPINCOUNT"] = "1000"
    return {**own, **os.environ}


def prepare() -> None:
    """Apply the settings to this process. Once torch is loaded, waits are as they are."""
    os.environ |= settings()
