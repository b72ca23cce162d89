"""Import of base models into storage: from a folder, from the Hub, or the starter that is built on the spot.

safetensors only, no code from the base is ever run. The wanted files, and no others, go to `bases/<content hash>/`,
manifest last. Does not decide which bases are allowed, and knows no database.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training.artifact import FileEntry, Fingerprint, Manifest, canonical_json, commit, read_manifest
from training.model_shape import ENCODERS, INDEX, SINGLE, ModelShape, ShapeError, read_json
from training.pooling import MODULES, POOLING_PATTERNS, PoolingError, pooling_files, read_pooling
from training.render import TOKENIZER_FILES, Renderer, RenderError
from training.spec import Contract
from training.storage import Storage

STARTER = "starter"
_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_HUB_PATTERNS = ["model*.safetensors", INDEX, "config.json", *TOKENIZER_FILES, *POOLING_PATTERNS]

Progress = Callable[[str], None]


class BaseError(ValueError):
    """A source that cannot become a base model; the message says what to do."""


class ImportedBase(Contract):
    """A base that is complete in storage."""

    storage_key: str
    content_hash: str
    manifest_hash: str
    fingerprint: Fingerprint
    capabilities: tuple[str, ...]  # "completions", and "chat" if it has a chat template; of an encoder "embed"
    architecture: str
    num_parameters: int
    max_context: int  # tokens


def import_base(storage: Storage, *, id: str, source: str, revision: str | None, progress: Progress) -> ImportedBase:
    """Check a base and copy it into storage. The same content imported again changes nothing. BaseError says why not.

    `source` is a folder, a Hub id (with `revision`), or "starter"."""
    with _fetched(source, revision, progress) as folder:
        names = _wanted_files(folder)
        shape, renderer = _checked(folder)
        progress("Hashing the files")
        entries = {name: _hash(folder / name) for name in names}
        content_hash = hash_content(entries)
        key = f"bases/{content_hash}"
        manifest = read_manifest(storage, key)
        if manifest is None:
            for name in names:
                progress(f"Copying {name} ({entries[name].size_bytes / 1e6:.1f} MB)")
                _copy(folder / name, storage, f"{key}/{name}", entries[name])
            manifest = Manifest(
                kind="base",
                files=entries,
                base_id=id,
                base_content_hash=content_hash,
                fingerprint=renderer.fingerprint(dtype=shape.dtype, adapter="none"),
            )
            commit(storage, key, manifest)
        progress("The base is complete in storage")
        return ImportedBase(
            storage_key=key,
            content_hash=content_hash,
            manifest_hash=manifest.hash(),
            fingerprint=manifest.fingerprint,
            capabilities=_capabilities(shape, renderer),
            architecture=shape.architecture,
            num_parameters=shape.num_parameters,
            max_context=shape.max_context,
        )


def _capabilities(shape: ModelShape, renderer: Renderer) -> tuple[str, ...]:
    """What the base can do as it is."""
    if not shape.is_causal:
        return ("embed",)
    return ("completions", "chat") if renderer.has_chat_template else ("completions",)


def hash_content(entries: dict[str, FileEntry]) -> str:
    """One hash for a set of files: sha256 over their sorted names and hashes."""
    return hashlib.sha256(canonical_json([[name, entries[name].sha256] for name in sorted(entries)])).hexdigest()


# -- where a base comes from -------------------------------------------------------------------------------------------


@contextmanager
def _fetched(source: str, revision: str | None, progress: Progress) -> Iterator[Path]:
    """The source as a local folder; what was fetched or built for it is removed afterwards."""
    path = Path(source).expanduser()
    if source != STARTER and path.is_dir():
        yield path.resolve()
        return
    if source != STARTER and (path.exists() or source.startswith((".", "/", "~"))):
        raise BaseError(f"{source} is not a folder")
    scratch = Path(tempfile.mkdtemp(prefix="base-"))
    try:
        if source == STARTER:
            from training.starter import build_starter  # builds with torch: only where it is really wanted

            build_starter(scratch, progress)
        else:
            _download(source, revision, scratch, progress)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(source: str, revision: str | None, folder: Path, progress: Progress) -> None:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as HubConnectionError

    progress(f"Downloading {source} at {revision or 'its newest revision'} from the Hub")
    try:
        names = list_repo_files(source, revision=revision)
        if not any(name.endswith(".safetensors") for name in names):
            raise BaseError(_no_safetensors(names))
        snapshot_download(source, revision=revision, local_dir=folder, allow_patterns=_HUB_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HubConnectionError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{source} is no folder here, and cannot be fetched from the Hub: {reason}") from error


# -- what a base must be -----------------------------------------------------------------------------------------------


def _wanted_files(folder: Path) -> list[str]:
    """Names of the files to keep, all of them regular files inside the folder."""
    present = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    if not any(name.endswith(".safetensors") for name in present):
        raise BaseError(_no_safetensors(present))
    if "config.json" not in present:
        raise BaseError("config.json is missing: this is not a model folder in Hugging Face layout")
    if "tokenizer.json" not in present:
        raise BaseError(
            "tokenizer.json is missing; make it once with "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        weights = ModelShape(folder).weight_files()
    except ShapeError as error:
        raise BaseError(str(error)) from error
    for name in weights:
        if "/" in name or "\\" in name or name in ("", ".", "..") or not name.endswith(".safetensors"):
            raise BaseError(f"{INDEX} names {name!r}: weights must be safetensors files inside the folder")
        if name not in present:
            raise BaseError(f"{name} is missing; found {_listed(present)}")
    index = [INDEX] if INDEX in present else []
    tokenizer = [name for name in TOKENIZER_FILES if name in present]
    names = sorted({*weights, *index, "config.json", *tokenizer, *_pooling_files(folder)})
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise BaseError(f"{name} is a link that leads out of the folder")
        if not (folder / name).is_file():
            raise BaseError(f"{name} is not a regular file")
    return names


def _pooling_files(folder: Path) -> list[str]:
    """Those of an encoder in sentence-transformers' layout, which must be one that is understood."""
    try:
        names = pooling_files(folder)
        read_pooling(folder)
    except PoolingError as error:
        raise BaseError(f"{error}; without {MODULES} the base can be imported for other uses") from error
    return names


