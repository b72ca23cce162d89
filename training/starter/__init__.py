"""The starter base: a tiny chat model that Tunesmith makes on the spot, so that a first run needs no download.

It speaks simple English and answers simple questions; its purpose is to be fine-tuned in seconds on a laptop's CPU.
This file owns the order of the steps; `words` and `corpus` the text, `tokenizer` the vocabulary and the chat template,
`pretrain` the model. Nothing here imports torch before `build_starter` is called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

STARTER_ID = "starter"
SEED = 7
NUM_STEPS = 300
NUM_THREADS = 2  # fixed, because another number of threads adds floats in another order
VOCABULARY_SIZE = 1024
NUM_TOKENIZER_DOCUMENTS = 6000


def build_starter(folder: Path, progress: Callable[[str], None], *, num_steps: int = NUM_STEPS) -> None:
    """Write the starter base into `folder`: about 40 s on two cores, the same bytes each time on one machine.

    `progress` gets one line now and then. `num_steps` is there for tests; fewer steps make a model that only babbles.
    """
    import torch

    from training.starter import pretrain
    from training.starter.corpus import documents
    from training.starter.tokenizer import save_tokenizer, train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    progress("training the tokenizer")
    tokenizer = train_tokenizer(documents(NUM_TOKENIZER_DOCUMENTS, SEED), VOCABULARY_SIZE)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(NUM_THREADS)
        try:
            rows = pretrain.pack(tokenizer, documents(100 * num_steps, SEED), num_steps)
            model = pretrain.new_model(tokenizer)
            loss = pretrain.train(model, rows, progress)
        finally:
            torch.set_num_threads(threads)
    save_tokenizer(tokenizer, folder)
    pretrain.save_model(model, folder)
    progress(f"starter base ready, loss {loss:.2f}")
