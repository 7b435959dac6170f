"""What the benchmarks share: the machine's name, calls that are timed, processes of their own, and where numbers go.

Numbers go to results/benchmarks/NAME_MACHINE.json.
"""

import json
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from utils.environment import current_commit
from utils.files import write_text

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def machine_name(device: str | torch.device = "cpu") -> str:
    """The GPU's or the processor's name and the number of threads, fit for a file name; no host name."""
    if torch.device(device).type == "cuda":
        return sanitised(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    name = found[1] if found else f"{platform.system()} {platform.machine()}"
    return sanitised(f"{name} {torch.get_num_threads()} threads")


def sanitised(name: str) -> str:
    """Lower-case letters, digits and single hyphens."""
    name = re.sub(r"\((r|tm)\)|\bCPU\b|@.*?GHz", " ", name, flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def write_result(name: str, payload: dict, machine: str | None = None, folder: Path = RESULTS) -> Path:
    """Write payload, with the machine's name, torch's version and the commit, as folder/NAME_MACHINE.json."""
    machine = sanitised(machine) if machine else machine_name()
    path = folder / f"{name}_{machine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine, "torch": torch.__version__, "commit": current_commit(), **payload}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def in_a_process(function: Callable, *arguments):
    """function(*arguments) in a new process, so that its memory is its own and nothing is warm from what was before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the waiting for its results included."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """The most memory that a call holds at once on top of what was there before it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def spread(values: list[float]) -> dict:
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}
