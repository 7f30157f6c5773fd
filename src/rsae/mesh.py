"""Ranks as a grid of data x latents: every row of the grid sees other samples, every column holds other latents.

Launched by torchrun, the ranks that differ in data alone train the same latents on their share of each batch, and those that differ
in latents alone see the same samples. One process is the 1 x 1 grid, in which nothing is ever sent.
"""

from __future__ import annotations

import copy
import errno
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rsae.ranks import Ranks
from rsae.sae import copied, save_sae

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Axis(NamedTuple):
    """One dimension of the grid, as this rank sees it."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: Ranks = Ranks()
    """All that there are: one that is lost is said to be."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the axis. Without a gradient."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        with self.ranks.lost():
            dist.all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The tensor's mean over the axis. Without a gradient."""
        return self.sum(tensor) / self.size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks of the axis, in order; all have one shape. Without a gradient."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.ranks.lost():
            dist.all_gather(parts, tensor.detach().contiguous(), group=self.group)
        return parts

    def sum_into(self, tensors: list[Tensor]) -> None:
        """Put the sums over the axis in the place of tensors, all at once."""
        with self.ranks.lost():
            for work in [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]:
                work.wait()  # type: ignore[union-attr]


class _Sum(torch.autograd.Function):
    """A sum over an axis of what every rank then uses alike: the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return axis.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class Mesh(NamedTuple):
    """The grid, and where this rank stands in it."""

    data: Axis = Axis()
    latents: Axis = Axis()
    devices: DeviceMesh | None = None
    ranks: Ranks = Ranks()

    @classmethod
    def of(cls, latent_shards: int = 1) -> Mesh:
        """The grid of all ranks with the latents in so many shards.

        Raises:
            ValueError: the ranks cannot be divided so, or ask for different grids.
        """
        ranks = Ranks.current()
        ranks.agree("shards of the latents", str(latent_shards))
        if latent_shards < 1 or ranks.world % latent_shards:
            raise ValueError(
                f"{ranks.world} ranks cannot hold the latents in {latent_shards} shards each: the number of ranks must be a "
                "multiple of the number of shards (torchrun --nproc-per-node)"
            )
        if ranks.world == 1:
            return cls()
        from torch.distributed.device_mesh import init_device_mesh

        shape = (ranks.world // latent_shards, latent_shards)
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        devices = init_device_mesh(kind, shape, mesh_dim_names=("data", "latents"))
        data, latents = (
            Axis(size, devices.get_local_rank(name), devices.get_group(name), ranks)
            for size, name in zip(shape, ("data", "latents"), strict=True)
        )
        return cls(data, latents, devices, ranks)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks. Without a gradient."""
        return self.latents.sum(self.data.sum(tensor))

    def sum_latents(self, partial: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Sum of what the shards of the latents decode; its gradient goes to every shard."""
        return partial if self.latents.size == 1 else _Sum.apply(partial, self.latents)  # type: ignore[return-value]

    def is_among_largest(self, values: Float[Tensor, "batch d_shard"], k: int) -> Bool[Tensor, "batch d_shard"]:
        """Which are among the k largest of their row over all shards; of equal ones, those of the first latents."""
        edge = self.largest(values, k).topk(k, dim=1).values[:, -1:]
        above, equal = values > edge, values == edge
        counts = torch.stack(self.latents.gather(torch.stack([above.sum(1), equal.sum(1)])))  # (shards, 2, batch)
        left = k - counts[:, 0].sum(0) - counts[: self.latents.rank, 1].sum(0)
        return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= left[:, None]))

    def whole(self, tensor: Float[Tensor, " d_shard"]) -> Float[Tensor, " d_sae"]:
        """What all shards of the latents have of a vector. Without a gradient."""
        return torch.cat(self.latents.gather(tensor))

    def largest(self, values: Float[Tensor, "batch d_shard"], k: int) -> Float[Tensor, "batch n"]:
        """Of each row the k largest over all shards, and perhaps some more."""
        if self.latents.size == 1:
            return values
        top = values.detach().topk(min(k, values.shape[1]), dim=1).values
        return torch.cat(self.latents.gather(top), dim=1)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], replicated: Iterable[nn.Parameter]) -> None:
        """Mean over the ranks of other data; for those `replicated` among shards of the latents, after their sum over these."""
        for axis, of, divide in ((self.latents, replicated, 1), (self.data, parameters, self.data.size)):
            if axis.size == 1:
                continue
            gradients = [p.grad for p in of if p.grad is not None]
            axis.sum_into(gradients)
            for gradient in gradients:
                gradient /= divide

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def once(self, function: Callable[[], T]) -> T:
        """What `function` returns on the main rank, which alone calls it; on every rank. Its ValueError too."""
        if self.devices is None:
            return function()
        result, error = None, None
        if self.ranks.is_main:
            try:
                result = function()
            except ValueError as refused:
                error = str(refused)
        result, error = self.ranks.broadcast((result, error))
        if error is not None:
            raise ValueError(error)
        return result  # type: ignore[return-value]

    def save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write tensors by name to a folder of safetensors, each rank what it holds.

        Raises:
            OSError: it could not be written, on whichever rank: a full disk, usually.
            ConnectionError: another rank has died.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
        from torch.distributed.checkpoint.api import CheckpointException

        with _alone_is_meant(), self.ranks.lost():
            writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
            try:
                save(self._placed(tensors), storage_writer=writer, no_dist=self.devices is None)
            except CheckpointException as error:  # no Exception to Python, and no reason that a reader finds
                rank, (reason, _) = next(iter(error.failures.items()))
                number = reason.errno if isinstance(reason, OSError) else None
                raise OSError(number or errno.EIO, f"rank {rank} could not write {path} ({reason})") from error

    def load(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Read into tensors what any number of ranks saved under their names.

        Raises:
            ValueError: what is there is damaged, or not of these tensors.
            ConnectionError: another rank has died.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        from torch.distributed.checkpoint.api import CheckpointException

        placed = self._placed(tensors)
        with _alone_is_meant(), self.ranks.lost():
            try:
                load(placed, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=self.devices is None)
            except CheckpointException as error:  # no Exception to Python
                reason, _ = next(iter(error.failures.values()))
                raise ValueError(f"{path} cannot be read ({reason}): delete it, and the run begins anew") from error
        for name, tensor in tensors.items():
            found = placed[name]
            tensor.copy_(found.to_local() if self.devices is not None and is_per_latent(name, tensor) else found)

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The same tensors, those of each latent as shards of the whole."""
        if self.devices is None:
            return dict(tensors)
        from torch.distributed.tensor import DTensor, Shard

        latents = self.devices["latents"]
        return {
            name: DTensor.from_local(tensor, latents, [Shard(_latents_axis(name))], run_check=False)
            if is_per_latent(name, tensor)
            else tensor
            for name, tensor in tensors.items()
        }


ALONE = Mesh()
JOINING = ".joining"
"""Folder, in that of a run, in which its result is put together."""

PER_LATENT = {
    "W_enc", "W_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold", "log_threshold", "silent", "rate", "C_in",
    "C_out", "log_C_in", "log_C_out",
}  # fmt: skip
"""Last parts of the names of tensors that have an entry for each latent, unless they are scalars."""


def is_per_latent(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of an SAE, of what trains it or of its optimizer has an entry for each latent."""
    return name.rpartition(".")[2] in PER_LATENT and tensor.ndim > 0


def _latents_axis(name: str) -> int:
    """The dimension of a tensor that counts latents: SAELens has W_enc as (d_in, d_sae), all else has latents first."""
    return 1 if name == "W_enc" else 0


def shard_of(sae: SAE[Any], mesh: Mesh) -> SAE[Any]:
    """A copy of the SAE with the latents of this rank alone; of a checkpoint that is mapped into memory nothing else is read."""
    if mesh.latents.size == 1:
        return copied(sae)
    weights = sae.state_dict()
    for name, tensor in weights.items():
        if is_per_latent(name, tensor):
            chunk = tensor.chunk(mesh.latents.size, dim=_latents_axis(name))[mesh.latents.rank]
            weights[name] = chunk.clone(memory_format=torch.contiguous_format)
    return with_weights(sae, weights)


def save_joined(part: SAE[Any], mesh: Mesh, folder: Path) -> None:
    """Save the SAE of all ranks' parts as a SAELens checkpoint.

    No rank ever has it in memory: each writes its part to folder/JOINING, and the first maps files there that it puts them together
    in. These go when it is done.

    Raises:
        ValueError: the disk is too full for that.
    """
    if mesh.latents.size == 1:
        mesh.once(lambda: save_sae(part, folder))
        return
    scratch = folder / JOINING
    mesh.once(lambda: shutil.rmtree(scratch, ignore_errors=True))
    mesh.save(part.state_dict(), scratch / "parts")

    def publish() -> None:
        whole = {}
        for name, tensor in part.state_dict().items():
            whole[name] = list(tensor.shape)
            if is_per_latent(name, tensor):
                whole[name][_latents_axis(name)] *= mesh.latents.size
        needed, free = 2 * 4 * sum(map(math.prod, whole.values())), shutil.disk_usage(folder).free
        if needed > free:  # to run out of it in a mapped file would end the process without a word
            raise ValueError(
                f"{folder} has {free / 1e9:.1f} GB free, and the result takes {needed / 1e9:.1f}: make room"
            )
        weights = {
            name: torch.from_file(str(scratch / name), shared=True, size=math.prod(shape)).view(shape)
            for name, shape in whole.items()
        }
        ALONE.load(weights, scratch / "parts")
        sae = with_weights(part, weights)
        save_sae(sae, folder)
        sae.to("meta")  # what is mapped would outlive its name
        weights.clear()
        shutil.rmtree(scratch, ignore_errors=True)

    mesh.once(publish)


def with_weights(sae: SAE[Any], weights: Mapping[str, Tensor]) -> SAE[Any]:
    """An SAE like `sae` of these weights themselves, not of copies; their number of latents may be another."""
    cfg = copy.deepcopy(sae.cfg)
    device, cfg.device, cfg.d_sae = cfg.device, "meta", len(weights["W_dec"])
    other = type(sae)(cfg)
    other.cfg.device = device
    other.load_state_dict(weights, assign=True)
    return other


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """torch warns that it takes a process without others for one that is meant to be alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
