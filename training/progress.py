"""What a run says while it works, and what it may be told back.

Workers know one channel: `Channel.send` takes progress items and returns the current wish. Items carry a sequence
number that is unique within one attempt, so a receiver that sees an item twice stores it once.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Protocol

from pydantic import Field

from training.spec import Contract


class Wish(StrEnum):
    """What the owner of a job wants from its run; obeyed by all ranks at the next step boundary."""

    GO_ON = "go_on"
    CHECKPOINT_AND_STOP = "checkpoint_and_stop"
    CANCEL = "cancel"


class Item(Contract):
    """Base of progress items."""

    seq: int  # 0, 1, … within one attempt
    at: float  # Unix seconds at the worker


class Message(Item):
    """A plain sentence for the job's event list."""

    kind: Literal["message"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    text: str


class StepMetrics(Item):
    """One optimizer step. Loss and accuracy are means over what the method counts in the whole (global) batch: trained
    tokens predicted right (supervised), pairs whose better answer has the larger reward (dpo), texts whose label is the
    likeliest (classification), anchors nearest to their own positive (embedding). OpenAI's name of the field is kept
    for all."""

    kind: Literal["step"] = "step"
    step: int  # 1-based, counts optimizer steps
    total_steps: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    num_trained_tokens: int  # tokens with a loss in this step, over all workers
    tokens_per_s: float
    means: dict[str, float] = Field(
        default_factory=dict
    )  # what the method reports beside them, see its MEANS: rewards (dpo)


class EvalMetrics(Item):
    """Validation after `step` optimizer steps, over the whole validation set."""

    kind: Literal["eval"] = "eval"
    step: int
    valid_loss: float
    valid_mean_token_accuracy: float
    means: dict[str, float] = Field(default_factory=dict)  # as in StepMetrics


class Sample(Item):
    """What the weights after `step` optimizer steps answer to one of the spec's sample prompts."""

    kind: Literal["sample"] = "sample"
    step: int
    prompt: str
    text: str


class CheckpointSaved(Item):
    """A checkpoint is complete in storage (its manifest is there). It can be resumed from and served."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    key: str
    manifest_hash: str
    train_loss: float
    train_mean_token_accuracy: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None


class CheckpointDeleted(Item):
    """An older checkpoint was removed to keep the last k and the best."""

    kind: Literal["checkpoint_deleted"] = "checkpoint_deleted"
    step: int
    key: str


class ArtifactWritten(Item):
    """The run is complete: a servable artifact is in storage, manifest last."""

    kind: Literal["artifact"] = "artifact"
    key: str
    manifest_hash: str
    step: int  # that the weights are of: with a validation set the best, otherwise the last


class Stopped(Item):
    """The run ended on a wish; after CHECKPOINT_AND_STOP a checkpoint of exactly `step` is in storage."""

    kind: Literal["stopped"] = "stopped"
    wish: Wish
    step: int


class Failed(Item):
    """The run ended with a failure that a retry would not mend (bad data, not finite, out of memory)."""

    kind: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None


ProgressItem = Annotated[
    Message
    | StepMetrics
    | EvalMetrics
    | Sample
    | CheckpointSaved
    | CheckpointDeleted
    | ArtifactWritten
    | Stopped
    | Failed,
    Field(discriminator="kind"),
]


class Channel(Protocol):
    """Where a run sends its progress. `send` may block for I/O: the loop calls it from a side thread."""

    def send(self, items: list[ProgressItem]) -> Wish:
        """Store the items in order; return the current wish."""
        ...
