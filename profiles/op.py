"""One op on its benchmark shapes, for a kernel profiler: only the calls themselves are profiled.

    python -m profiles.op decode --implementation portable

Each implementation runs once before, so that compiling and loading stay out of the profile, which
lies between cudaProfilerStart and cudaProfilerStop; every call has an NVTX range with its name.
"""

import argparse

import torch

from benchmarks.kernels.workload import Setting
from benchmarks.kernels.workloads import workloads
from minisgl.trace import nvtx_range


def main() -> None:
    every = list(workloads(small=not torch.cuda.is_available()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=sorted({w.op.name for w in every}))
    parser.add_argument("--implementation", help="only this one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    args = parser.parse_args()
    device = torch.device(args.device)
    for workload in (w for w in every if w.op.name == args.op):
        op = workload.op
        names = [args.implementation] if args.implementation else []
        if not names and not args.dry_run:
            names = [i.name for i in op.implementations if i.supports(device)] or ["reference"]
        print(f"{op.name} {workload.label}: {', '.join(names or ['every implementation'])}")
        if args.dry_run:
            continue
        setting = Setting(device, torch.bfloat16, torch.Generator(device).manual_seed(0))
        for name in names:
            call, arguments = op.implementation(name), workload.make(setting)
            call(**arguments)
            with nvtx_range(f"{op.name} {name} {workload.label}"):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                call(**arguments)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
