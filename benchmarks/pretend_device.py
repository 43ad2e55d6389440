"""A CUDA device that is not there: tensors that say cuda:0 and compute on the host.

Inside `with PretendDevice() as gpu:` the real code runs as it would on a GPU, and what a GPU refuses is refused: an
operation on tensors of both devices, a generator of the wrong one, `.numpy()` of a tensor over there. Counted are

- launches: operations on the device that are neither views nor allocations. One operation is one launch, a foreach
  operation as well; on a real device some are several kernels (a convolution's backward pass), few are none.
- waits: where the host waits for the device: reads, operations whose result has a shape that depends on values, copies
  that are not `non_blocking`, each with the line of the code that asked for it.
- bytes copied each way, and copies to the device from memory that is not page-locked.

Streams are kept in order by nobody but the code: a tensor that another stream made is refused before its event was
waited for, and before `record_stream` keeps its memory from being used anew.

The numbers are those of the host's kernels, so that a run here and one on the CPU give the same bits. What it cannot
show: speed, memory, and rounding of other kernels.

How it works: `PretendTensor` is a wrapper subclass around a host tensor. To Python it says cuda:0, to PyTorch's C++
code "meta", so that what autograd and composite operations make for it comes back here. Autocast for cuda is autocast
for the CPU, whose kernels ask for a tensor's device and then hear "cpu".
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, HOST, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
AUTOCAST = torch._C.DispatchKey.AutocastCPU
GENERATOR, AUTOCAST_CLASS, LOAD = torch.Generator, torch.autocast, torch.load
SEEDS, MARK = 1 << 32, 1 << 62
ROOT = str(Path(__file__).resolve().parents[1])  # whose lines are named: the repository's
aten = torch.ops.aten

# Operations (all overloads) whose result has a shape that depends on values, or that read one.
READS = {"_local_scalar_dense", "equal", "nonzero", "nonzero_numpy", "masked_select", "bincount", "nms"} | {
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "multinomial", "repeat_interleave", "is_nonzero")
}
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
    "detach",
} | {*("lift_fresh", "lift", "alias", "_unsafe_view", "is_pinned", "set_", "_has_compatible_shallow_copy_type")}
HOST_SCALARS = {
    "masked_fill",
    "masked_fill_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "fill_",
    "fill",
}  # or pointwise


class PretendGenerator(GENERATOR):  # type: ignore[misc, valid-type]
    """Random numbers of the device, drawn on the host: those of a host generator with the same seed.

    An operation is handed a copy of the Python object, so the mark is in the seed, in bits that no number depends on.
    """

    device = property(lambda self: CUDA)  # type: ignore[assignment]

    def __init__(self) -> None:
        self.manual_seed(super().initial_seed())

    def manual_seed(self, seed: int) -> "PretendGenerator":
        super().manual_seed(seed % SEEDS | MARK)
        return self

    def initial_seed(self) -> int:
        return int(super().initial_seed() % SEEDS)

    @staticmethod
    def made(generator: torch.Generator) -> bool:
        """Whether the object that an operation was handed is of this class."""
        return bool(GENERATOR.initial_seed(generator) & MARK)


class _Generator(GENERATOR):  # type: ignore[misc, valid-type]
    """torch.Generator, which also makes those of the device."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:  # type: ignore[misc]
        return PretendGenerator() if torch.device(device).type == "cuda" else GENERATOR(device)


class PretendTensor(torch.Tensor):
    """`host`: the host tensor with its values; the storage of a view is that of its base."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> "PretendTensor":
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=HOST,
            dispatch_device=True,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device was used outside of it")

    def get_device(self) -> int:
        return 0

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.host!r})"


class PretendEvent:
    """What a stream had done, and had waited for, when the event was recorded: by stream, the number of operations."""

    def __init__(self, stream: "PretendStream") -> None:
        self.done = {**stream.seen, stream: stream.operations}


class PretendStream:
    """A stream of the device; its operations are done at once."""

    def __init__(self, *_: Any) -> None:
        self.operations = 0
        self.seen: dict[PretendStream, int] = {}  # of other streams, how many operations it has waited for

    def record_event(self) -> PretendEvent:
        return PretendEvent(self)

    def wait_event(self, event: PretendEvent) -> None:
        for stream, number in event.done.items():
            self.seen[stream] = max(number, self.seen.get(stream, 0))

    def before(self, func: Any, tensor: PretendTensor, default: "PretendStream") -> None:
        """Raise where an operation of this stream may come too early, or too late, for a tensor of another."""
        maker, number, users = getattr(tensor.host.untyped_storage(), "made", (default, 0, []))
        if maker is not self and self.seen.get(maker, -1) < number:
            raise RuntimeError(f"{func}: a tensor that another stream makes is not waited for")
        if maker is not self and maker is not default and self not in users:
            raise RuntimeError(f"{func}: a tensor of another stream is used without record_stream")

    def after(self, tensor: PretendTensor) -> None:
        """Note that an operation of this stream made it."""
        self.operations += 1
        tensor.host.untyped_storage().made = (self, self.operations, [])


class _Autocast(AUTOCAST_CLASS):  # type: ignore[misc, valid-type]
    """Autocast for cuda: the CPU's, heard of by tensors of the device alone."""

    depth = 0

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any) -> None:
        self.pretended = device_type == "cuda" and enabled
        dtype = dtype or (torch.float16 if device_type == "cuda" else None)
        super().__init__("cpu" if device_type == "cuda" else device_type, dtype, enabled, **kwargs)

    def __enter__(self) -> Any:
        _Autocast.depth += self.pretended
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        _Autocast.depth -= self.pretended
        return super().__exit__(*error)


