"""A finished profile on disk: what allocation and truncation want to know of each module, see measuring.py."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from component.checkpoint import reading as files
from component.checkpoint.writer import CheckpointWriter
from component.compress.measuring import Profiling, profile_layers
from component.solve.linalg import pack_triangle, unpack_triangle
from utils.layers import DecoderLayer, LayerSource
from utils.placement import Shelf


class Profile:
    """A finished profile on disk; what is small is read at once, output moments layer by layer when asked for."""

    def __init__(self, folder: Path, identity: str, *, names: list[str], shrinkages: tuple[float | None, ...]):
        self.folder = folder
        self.identity = identity
        self.shrinkages = shrinkages
        self.shard_of: dict[str, str] = {}
        self.loss_curves: dict[str, Tensor] = {}
        self.channel_curves: dict[str, Tensor] = {}
        self.outliers: list[float] = []
        self.influence: list[float] = []
        for shard in sorted(path.name for path in folder.glob("layer-*.safetensors")):
            tensors = files.open_shard(folder / shard, lambda name: name == "layer" or name.endswith("_curves"))
            outliers, influence = tensors["layer"].tolist()
            self.outliers.append(outliers)
            self.influence.append(influence)
            for name in (name for name in names if f"{name}.loss_curves" in tensors):
                self.shard_of[name] = shard
                self.loss_curves[name] = tensors[f"{name}.loss_curves"]
                if f"{name}.channel_curves" in tensors:
                    self.channel_curves[name] = tensors[f"{name}.channel_curves"]

    def curves(self, shrinkage: float | None) -> dict[str, list[float]]:
        """By module, the expected loss at every rank where truncation weighs output errors with this shrinkage."""
        row = self.shrinkages.index(shrinkage)
        return {name: curves[row].tolist() for name, curves in self.loss_curves.items()}

    def narrow_curves(self, shrinkage: float | None) -> dict[str, list[float]]:
        """The same at every number of channels, by the projection that reads them."""
        row = self.shrinkages.index(shrinkage)
        return {name: curves[row].tolist() for name, curves in self.channel_curves.items()}

    def token_scores(self, name: str) -> Tensor:
        """(windows, length) float32 of the group whose first linear this is."""
        return files.open_tensor(self.folder / self.shard_of[name], f"{name}.token_scores")

    def output_gram(self, name: str, device: torch.device) -> Tensor:
        triangle = files.open_tensor(self.folder / self.shard_of[name], f"{name}.output_gram")
        return unpack_triangle(triangle.to(device).float())


def make_profile(
    folder: Path,
    identity: str,
    profiling: Profiling,
    *,
    model: PreTrainedModel,
    described: list[DecoderLayer],
    source: LayerSource | None = None,
    shelf: Shelf | None = None,
) -> Profile:
    """Profile the model into `folder`, or take what an earlier run with the same identity finished there.

    Raises: UsageError where the folder holds the profile of another model, data, seed or weighting.
    """
    names = [f"{layer.name}.{name}" for layer in described for name in layer.linears()]
    weighted = any(shrinkage is not None for shrinkage in profiling.shrinkages)
    with CheckpointWriter(folder, identity, resume=folder.exists()) as writer:
        shards = [files.layer_shard(index) for index in range(len(described))]
        if not files.is_finished(folder) or not all(writer.finished(shard) for shard in shards):
            for index, measured in profile_layers(model, described, profiling, source=source, shelf=shelf):
                tensors = {"layer": torch.tensor([measured.outliers, measured.influence], dtype=torch.float64)}
                for name, sensitivity in measured.linears.items():
                    tensors[f"{name}.loss_curves"] = sensitivity.loss_curves
                    if weighted:  # large, and of use to the weighting alone; bfloat16 is finer than its sampling noise
                        tensors[f"{name}.output_gram"] = pack_triangle(sensitivity.output_gram).bfloat16()
                tensors.update({f"{name}.token_scores": scores for name, scores in measured.token_scores.items()})
                tensors.update({f"{name}.channel_curves": found for name, found in measured.channel_curves.items()})
                writer.write(files.layer_shard(index), tensors)
            writer.seal({"kind": "profile", "windows": list(profiling.windows.shape)})
    return Profile(folder, identity, names=names, shrinkages=profiling.shrinkages)
