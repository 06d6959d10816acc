"""How every rank comes by its device."""

from __future__ import annotations

from collections.abc import Callable

from common.settings import WorkerSettings
from worker.engine.device import Device
from worker.engine_client import threads_per_rank
from worker.parallel.group import Meeting
from worker.pipe import Ready
from worker.torch_import import import_torch

REST_NS = 400_000
"""Agent, Redis and gateway need half a millisecond of a core for one stream's token. Who has not had them when threads
of the next step take every core waits for the kernel's tick, up to 4 ms."""

OnProgress = Callable[[str, int, int], None]
LoadDevice = Callable[[WorkerSettings, OnProgress, Meeting], tuple[Device, Ready]]
"""What `load_torch_device` does; tests have others."""


def load_torch_device(settings: WorkerSettings, on_progress: OnProgress, meeting: Meeting) -> tuple[Device, Ready]:
    """Meet the other ranks, then load this rank's part of the model. On a CPU steps leave a core to others at first.

    Raises:
        ConfigurationError: the model, an option or the memory does not allow it.
        RankLost: another rank could not.
    """
    # Imported here: torch takes seconds, and the first sign of life should not wait for it.
    import_torch()
    from worker.kernels.build import load_library
    from worker.parallel.torch_group import join
    from worker.runner.hardware import wants_cuda
    from worker.runner.load import load_device

    threads = threads_per_rank(settings.threads, settings.ranks_per_node)
    is_on_gpu = wants_cuda(settings.device)
    group = join(meeting, settings.cpu_kernels, is_on_gpu=is_on_gpu)
    device, ready = load_device(settings.model_copy(update={"threads": threads}), on_progress, group)
    if not is_on_gpu and (library := load_library(settings.cpu_kernels)):
        library.inferfleet_set_rest(REST_NS)
    return device, ready