def _no_safetensors(names: list[str]) -> str:
    foreign = [name for name in names if name.endswith(_FOREIGN_WEIGHTS)]
    if foreign:
        return f"only safetensors weights are read, and this base has {_listed(foreign)}: convert to safetensors"
    return f"no {SINGLE} in the base; found {_listed(names)}"


def _listed(names: list[str]) -> str:
    if not names:
        return "no files"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _checked(folder: Path) -> tuple[ModelShape, Renderer]:
    """Read configuration, weight headers and tokenizer; BaseError if no method can start from what they make."""
    try:
        shape = ModelShape(folder)
        for name in ("config.json", "tokenizer_config.json"):
            if "auto_map" in read_json(folder / name, missing_ok=True):
                raise BaseError(f"{name} has auto_map: the base needs code of its own, which is never run")
        if "quantization_config" in shape.config:
            raise BaseError("the weights are quantised; import the base in float32, float16 or bfloat16")
        if not shape.methods():
            named = f"{shape.architecture or 'no architecture'} of the type {shape.model_type or 'unknown'}"
            raise BaseError(
                f"config.json names {named}; bases can be causal language models (…ForCausalLM), and encoders "
                f"(…Model, …ForMaskedLM or …ForPreTraining) of the types {', '.join(sorted(ENCODERS))}"
            )
        if shape.num_parameters == 0:
            raise BaseError("the safetensors files hold no weights")
        _ = shape.hidden_size, shape.num_layers, shape.max_context  # present, or ShapeError
        renderer = Renderer.load(folder)
        if renderer.vocab_size > shape.vocab_size:
            raise BaseError(
                f"the tokenizer's ids reach {renderer.vocab_size - 1}, and the model knows {shape.vocab_size} tokens"
            )
    except (ShapeError, RenderError) as error:
        raise BaseError(str(error)) from error
    return shape, renderer


# -- copying -----------------------------------------------------------------------------------------------------------


def _hash(path: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size_bytes=size, sha256=digest.hexdigest())


def _copy(path: Path, storage: Storage, key: str, expected: FileEntry) -> None:
    """Copy one file; what is written must be what was hashed."""
    digest = hashlib.sha256()
    with path.open("rb") as source, storage.open_write(key) as sink:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != expected.sha256:
        raise BaseError(f"{path.name} changed while it was copied; try again")
