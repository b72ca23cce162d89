"""Servable folders: an adapter in PEFT layout or full weights, beside the base's tokenizer files. Manifest last."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from training.artifact import MANIFEST, Manifest, commit, hash_files
from training.classifier import label_config
from training.lora import adapter_config, config_hash, save_adapter
from training.model_shape import read_json
from training.pooling import pooling_files
from training.render import TOKENIZER_FILES, Renderer
from training.spec import TrainSpec
from training.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.artifact import Fingerprint
    from training.fsdp import ShardedTrainer
    from training.optim import Trainer

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Exporter:
    """Writes the model of one run in the form that serving reads."""

    spec: TrainSpec
    base_folder: Path
    base_dtype: torch.dtype
    model: PreTrainedModel
    trainer: Trainer | ShardedTrainer

    def fingerprint(self) -> Fingerprint:
        """What serving must share with this run."""
        adapter = "none"
        if self.spec.adapter is not None:
            adapter = config_hash(adapter_config(self.model, self.spec.adapter, self.spec.base.id))
        dtype = str(self.base_dtype).removeprefix("torch.")
        return Renderer.load(self.base_folder).fingerprint(dtype=dtype, adapter=adapter)

    def write(self, folder: Path) -> None:
        """Write weights and text files into an empty local folder."""
        if self.spec.adapter is not None:
            save_adapter(self.model, self.spec.adapter, self.spec.base.id, folder)
            names = [*TOKENIZER_FILES, "config.json"]  # all that a Renderer reads: serving renders as training did
        else:
            self.model.save_pretrained(folder, state_dict=self._full_weights())
            # Configuration, tokenizer and licences exactly as the base has them.
            names = [file.name for file in self.base_folder.iterdir() if ".safetensors" not in file.name]
        for name in names:
            if name != MANIFEST and (self.base_folder / name).is_file():
                shutil.copy(self.base_folder / name, folder / name)
        self._write_labels(folder)
        self._write_pooling(folder)

    def _write_pooling(self, folder: Path) -> None:
        """What says how an embedding is made of token states, where the base says it."""
        for name in pooling_files(self.base_folder) if self.spec.method == "embedding" else ():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(self.base_folder / name, folder / name)

    def _write_labels(self, folder: Path) -> None:
        """A classifier's configuration is its base's, but for the head."""
        if self.spec.classification is None:
            return
        changes = {
            "architectures": [type(self.model).__name__],
            "pad_token_id": self.model.config.pad_token_id,
            **label_config(self.spec.labels()),
        }
        config = read_json(folder / "config.json") | changes
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))

    def _full_weights(self) -> dict[str, torch.Tensor]:
        """All weights in the base's dtype, from the fp32 masters; tied ones stay one tensor."""
        masters = {id(param): self.trainer.masters[name] for name, param in self.trainer.params.items()}
        cast: dict[int, torch.Tensor] = {}
        weights = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in cast:
                source = masters.get(id(tensor), tensor).detach()
                cast[id(tensor)] = source.to(self.base_dtype) if source.is_floating_point() else source
            weights[name] = cast[id(tensor)]
        return weights

    def commit(
        self,
        storage: Storage,
        key: str,
        scratch_dir: Path,
        step: int,
        tensors: dict[str, torch.Tensor],
        texts: dict[str, bytes],
    ) -> str:
        """Write a whole checkpoint to storage, over any unfinished one, and commit it; returns the manifest's hash."""
        staging = scratch_dir / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self.write(staging)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staging / OPTIMIZER_FILE)
        for name, text in texts.items():
            (staging / name).write_bytes(text)
        names = [file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file()]
        manifest = Manifest(
            kind="checkpoint",
            files=hash_files(Storage(str(scratch_dir)), "staging", names),  # read here, not back from far storage
            base_id=self.spec.base.id,
            base_content_hash=self.spec.base.content_hash,
            fingerprint=self.fingerprint(),
            spec=self.spec,
            step=step,
        )
        storage.delete(key)
        storage.put_folder(staging, key)
        manifest_hash = commit(storage, key, manifest)
        shutil.rmtree(staging)
        return manifest_hash