def _load(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
    if map_location is None:
        raise RuntimeError("torch.load without map_location: on a machine without a GPU the file could not be read")
    return LOAD(*args, map_location=map_location, **kwargs)


class PretendDevice(TorchDispatchMode):
    """The device, and what was counted since the last `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = PretendGenerator()  # the device's global one
        self.pinned: dict[int, Tensor] = {}  # by address; kept, so that no address is used twice
        self.default = self.stream = PretendStream()
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.launches: Counter[str] = Counter()  # by operation
        self.waits: Counter[tuple[str, str]] = Counter()  # by operation and line of the repository
        self.pageable: Counter[str] = Counter()  # copies to the device from memory that is not page-locked, by line
        self.bytes_to_device = self.bytes_to_host = 0

    def __enter__(self) -> "PretendDevice":  # type: ignore[override]
        import_module("torch._dynamo")  # an optimiser loads it; before anything is patched
        forget_kept_tensors()
        self.patches = ExitStack()
        for patched in self._patches():
            self.patches.enter_context(patched)
        # torch.tensor(..., device="cuda") is then made on the host and copied by an operation, which comes here.
        before = torch._C._only_lift_cpu_tensors()
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._set_only_lift_cpu_tensors(True)
        # A module that moves gets new parameters: those it has cannot become tensors of this kind.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        self.patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()
        forget_kept_tensors()

    def _patches(self) -> Iterator[Any]:
        def seed(number: int) -> None:
            self.generator.manual_seed(number)

        def pin(tensor: Tensor, *_: Any) -> Tensor:
            found = tensor.clone()
            self.pinned[found.untyped_storage().data_ptr()] = found
            return found

        def is_pinned(tensor: Tensor, *_: Any) -> bool:
            return tensor.untyped_storage().data_ptr() in self.pinned

        @contextmanager
        def on(stream: PretendStream) -> Iterator[None]:
            before, self.stream = self.stream, stream
            yield
            self.stream = before

        def record_stream(tensor: PretendTensor, stream: PretendStream) -> None:
            tensor.host.untyped_storage().made[2].append(stream)  # type: ignore[attr-defined]

        cuda: dict[str, Callable[..., Any]] = {
            "Stream": PretendStream,
            "stream": on,
            "current_stream": lambda *_: self.stream,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "synchronize": lambda *_: self.note_wait("torch.cuda.synchronize"),
            "manual_seed": seed,
            "manual_seed_all": seed,
            "get_rng_state": lambda *_: self.generator.get_state(),
            "set_rng_state": lambda state, *_: self.generator.set_state(state),
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "get_device_name": lambda *_: "a device that is not there",
        }
        if not torch.cuda.is_available():  # else PyTorch may look for its real devices
            cuda["_lazy_init"] = lambda: None
        yield from (patch.object(torch.cuda, name, value) for name, value in cuda.items())
        yield patch.object(torch.accelerator, "is_available", lambda *_: True)
        yield patch.object(torch, "Generator", _Generator)
        yield patch.object(torch, "autocast", _Autocast)
        yield patch.object(torch, "load", _load)
        yield patch.object(Tensor, "pin_memory", pin)
        yield patch.object(Tensor, "is_pinned", is_pinned)
        yield patch.object(Tensor, "record_stream", record_stream)
        group = torch._C._group_tensors_by_device_and_dtype

        def grouped(*args: Any) -> Any:
            return {(CUDA if key[0] == META else key[0], key[1]): v for key, v in group(*args).items()}

        yield patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped)
        # Optimisers and gradient norms take their foreach form for tensors on a device, of these types alone.
        for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            module = import_module(name)
            yield patch.object(module, "_foreach_supported_types", [*module._foreach_supported_types, PretendTensor])

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch loads its compiler to keep it away from here

    # What happens at every operation.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            inside = _Autocast.depth and torch._C._dispatch_tls_is_dispatch_key_excluded(AUTOCAST)
            return HOST if inside else META
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = [x for x in tensors if isinstance(x, PretendTensor)]
        wanted = kwargs.get("device")
        if not far and (wanted is None or wanted.type == "cpu"):
            return func(*args, **kwargs)

        for x in far:
            self.stream.before(func, x, self.default)

        # Where the result is. A backward pass asks for a tensor's own device by what its C++ code was told.
        to_host = wanted is not None and wanted.type == "cpu" and torch._C._current_graph_task_id() == -1
        if name in COPIES:
            near = [x for x in tensors if not isinstance(x, PretendTensor)]
            self._copy(name, far, near, to_host, args, kwargs)
        else:
            self._check(func, name, args, kwargs, tensors, far)
        # C++ code does not know where a tensor is, and so asks for copies to where it is.
        changes = kwargs.get("dtype") not in (None, args[0].dtype) if name == "_to_copy" else True
        if far and not to_host and not changes and kwargs.get("memory_format") in (None, torch.preserve_format):
            return PretendTensor(args[0].host)
        if not (func.is_view or name in NO_KERNEL):
            self.launches[str(func)] += 1
        if name in READS or self._by_mask(name, args):
            self.note_wait(name)

        # The same operation on the host's tensors.
        here = tree_map_only(PretendTensor, lambda x: x.host, (args, kwargs))
        arguments = {**here[1], "device": HOST} if wanted is not None else here[1]
        arguments = {k: v for k, v in arguments.items() if k != "pin_memory"}
        drawn = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        with self._own_numbers() if drawn and not to_host else ExitStack():
            found = func(*here[0], **arguments)
        if to_host or name in ("_local_scalar_dense", "equal", "is_nonzero"):
            return found
        if func._schema.is_mutable and func._schema.returns and len(func._schema.returns) == 1 and name.endswith("_"):
            return args[0]
        if name == "copy_" and not isinstance(args[0], PretendTensor):
            return args[0]
        made = tree_map_only(Tensor, PretendTensor, found)
        if self.stream is not self.default and not func.is_view:
            for x in tree_leaves(made):
                self.stream.after(x)
        return made

    def _copy(
        self, name: str, far: list[Tensor], near: list[Tensor], to_host: bool, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Count a copy between host and device; others are operations as any."""
        blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if name == "_to_copy":
            source, down, up = args[0], bool(far) and to_host, not far
        else:
            source = args[1] if name == "copy_" else None
            up, down = source is not None and bool(near) and source is near[0], False
            down = name == "copy_" and bool(near) and not up
            if name == "_foreach_copy_" and near and far:
                raise RuntimeError(f"{name}: tensors of the host and of the device")
        size = source.numel() * source.element_size() if source is not None else 0
        if up:
            self.bytes_to_device += size
            if size and not source.is_pinned():
                self.pageable[line_of_code()] += 1
        if down:
            self.bytes_to_host += size
        if (up or down) and blocks and size:
            self.note_wait("copy to the device" if up else "copy to the host")

    def _check(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], far: list[Tensor]
    ) -> None:
        """Raise what a real device raises."""
        generator = kwargs.get("generator")
        if generator is not None and not PretendGenerator.made(generator):
            raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        near = [x for x in tensors if not isinstance(x, PretendTensor)]
        if not far or not near:
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(args[0], PretendTensor):
            # Indices may lie on the host: they are copied, which waits.
            indices = [x for x in args[1] if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
            for index in indices:
                self.bytes_to_device += index.numel() * index.element_size()
                self.pageable[line_of_code()] += 1
                self.note_wait("index from the host")
            near = [x for x in near if not any(x is index for index in indices)]
        scalars = name in HOST_SCALARS or torch.Tag.pointwise in func.tags or name.startswith("_foreach_")
        if near and not (scalars and all(x.dim() == 0 for x in near)):
            shapes = ", ".join(str(tuple(x.shape)) for x in near)
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! (on cpu: {shapes})"
            )

    @staticmethod
    def _by_mask(name: str, args: Any) -> bool:
        """Whether this is an index by a mask, whose true entries have to be counted first."""
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
            return False
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """The host's global generator has the state of the device's."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        yield
        self.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)

    def note_wait(self, what: str) -> None:
        """Count a wait."""
        self.waits[what, line_of_code()] += 1


def forget_kept_tensors() -> None:
    """Empty the caches of the code: what it keeps between steps is of this device, or of a real one with its name."""
    for name in [name for name in sys.modules if name.startswith("loce.")]:
        for value in vars(sys.modules[name]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def line_of_code() -> str:
    """The innermost line of the repository that is running, this file's left out: "loce/models/rpn.py:132"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file != __file__ and "/.venv/" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def reason(place: str) -> str:
    """What the `# sync:` comment at a line of the repository says, or above it; "" where there is none."""
    file, number = place.rsplit(":", 1)
    lines = Path(ROOT, file).read_text(encoding="utf-8").splitlines()
    index = int(number) - 1
    first = index
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    said = " ".join(line.partition("#")[2].strip() for line in lines[first : index + 1])
    return said.partition("sync: ")[2]
