"""vLLM behind the engine protocol: for models that are spread over several GPUs, and whatever its kernels do better.

vLLM chooses the tokens. Text, stop strings, finish reasons and the entries of log-probabilities are made of them here
as for the native engine, so an application cannot tell the two apart. Imported only where a base is served by it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from service.engine.admission import EngineFailed, Places, UnfitRequest, check_request
from service.engine.detokenizer import ChoiceText, echo_of
from service.engine.native.residency import Residency
from service.engine.protocol import AdapterMismatch, AdapterRef, Delta, EngineStats, GenerateRequest
from service.engine.token_text import Score, TokenDecoder, TokenPieces

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
_MAX_ADAPTER_RANK = 64  # vLLM takes memory for it at the start
_MAX_ADAPTERS_PER_STEP = 8  # likewise; requests with more different ones wait for each other


class VllmEngine:
    """One base model in vLLM's own processes."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: TokenDecoder,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch_size: int = 32,
        max_waiting: int = 256,
        max_resident_adapters: int = 16,
        num_gpus: int = 1,
        stop_token_ids: tuple[int, ...] = (),
        max_context: int | None = None,
    ) -> None:
        """`num_gpus` share the weights (tensor parallelism); without any vLLM must be a build for CPUs."""
        self.max_context = max_context or 0
        self._options: dict[str, Any] = {
            "model": str(folder),
            "dtype": _DTYPES[dtype],
            "load_format": "safetensors",
            "trust_remote_code": False,
            "skip_tokenizer_init": True,  # ours reads the text
            "max_num_seqs": max_batch_size,
            "max_model_len": max_context and max_context + 1,  # it draws a token also where none is asked for
            "tensor_parallel_size": max(1, num_gpus),
            "max_logprobs": 20,
            "disable_log_stats": True,
        }
        if max_resident_adapters:
            self._options |= {
                "enable_lora": True,
                "max_lora_rank": _MAX_ADAPTER_RANK,
                "max_loras": min(max_resident_adapters, _MAX_ADAPTERS_PER_STEP),
                "max_cpu_loras": max_resident_adapters,
            }
        self._pieces = TokenPieces(tokenizer)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._places = Places(max_batch_size, max_waiting)
        self._max_batch_size = max_batch_size
        self._adapters: Residency[LoRARequest] = Residency(max_resident_adapters, self._add)
        self._numbers = itertools.count(1)
        self._outboxes: set[asyncio.Queue[list[Delta] | BaseException]] = set()  # of open streams
        self._num_generated = 0
        self._vocab_size: int | None = None
        self._llm: Any = None

    @property
    def healthy(self) -> bool:
        """Whether it can answer."""
        return self._llm is not None and not self._llm.errored

    async def start(self) -> None:
        """Start vLLM and load the weights, which takes it half a minute and more."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._loop = asyncio.get_running_loop()
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._options))
        self.max_context = self._llm.model_config.max_model_len - 1
        self._vocab_size = self._llm.model_config.get_vocab_size()

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Make an adapter resident. AdapterMismatch if it cannot run here."""
        self._check_running()
        await self._adapters.acquire(adapter)
        self._adapters.release(adapter)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Delta]]:
        """See Engine. Each choice is a request of its own to vLLM, which reads their common prompt once."""
        self._check_running()
        check_request(request, max_context=self.max_context, vocab_size=self._vocab_size)
        if request.echo and request.sampling.logprobs is not None and "enable_lora" in self._options:
            raise UnfitRequest("vLLM breaks down when it scores a prompt while it has room for adapters")
        self._places.take(request.n)
        adapter = None
        try:
            if request.adapter is not None:
                adapter = await self._adapters.acquire(request.adapter)
            async with aclosing(self._choices(request, adapter)) as steps:
                async for deltas in steps:
                    yield deltas
        finally:
            if request.adapter is not None and adapter is not None:
                self._adapters.release(request.adapter)
            self._places.give_back(request.n)

    async def _choices(self, request: GenerateRequest, adapter: LoRARequest | None) -> AsyncGenerator[list[Delta]]:
        """The deltas of all choices, as they come."""
        outbox: asyncio.Queue[list[Delta] | BaseException] = asyncio.Queue()
        self._outboxes.add(outbox)
        tasks = [asyncio.create_task(self._send(request, index, adapter, outbox)) for index in range(request.n)]
        num_open = request.n
        try:
            while num_open:
                deltas = await outbox.get()
                self._check_running()
                if isinstance(deltas, BaseException):
                    raise EngineFailed(f"vLLM failed: {deltas}") from deltas
                num_open -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        finally:
            self._outboxes.discard(outbox)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # what is left is aborted by then

    async def _send(
        self,
        request: GenerateRequest,
        index: int,
        adapter: LoRARequest | None,
        outbox: asyncio.Queue[list[Delta] | BaseException],
    ) -> None:
        try:
            async with aclosing(self._choice(request, index, adapter)) as steps:
                async for deltas in steps:
                    outbox.put_nowait(deltas)
        except Exception as error:  # task edge: whoever reads the outbox raises it
            outbox.put_nowait(error)

    async def _choice(
        self, request: GenerateRequest, index: int, adapter: LoRARequest | None
    ) -> AsyncGenerator[list[Delta]]:
        """One choice, from its first delta to its end."""
        text = ChoiceText(
            self._pieces, request, index, stop_token_ids=self._stop_token_ids, max_context=self.max_context
        )
        outputs = self._llm.generate(
            {"prompt_token_ids": list(request.prompt_token_ids)},
            self._sampling(request, index),
            request_id=f"{request.id}-{uuid.uuid4().hex}",
            lora_request=adapter,
        )
        is_first = True
        async with aclosing(outputs) as steps:  # closing it aborts what is left
            async for output in steps:
                deltas = []
                if is_first:
                    echo = echo_of(self._pieces, request, _prompt_scores(request, output.prompt_logprobs))
                    deltas, is_first = [text.begin(echo)], False
                (completion,) = output.outputs
                for number, token in enumerate(completion.token_ids):
                    if text.finish_reason is not None:
                        break
                    self._num_generated += 1
                    score = _score(token, completion.logprobs[number], request) if completion.logprobs else None
                    is_last = completion.finish_reason is not None and number == len(completion.token_ids) - 1
                    deltas.append(text.push(token, score, last=is_last))
                if sent := [delta for delta in deltas if delta is not None]:
                    yield sent
                if text.finish_reason is not None:
                    return

    def _sampling(self, request: GenerateRequest, index: int) -> Any:
        """vLLM's parameters; stop strings are ours. Its meaning of each is what the protocol says."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        seed = None
        if sampling.seed is not None:
            digest = hashlib.blake2b(f"{sampling.seed}/{index}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "big") >> 1
        return SamplingParams(
            max_tokens=max(1, sampling.max_tokens),  # of a prompt that is only scored, the token is dropped
            temperature=sampling.temperature,
            top_p=sampling.top_p or 1e-9,  # vLLM wants more than 0
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias) or None,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.logprobs if request.echo else None,
            stop_token_ids=list(self._stop_token_ids),
            ignore_eos=True,  # the ids above are all that end an answer
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def stats(self) -> EngineStats:
        """Current counts; vLLM does not tell which of its requests run, so the oldest count as running."""
        num_running = min(self._places.num_held, self._max_batch_size)
        return EngineStats(
            num_running=num_running,
            num_waiting=self._places.num_held - num_running,
            num_generated_tokens=self._num_generated,
            resident_adapters=self._adapters.resident,
            num_adapter_loads=self._adapters.num_loads,
            adapter_load_s=tuple(self._adapters.load_s),
        )

    async def stop(self) -> None:
        """End all streams and vLLM's processes."""
        llm, self._llm = self._llm, None
        for outbox in self._outboxes:
            outbox.put_nowait(EngineFailed("the engine was stopped"))
        self._adapters.clear()
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    def _check_running(self) -> None:
        if not self.healthy:
            raise EngineFailed("vLLM is not running")

    def _add(self, ref: AdapterRef) -> LoRARequest:
        """Load an adapter; in a thread, while the loop goes on."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(ref.id, next(self._numbers), str(ref.folder))
        try:
            added = asyncio.run_coroutine_threadsafe(self._llm.add_lora(request), self._loop).result()
        except Exception as error:  # vLLM raises bare exceptions of all kinds for adapters that do not fit
            raise AdapterMismatch(f"adapter {ref.id} cannot run on vLLM: {error}") from error
        if not added:
            raise AdapterMismatch(f"adapter {ref.id} was refused by vLLM")
        return request


def _score(token: int, logprobs: dict[int, Any], request: GenerateRequest) -> Score:
    """Of one position; vLLM adds the token itself to the likeliest where it is not among them."""
    likeliest = sorted(((id, entry.logprob) for id, entry in logprobs.items()), key=lambda pair: -pair[1])
    return Score(logprobs[token].logprob, tuple(likeliest[: request.sampling.logprobs]))


def _prompt_scores(request: GenerateRequest, logprobs: list[dict[int, Any] | None] | None) -> list[Score] | None:
    """Of the prompt's tokens but the first, where they are asked for."""
    if not request.echo or request.sampling.logprobs is None or logprobs is None:
        return None
    tokens = request.prompt_token_ids[1:]
    return [_score(token, entry or {}, request) for token, entry in zip(tokens, logprobs[1:], strict=True)]
