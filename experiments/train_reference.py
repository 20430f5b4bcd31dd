r"""Train the reference language model: a 5.8M-parameter Llama on the source of CPython's standard library.

Run:     python -m experiments.train_reference --work DIR --out mpq/assets/reference_lm
Writes:  the Hugging Face layout (`config.json`, bf16 `model.safetensors`, `tokenizer.json`), held-out texts, a model
card.
Resume:  type the same command again: the batch at step s depends on (seed, s) alone, and Orbax restores the exact step.

Schedule: warmup, constant, then linear decay to zero (WSD; Hu et al. 2024, arXiv:2404.06395). A run that has decayed
goes on in a further cycle of the same form (WSD-S; Wen et al. 2024, arXiv:2410.05192), so that the held-out losses at
the ends of the cycles show how much longer training still buys. Optimizer: Muon for matrices and AdamW for the rest
(Jordan et al. 2024, as in `optax.contrib.muon`).
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments import stdlib_corpus
from mpq.models.llama import Llama, LlamaConfig

BOS, EOS = "<|bos|>", "<|endoftext|>"
MODEL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class Training:
    """Hyperparameters of one run; they are written into the model card."""

    steps: int = 2500
    restarts: tuple[int, ...] = ()
    """Steps at which one cycle of the schedule ends and the next begins."""
    batch: int = 64
    window: int = 512
    peak_lr: float = 5e-3
    adam_lr: float = 3e-3
    warmup: int = 60
    decay: float = 0.5
    """Share of each cycle, at its end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 1.7
    """Ten passes over eight million tokens are memorized unless weights decay much faster than is usual (Kim et al.
    2025, arXiv:2509.14786); `experiments/results/train_reference.json` has the values that were compared."""
    seed: int = 0
    compute_dtype: str = "bfloat16"
    eval_every: int = 500
    save_every: int = 50


def main(work: Path, out: Path | None = None, training: Training = Training(), export_only: bool = False) -> None:
    """Train (or continue) in `work`; when done, write the model to `out`."""
    corpus = stdlib_corpus.read()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_or_train_tokenizer(work / "tokenizer.json", corpus)
    train = load_or_encode(work / "train.npy", tokenizer, corpus.train)
    held_out = windows_of(encode(tokenizer, corpus.selection), training.window)[:96]
    graph, params, history = fit(work, training, train, held_out, export_only)
    if out is not None:
        from experiments import reference_card

        reference_card.export(out, graph, params, tokenizer, corpus, MODEL, training, history)


def fit(
    work: Path, training: Training, train: np.ndarray, held_out: np.ndarray, export_only: bool
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The training loop. Returns graph, parameters and the history of held-out losses (nats per token)."""
    graph, params = nnx.split(
        Llama(MODEL, dtype=jnp.dtype(training.compute_dtype), rngs=nnx.Rngs(training.seed)), nnx.Param
    )
    optimizer = make_optimizer(training)
    opt_state = optimizer.init(params)
    manager = ocp.CheckpointManager(
        (work / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    start = 0
    history: Any = []  # Orbax's JSON takes a list, though its types ask for an object
    if (latest := manager.latest_step()) is not None:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, opt_state))
        restored = manager.restore(
            latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore())
        )
        (params, opt_state), history, start = restored["state"], restored["history"], latest
    if export_only:
        return graph, params, history

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graph, p)(tokens), tokens))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    evaluate = jax.jit(lambda params, tokens: next_token_loss(nnx.merge(graph, params)(tokens), tokens))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("train", total=training.steps, completed=start, loss=math.nan, speed=0.0)
        shown: Any = math.nan
        for step in range(start, training.steps):
            tokens = batch_at(train, training, step, bos=0)
            params, opt_state, loss = update(params, opt_state, tokens)
            speed = (progress.tasks[0].speed or 0.0) * tokens.size
            # the loss of the step before: waiting for this one would leave an accelerator idle between steps
            progress.update(task, advance=1, loss=float(shown), speed=speed)
            shown = loss
            done = step + 1
            if done % training.eval_every == 0 or done == training.steps:
                nll = float(np.mean([evaluate(params, b) for b in np.split(held_out, len(held_out) // 16)]))
                device = jax.devices()[0].device_kind
                history.append({"step": done, "train_loss": float(loss), "held_out_nll": nll, "device": device})
                progress.console.print(f"step {done}: train {float(loss):.4f}, held out {nll:.4f} nats per token")
            if done % training.save_every == 0 or done == training.steps:
                manager.save(
                    done,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave((params, opt_state)), history=ocp.args.JsonSave(history)
                    ),
                )
    manager.wait_until_finished()
    return graph, params, history


def make_optimizer(training: Training) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, Adam on embedding and norms, one schedule for both."""

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: (
                optax.contrib.MuonDimensionNumbers()
                if p.ndim == 2 and "embed" not in jax.tree_util.keystr(path)
                else None
            ),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(training, training.peak_lr),
            weight_decay=training.weight_decay,
            consistent_rms=0.2,
            adam_b2=0.95,
            adam_learning_rate=schedule(training, training.adam_lr),
            muon_weight_dimension_numbers=matrices,
        ),
    )


def schedule(training: Training, peak: float) -> optax.Schedule:
    """Learning rate at a step: cycles of warmup to `peak`, constant, and linear decay to zero (WSD-S)."""
    ends = (*training.restarts, training.steps)
    pieces: list[optax.Schedule] = []
    lengths: list[int] = []
    for start, end in zip((0, *training.restarts), ends, strict=True):
        decay = round(training.decay * (end - start))
        pieces += [
            optax.linear_schedule(0.0, peak, training.warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ]
        lengths += [training.warmup, end - start - training.warmup - decay, decay]
    return optax.join_schedules(pieces, np.cumsum(lengths)[:-1].tolist())


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of `tokens[:, 1:]` under `logits[:, :-1]`, nats per token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def batch_at(train: np.ndarray, training: Training, step: int, bos: int) -> np.ndarray:
    """The batch of one step, `int32[batch, window]`: random windows of the stream, each with BOS as its first token."""
    rng = np.random.default_rng([training.seed, step])
    start = rng.integers(0, len(train) - training.window, size=training.batch)
    tokens = train[start[:, None] + np.arange(training.window)].astype(np.int32)
    tokens[:, 0] = bos
    return tokens


def windows_of(stream: np.ndarray, window: int) -> np.ndarray:
    """Non-overlapping windows `int32[n, window]` of a stream, the first token of each set to BOS (id 0)."""
    n = len(stream) // window
    tokens = stream[: n * window].reshape(n, window).astype(np.int32)
    tokens[:, 0] = 0
    return tokens


def load_or_train_tokenizer(path: Path, corpus: stdlib_corpus.Corpus) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenization; BOS is put in front of every text."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in corpus.train), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(path))
    return tokenizer


def load_or_encode(path: Path, tokenizer: Tokenizer, documents: tuple[tuple[str, str], ...]) -> np.ndarray:
    """`encode`, kept in a file."""
    if not path.exists():
        np.save(path, encode(tokenizer, documents))
    return np.load(path)


def encode(tokenizer: Tokenizer, documents: tuple[tuple[str, str], ...]) -> np.ndarray:
    """All documents as one stream of token ids `uint16[n]`, a BOS in front of each."""
    encoded = tokenizer.encode_batch([text for _, text in documents])
    return np.concatenate([np.asarray(e.ids, np.uint16) for e in encoded])


if __name__ == "__main__":
    tyro.cli(main, description=json.dumps(dataclasses.asdict(MODEL)))
