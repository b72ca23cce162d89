"""One replica of a classifier or an embedding model. Knows neither Ray nor Serve, like `ReplicaCore`.

An adapter is merged into its base here, in a deployment of its own: many small classifiers on one base cost a copy of
the base each, and each is as fast as a full fine-tune.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from service.engine.admission import EngineFailed
from service.engine.encoder import EncoderEngine, UnfitSequence
from service.engine.protocol import EngineStats
from service.errors import InvalidRequest
from service.metrics import Metrics
from service.serving.adapters import check_weights, open_folder
from service.serving.faults import as_service_error
from service.serving.messages import Deployable, Encoded, EncodeRequest, Refused, Target
from service.settings import Settings
from training.artifact import read_manifest, verify
from training.render import Renderer
from training.storage import Storage


class EncoderCore:
    """Tokenises and encodes. Every error of a request is a `Refused` item; only cancellation is raised."""

    def __init__(
        self, settings: Settings, storage: Storage, deployable: Deployable, metrics: Metrics | None = None
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._deployable = deployable
        self._metrics = metrics if metrics is not None else Metrics()
        self.engine: EncoderEngine
        self._renderer: Renderer

    async def start(self) -> None:
        """Load the folder; returns when requests can be answered. BrokenFolder if it is not the recorded one,
        AdapterMismatch if an adapter does not fit its base."""
        await asyncio.to_thread(self._load)
        await self.engine.start()

    def _load(self) -> None:
        deployable, settings, storage = self._deployable, self._settings, self._storage
        opened = open_folder(storage, deployable.folder)
        self._renderer, weights = opened.renderer, opened.local
        if deployable.base_folder is not None:
            check_weights(opened.manifest, read_manifest(storage, deployable.base_folder.key))
            verify(storage, deployable.folder.key, deployable.folder.manifest_hash)
            weights = storage.local_folder(deployable.base_folder.key)
        assert deployable.task != "generate"
        self.engine = EncoderEngine(
            weights,
            task=deployable.task,
            adapter=None if deployable.base_folder is None else opened.local,
            dtype=settings.engine_dtype,
            max_requests=settings.max_batch_size + settings.max_waiting,
            num_threads=settings.resolved_engine_num_threads,
        )

    async def stop(self) -> None:
        """End all requests and free the weights."""
        await self.engine.stop()

    def check_health(self) -> None:
        """Raises when the engine can no longer answer."""
        if not self.engine.healthy:
            raise EngineFailed("the engine has stopped")

    async def generate(self, request: EncodeRequest) -> AsyncGenerator[Encoded | Refused, None]:
        """Answer one request by one item."""
        try:
            sequences = await asyncio.to_thread(self._tokenise, request)
            try:
                rows = await self.engine.encode(sequences)
            finally:
                self._record_stats()
            yield Encoded(sum(map(len, sequences)), self.engine.labels, rows)
        except UnfitSequence as error:
            yield Refused(_unfit(error, request))
        except Exception as error:  # a process edge: errors travel as values, and faults of ours are logged here
            yield Refused(as_service_error(error, request.request_id, request.target.model_id, "input"))

    def _tokenise(self, request: EncodeRequest) -> list[tuple[int, ...]]:
        encode = self._renderer.encode_whole
        return [tuple(encode(text)) if isinstance(text, str) else text for text in request.inputs]

    def _record_stats(self) -> None:
        stats = self.engine.stats()
        self._metrics.set_engine(self._deployable.base_id, stats.num_running, stats.num_waiting, 0)

    async def prefetch(self, target: Target) -> None:
        """Nothing to fetch: its one model is loaded."""

    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self.engine.stats()


def _unfit(error: UnfitSequence, request: EncodeRequest) -> InvalidRequest:
    param = f"input[{error.index}]" if request.is_list else "input"
    code = "context_length_exceeded" if error.is_too_long else "invalid_value"
    return InvalidRequest(f"Invalid value for '{param}': {error}.", param=param, code=code)
