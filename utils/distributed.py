"""Several processes, begun by torchrun, share every batch and every test set; for one process nothing happens here.

    torchrun --standalone --nproc_per_node=4 -- train.py --loss arcface --dataset market

PyTorch's own engine: torch.distributed (gloo for what lies on a CPU, nccl on GPUs) and DistributedDataParallel. Each
process embeds its rows of the global batch, `gather` hands all embeddings to every process, and each of them computes
the same loss over the whole batch. Why the gradients are those of one process: DistributedDataParallel takes the mean
over the N processes where a network needs the sum, so the gradient that `gather` passes to a process's own rows is N
times the loss's. The loss's own parameters have the same gradient in every process, and the mean is that gradient.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 writes and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ------------------------------------------------------------------------------------------------- beginning and ending


@contextmanager
def processes() -> Iterator[None]:
    """Around a script: joins the processes that torchrun began and parts from them. UserError if that is impossible.

    Rank 0 has the say. Where processes fail, one of them says why, rank 0 if it failed, too; torchrun ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store = join()
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    except BaseException as error:
        time.sleep(rank() > 0)  # most mistakes are met by all, and rank 0 is the first to tell
        try:
            first = store.add("failed", 1) == 1
        except RuntimeError:  # the store is gone, with torchrun or with rank 0
            first = rank() == 0
        silent = None if first else open(os.devnull, "w", encoding="utf-8")
        sys.stdout, sys.stderr = silent or sys.__stdout__, silent or sys.__stderr__
        if isinstance(error, dist.DistError) or "Connection closed by peer" in str(error):
            raise UserError("another process has ended, so this one does, too: see what it or torchrun says") from None
        raise
    dist.destroy_process_group()


def join() -> dist.Store:
    """Begins torch.distributed with what torchrun set in the environment; returns a store that all processes share."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UserError("this PyTorch lacks torch.distributed with gloo: leave torchrun out, or install another one")
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=number, world_size=count)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the processes can't meet ({reason}): torchrun --standalone finds a free port") from None
    return store


def own_device(name: str) -> str:
    """Of several processes each has the GPU of its number; other names, and those of one process, stay."""
    if world_size() == 1 or not name.startswith("cuda") or not torch.cuda.is_available():
        return name
    if not dist.is_nccl_available():
        raise UserError("this PyTorch lacks NCCL, which several processes on GPUs need: --device cpu, or one process")
    if name != "cuda":
        raise UserError(f"--device {name} is one GPU for {world_size()} processes: --device cuda gives each its own")
    if local_rank() >= (count := torch.cuda.device_count()):
        raise UserError(f"there are fewer GPUs than processes: --nproc_per_node={count}, or --device cpu")
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"


def check_same(what: str, value: Any) -> None:
    """UserError in every process unless all of them have the same value; also a place where each waits for all."""
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise UserError(f"{what} differs between the processes: begin all by one command and on the same files")


@contextmanager
def one_first() -> Iterator[None]:
    """One process of each machine does this before the others: what it makes, they find."""
    if local_rank() > 0:
        largest(0)  # waits for all
    yield
    if local_rank() == 0:
        largest(0)


def largest(number: int) -> int:
    """The largest of the processes' numbers. They lie on the CPU: no GPU is waited for."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


# ------------------------------------------------------------------------------------------------------------- training


def share(total: int) -> slice:
    """This process's rows of `total`: neighbours, as many as the others' to within one; all where there are too few."""
    return slice(0, total) if total < world_size() else _rows(total, rank())


def _rows(total: int, number: int) -> slice:
    return slice(total * number // world_size(), total * (number + 1) // world_size())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient[share(len(gradient))] * world_size()  # the mean over the processes will be their sum


def gather(embeddings: Tensor) -> Tensor:
    """The embeddings (B / N, D) of each of N processes -> those of the whole batch (B, D), in its order, for all."""
    return embeddings if world_size() == 1 else _Gather.apply(embeddings)


def parallel(module: nn.Module) -> nn.Module:
    """The module, its gradients the mean over the processes; without parameters the module itself."""
    if world_size() == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer versions have two words for it
        return DistributedDataParallel(module, broadcast_buffers=False)


def apart(module: nn.Module) -> AbstractContextManager:
    """Inside, gradients of a `parallel` module are summed up in each process: the next backward outside averages."""
    return module.no_sync() if world_size() > 1 else nullcontext()


def average_buffers(*modules: nn.Module) -> None:
    """Buffers become the mean over the processes: running statistics, which were each process's own until now."""
    if world_size() > 1:
        for buffer in (buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()):
            dist.all_reduce(buffer)
            buffer /= world_size()


# -------------------------------------------------------------------------------------------------------------- scoring


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """What each process has for its `share` of `total` (n, ...) -> all of it (total, ...), in order, for all."""
    if world_size() == 1 or total < world_size():
        return rows
    longest = rows.new_zeros(-(-total // world_size()), *rows.shape[1:])  # gloo wants tables of one size
    longest[: len(rows)] = rows
    parts = [torch.empty_like(longest) for _ in range(world_size())]
    dist.all_gather(parts, longest)
    return torch.cat([part[: len(range(total)[_rows(total, number)])] for number, part in enumerate(parts)])
