"""Contrastive fine-tuning of an encoder: texts that belong together move together, away from all others of the batch.

The loss is InfoNCE with in-batch negatives (van den Oord et al. 2018, "Representation Learning with Contrastive
Predictive Coding", equation 4; for text pairs Henderson et al. 2017, "Efficient Natural Language Response Suggestion
for Smart Reply"; in sentence-transformers MultipleNegativesRankingLoss). With unit vectors a of anchors and c of
candidates, which are the positives of all examples and then the negatives of triplets, the loss of example i is

    -log( exp(a_i . c_i / temperature) / sum_j exp(a_i . c_j / temperature) )

in the one direction from anchor to candidate. A candidate whose text is the example's own positive or anchor, or that
is the positive of another example with the same anchor, is no negative and left out. Each micro-batch is a pool of its
own: more gradient accumulation or more workers mean fewer negatives for each example. The order of the batches depends
on the seed alone, so a resumed run has the same pools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import cross_entropy, normalize

from training.embedder import embeddings
from training.methods.interface import LossSums, keep_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch
    from training.spec import TrainSpec

MEANS: tuple[str, ...] = ()
prepare = keep_examples


def loss_sums(spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
    """Counted are examples; right is one whose anchor is nearest to its own positive."""
    assert spec.embedding is not None
    vectors = normalize(embeddings(model, batch), dim=-1).unflatten(0, (batch.num_examples, -1))
    anchors, candidates = vectors[:, 0], vectors[:, 1:].transpose(0, 1).flatten(0, 1)
    scores = anchors @ candidates.T / cast(float, spec.embedding.temperature)
    scores = scores.masked_fill(false_negatives(batch).to(scores.device), float("-inf"))
    own = torch.arange(batch.num_examples, device=scores.device)
    loss = cross_entropy(scores, own, reduction="sum")
    return LossSums(loss, (scores.detach().argmax(dim=-1) == own).sum(), batch.num_examples)


def false_negatives(batch: MicroBatch) -> torch.Tensor:
    """Bool [examples, candidates]: which candidates belong to an example's anchor though they stand elsewhere."""
    parts = batch.input_ids.cpu().split(batch.lengths)
    numbers: dict[tuple[int, ...], int] = {}  # equal texts get equal numbers
    texts = [numbers.setdefault(tuple(parts[place].tolist()), len(numbers)) for place in batch.places]
    table = torch.tensor(texts).view(batch.num_examples, -1)
    anchors, positives, candidates = table[:, :1], table[:, 1:2], table[:, 1:].T.flatten()
    found = (candidates == positives) | (candidates == anchors)
    found[:, : batch.num_examples] |= anchors == anchors.T
    return found & ~torch.eye(*found.shape, dtype=torch.bool)
