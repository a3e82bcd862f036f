"""All-reduce across sizes: our ways beside the backend's own, on the ranks of this machine.

    python -m benchmarks.all_reduce                    # GPUs if there are any, else CPU processes
    python -m benchmarks.all_reduce --device cpu --ranks 4
    python -m benchmarks.all_reduce --rows 1 64 4096 --hidden 5120

With several GPUs each rank is a process with one, and every path of our kernels runs beside NCCL;
"table" is the path that serving picks. With a single GPU the ranks are streams on it (NCCL cannot
do that): what is seen there is the cost of the kernels and barriers, not of any link. On CPUs the
ranks are processes that share memory, beside gloo. Calls are captured in graphs on GPUs. Every
result is checked before it is timed; times are medians of rank 0. The last line is JSON.
"""

import argparse
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.results import Results, add_options, device_name
from minisgl.kernels.all_reduce import (
    CAPACITY,
    SumPath,
    all_reduce_norm_reference,
    all_reduce_reference,
    choose,
    received_bytes,
)
from minisgl.kernels.all_reduce.peers import Peers
from minisgl.kernels.all_reduce.virtual import QUEUES, VirtualRanks
from minisgl.parallel import Communicator, shared_memory
from minisgl.parallel.peer_memory import Consensus, open_peers
from minisgl.parallel.shared_memory import SharedMemory
from minisgl.parallel.torch_group import TorchGroup

ROWS = {"cuda": [1, 8, 64, 256, 1024], "cpu": [1, 8, 64]}
CALLS = 20  # between two looks at a CPU's clock
GRAPH_CALLS = 50  # in a captured graph
EPS = 1e-6

T = TypeVar("T")
Row = dict[str, Any]
Call = Callable[[torch.Tensor], object]


