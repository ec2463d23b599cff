"""Copies of the training state, which a save writes while training changes the originals."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class HeldCopies[Key: Hashable]:
    """Copies of this rank's tensors, for a thread that writes them while training continues.

    Copying from GPU to CPU takes longer than a step, as does allocating the pinned memory. If the GPU has memory to
    spare, the copies are made there, within milliseconds, and stay until they are written block by block. Otherwise
    they go to pinned CPU memory, which later saves reuse, and the next update of the weights waits for the transfer.
    """

    def __init__(self) -> None:
        self._copies: dict[Key, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None  # created at the first save from a GPU
        self._ready: torch.cuda.Event | None = None
        self._on_gpu = False
        self._training_peak = 0

    def take(self, sources: Mapping[Key, Tensor]) -> None:
        """Start copying. Sources on a GPU must not change before `before_overwriting` has been called."""
        if not any(source.is_cuda for source in sources.values()):
            self._copy_to_cpu(sources)
            return
        self._stream = self._stream or torch.cuda.Stream()
        self._on_gpu = self._fit_beside_training(sources) and self._copy_within_gpu(sources)
        if self._on_gpu:
            self._ready = torch.cuda.current_stream().record_event()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy_to_cpu(sources)
            self._ready = self._stream.record_event()

    def _fit_beside_training(self, sources: Mapping[Key, Tensor]) -> bool:
        """Whether the GPU has room for the copies on top of a step's peak, with a tenth of its memory to spare."""
        wanted = sum(source.nbytes for source in sources.values() if source.is_cuda)
        free, total = torch.cuda.mem_get_info()
        left = total // 10
        if self._training_peak == 0:
            # The first step allocates Adam's moments after its activations are freed, so later steps may peak higher.
            left += wanted
        held_beside_it = wanted if self._on_gpu else 0
        self._training_peak = max(self._training_peak, torch.cuda.max_memory_allocated() - held_beside_it)
        return self._training_peak + wanted + left <= free + torch.cuda.memory_reserved()

    def _copy_within_gpu(self, sources: Mapping[Key, Tensor]) -> bool:
        """Copy on the GPU; returns False if its memory is too fragmented."""
        try:
            self._copies = {
                name: source.clone(memory_format=torch.contiguous_format) for name, source in sources.items()
            }
        except torch.OutOfMemoryError:
            self._copies = {}
            return False
        return True

    def _copy_to_cpu(self, sources: Mapping[Key, Tensor]) -> None:
        self._copies = {name: self._buffer(name, source) for name, source in sources.items()}
        for name, source in sources.items():
            self._copies[name].copy_(source, non_blocking=True)

    def _buffer(self, name: Key, source: Tensor) -> Tensor:
        held = self._copies.get(name)
        if held is not None and (held.shape, held.dtype) == (source.shape, source.dtype):
            return held
        return torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)

    def before_overwriting(self) -> None:
        """Call this before the sources change. Later GPU work then waits for copies that are still in transfer."""
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)

    @contextmanager
    def complete(self) -> Iterator[Mapping[Key, Tensor]]:
        """Wait for the copies and yield them, in any thread.

        A new thread would use the first GPU, where even a query allocates memory, so this sets the sources' device.
        """
        with ExitStack() as stack:
            if self._stream is not None and self._ready is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
                self._ready.synchronize()
            try:
                yield self._copies
            finally:
                if self._on_gpu:
                    self._copies = {}