def make_parts(size: int, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """What each rank adds, [size, rows, hidden]: the same numbers wherever they are made."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(size, rows, hidden, generator=generator).to(dtype)


def check(name: str, found: torch.Tensor, parts: torch.Tensor, *, exact: bool) -> None:
    """Raises RuntimeError if `found` is not the sum of the parts, to the bit where `exact`."""
    want = all_reduce_reference(parts).to(found.device)
    bound = parts.double().abs().sum(0).to(found.device) * torch.finfo(parts.dtype).eps
    good = torch.equal(found, want) if exact else bool(((found - want).abs() <= 2 * bound).all())
    if not good:
        raise RuntimeError(f"{name} gives a wrong sum for {list(found.shape)}")


# ---- ranks that are processes -------------------------------------------------------------------


def time_on_cpu(call: Call, x: torch.Tensor, repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call(x)
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times)


def time_on_gpu(call: Call, x: torch.Tensor, repeats: int) -> float:
    """Median seconds of a call among GRAPH_CALLS in a captured graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                call(x)
        return _replay_seconds([(graph, stream)], repeats)


def _replay_seconds(graphs: list[tuple[Any, Any]], repeats: int) -> float:
    """Median seconds of a call in graphs that run side by side, by the first one's events."""
    times = []
    for turn in range(repeats + 3):
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for index, (graph, stream) in enumerate(graphs):
            with torch.cuda.stream(stream):
                if index == 0:
                    events[0].record(stream)
                graph.replay()
                if index == 0:
                    events[1].record(stream)
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(events[0].elapsed_time(events[1]) / 1e3 / GRAPH_CALLS)
    return statistics.median(times)


@dataclass
class Way:
    """One way to add up."""

    ordered: bool  # in rank order, to the bit
    total: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # of x, residual, weight


def communicator(comm: Communicator) -> Way:
    def norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return comm.all_reduce_norm(x, residual, weight, EPS, False)

    return Way(comm.ordered, comm.all_reduce, norm)


def kernels(peers: Peers, path: SumPath) -> Way:
    """One path of ours."""

    def norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _checked(peers.all_reduce_norm(x, residual, weight, EPS, False, path))

    ordered = path is not SumPath.MULTIMEM
    return Way(ordered, lambda x: _checked(peers.all_reduce(x, path)), norm)


def _checked(result: T | None) -> T:
    """What a path that was named gives. None is for a table that leaves the sum to NCCL."""
    assert result is not None
    return result


def rank_main(rank: int, port: int, fd: Any, answers: Any, args: argparse.Namespace) -> None:
    """One rank: measures, and answers if it is rank 0."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", port)
    with ExitStack() as resources:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            consensus = Consensus(dist.PrefixStore("peers", store), rank, args.ranks)
            group = TorchGroup(dist.PrefixStore("nccl", store), rank, args.ranks, device)
            peers = open_peers(consensus, resources, device, ordered=False, timeout=60.0)
            paths = [path for path in SumPath if path is not SumPath.MULTIMEM or peers.multimem]
            ways = {"nccl": communicator(group)}
            ways |= {path.name.lower(): kernels(peers, path) for path in paths}
        else:
            group = TorchGroup(
                dist.PrefixStore("gloo", store), rank, args.ranks, device, host="127.0.0.1"
            )
            shared = SharedMemory(fd.detach(), rank, args.ranks)
            ways = {"gloo": communicator(group), "shared": communicator(shared)}
        for count in args.rows:
            row = measure(ways, count, args, rank, device)
            if rank == 0:
                answers.put(row)
        group.all_reduce(torch.zeros(1, device=device))  # all have done
        if device.type == "cuda":
            torch.cuda.synchronize()
    group.close()


def measure(
    ways: dict[str, Way],
    rows: int,
    args: argparse.Namespace,
    rank: int,
    device: torch.device,
) -> Row:
    """Times of every way on `rows` tokens: the sum, and the sum with the norm after it."""
    dtype = getattr(torch, args.dtype)
    parts = make_parts(args.ranks, rows, args.hidden, dtype)
    residual = make_parts(1, rows, args.hidden, dtype)[0].to(device)
    weight = make_parts(1, 1, args.hidden, dtype)[0, 0].to(device)
    own = parts[rank].to(device)
    clock = time_on_gpu if device.type == "cuda" else time_on_cpu
    num_bytes = own.nbytes
    row: Row = {"rows": rows, "bytes": num_bytes, "sum": {}, "norm": {}}
    for name, way in ways.items():
        if name != "nccl" and name != "gloo" and num_bytes > CAPACITY:
            continue
        check(name, way.total(own.clone()), parts, exact=way.ordered)
        total = way.norm(own.clone(), residual, weight)[1]
        if way.ordered:
            want = all_reduce_norm_reference(parts, residual.cpu(), weight.cpu(), EPS, False)[1]
            if not torch.equal(total.cpu(), want):
                raise RuntimeError(f"{name} gives a wrong sum with the residual for {rows} rows")
        row["sum"][name] = clock(way.total, own.clone(), args.repeats)
        norm = partial(way.norm, residual=residual, weight=weight)
        row["norm"][name] = clock(norm, own.clone(), args.repeats)
    return row


def processes(args: argparse.Namespace) -> Generator[Row, None, None]:
    """Rank 0's rows as they come, of ranks in processes of their own."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = context.Queue()
    fd = shared_memory.create(args.ranks) if args.device == "cpu" else -1
    workers = []
    try:
        for rank in range(args.ranks):
            passed = DupFd(fd) if fd >= 0 else None
            words = (rank, store.port, passed, answers, args)
            workers.append(context.Process(target=rank_main, args=words))
            workers[-1].start()
        left = len(args.rows)
        while left:
            try:
                yield answers.get(timeout=1.0)
                left -= 1
            except queue.Empty:
                failed = [worker.exitcode for worker in workers if worker.exitcode]
                if failed:
                    raise RuntimeError(f"a rank ended with status {failed[0]}") from None
        for worker in workers:
            worker.join(20)
    finally:
        for worker in workers:
            worker.kill()
        if fd >= 0:
            os.close(fd)


# ---- ranks that are streams of one GPU ----------------------------------------------------------


def virtual(args: argparse.Namespace) -> Generator[Row, None, None]:
    """Rows of ranks that share one GPU, as they come."""
    device, dtype = torch.device("cuda", 0), getattr(torch, args.dtype)
    ranks = VirtualRanks(args.ranks, device)
    for count in args.rows:
        parts = make_parts(args.ranks, count, args.hidden, dtype).to(device)
        residual = make_parts(1, count, args.hidden, dtype)[0].to(device)
        weight = make_parts(1, 1, args.hidden, dtype)[0, 0].to(device)
        row: Row = {"rows": count, "bytes": parts[0].nbytes, "sum": {}, "norm": {}}
        for path in (SumPath.ONE_SHOT, SumPath.TWO_SHOT):
            if parts[0].nbytes > CAPACITY:
                continue
            name = path.name.lower()
            row["sum"][name], row["norm"][name] = _virtual_path(
                ranks, parts, residual, weight, path, args.repeats
            )
        ranks.check()
        yield row
    ranks.close()


def _virtual_path(
    ranks: VirtualRanks,
    parts: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    path: SumPath,
    repeats: int,
) -> tuple[float, float]:
    """Seconds of the sum, and of the sum with the norm, by one path."""

    copies = list(parts.clone())
    torch.cuda.synchronize()
    for found in ranks.run(lambda peers: kernels(peers, path).total(copies[peers.rank])):
        check(path.name.lower(), found, parts.cpu(), exact=True)
    seconds = _time_virtual(
        ranks, list(parts.clone()), lambda peers, x: kernels(peers, path).total(x), repeats
    )
    # Loads the kernel, which a capture should not have to do.
    ranks.run(lambda peers: kernels(peers, path).norm(copies[peers.rank], residual, weight))
    norm_seconds = _time_virtual(
        ranks,
        list(parts.clone()),
        lambda peers, x: kernels(peers, path).norm(x, residual, weight),
        repeats,
    )
    return seconds, norm_seconds


def _time_virtual(
    ranks: VirtualRanks,
    inputs: list[torch.Tensor],
    call: Callable[[Peers, torch.Tensor], object],
    repeats: int,
) -> float:
    graphs = []
    for peers, stream, x in zip(ranks.ranks, ranks.streams, inputs, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                call(peers, x)
        graphs.append((graph, stream))
    return _replay_seconds(graphs, repeats)


# ---- the report ---------------------------------------------------------------------------------


def compared(row: Row, kind: str, ranks: int, *, multimem: bool) -> Row:
    """The row with what serving picks, or how much faster our way is than gloo."""
    if kind == "cpu":
        own = row["sum"].get("shared")
        return row | {"table": "" if own is None else f"{row['sum']['gloo'] / own:.1f}"}
    path = choose(row["bytes"], ranks, multimem=multimem, ordered=False)
    received = {
        path.name.lower(): received_bytes(row["bytes"], ranks, path) / seconds
        for path in SumPath
        if (seconds := row["sum"].get(path.name.lower())) is not None
    }
    table = "nccl" if path is None else path.name.lower()
    return row | {"table": table, "received_bytes_per_second": received}


def report(rows: list[Row], kind: str, args: argparse.Namespace) -> None:
    """The table for people."""
    names = list(dict.fromkeys(name for row in rows for name in row["sum"]))
    where = {"virtual": "streams of one GPU", "gpus": "GPUs", "cpu": "CPU processes"}[kind]
    print(f"all-reduce of [rows, {args.hidden}] {args.dtype} on {args.ranks} {where}; microseconds")
    head = "".join(f"{name:>10} {'+ norm':>8}" for name in names)
    last = "gloo / shared" if kind == "cpu" else "table"
    print(f"{'rows':>6} {'bytes':>10}{head}   {last}")
    for row in rows:
        times = ""
        for name in names:
            for part, width in (("sum", 10), ("norm", 8)):
                seconds = row[part].get(name)
                text = f"{'-':>{width}}" if seconds is None else f"{seconds * 1e6:>{width}.1f}"
                times += text if part == "sum" else " " + text
        print(f"{row['rows']:>6} {row['bytes']:>10}{times}   {row['table']}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "all_reduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--ranks", type=int, help="all GPUs, 4 streams of a single one, or 2 CPUs")
    parser.add_argument("--rows", type=int, nargs="+", help=f"tokens; {ROWS}")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    add_options(parser)
    args = parser.parse_args(words)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and args.dtype == "float16":
        parser.error("--dtype must be bfloat16 or float32 on the CPU, got float16")
    if args.rows is None:
        args.rows = ROWS[args.device]
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    if args.ranks is None:
        args.ranks = gpus if gpus > 1 else 4 if gpus else 2
    if args.ranks < 2 or min(args.rows) < 1:
        parser.error(f"--ranks must be at least 2 and --rows 1, got {args.ranks}, {args.rows}")
    return args


def main(words: list[str] | None = None) -> None:
    os.environ.update(QUEUES)  # before CUDA starts: a graph holds many calls of one rank
    args = parse(words)
    if args.device == "cpu":
        kind = "cpu"
    else:
        kind = "gpus" if torch.cuda.device_count() >= args.ranks else "virtual"
    results = Results("all_reduce", args)
    results.put(
        kind=kind,
        device=device_name(args.device),
        ranks=args.ranks,
        hidden=args.hidden,
        dtype=args.dtype,
        load=os.getloadavg()[0],
        rows=[],
    )
    source = virtual(args) if kind == "virtual" else processes(args)
    with closing(source):
        for index, row in enumerate(source):
            multimem = "multimem" in row["sum"]
            results.add("rows", compared(row, kind, args.ranks, multimem=multimem))
            following = args.rows[index + 1 : index + 2]
            if any(results.is_late(f"{count} rows") for count in following):
                break
    report(results.content["rows"], kind, args)
    results.finish()


if __name__ == "__main__":
    main()
