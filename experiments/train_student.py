r"""Train a second language model whose rows fill llama.cpp's blocks of 256: a GPT-2 that learns from the reference.

Run:     python -m experiments.train_student --work DIR --out DIR/student
Expect:  about 45 minutes on two cores; about one nat a token to the reference model is left
Resume:  type the same command again: the batch of a step depends on (seed, step) alone, and Orbax restores the step
Writes:  a folder that every command takes for MODEL (config, tokenizer, Orbax checkpoint), with `training.json`

It shares the tokenizer, the text (the source of CPython's standard library) and the start of its embedding with the
reference model, and nothing else: learned positions, layer norms, biases, fused queries, keys and values, GELU. The
loss is the KL of the reference's next-token distribution to the student's (Hinton et al. 2015, arXiv:1503.02531),
which a small budget of tokens teaches more than the next tokens alone.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx

from experiments import stdlib_corpus
from experiments.train_reference import (
    Training,
    batch_at,
    encode,
    load_or_encode,
    make_optimizer,
    next_token_loss,
    windows_of,
)
from mpq.files import write_json
from mpq.models import Model, load, save_orbax
from mpq.models.checkpoint import make_model
from mpq.models.decoders.modules import Decoder
from mpq.models.gpt2 import FAMILY, parse_config
from mpq.progress import shown, track

CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 4096,
    "n_positions": 512,
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
}
TRAINING = Training(
    steps=1000, batch=16, window=256, warmup=40, weight_decay=0.1, eval_every=100, compute_dtype="float32"
)


def main(work: Path, out: Path, training: Training = TRAINING) -> None:
    """Train (or continue) in `work`; when done, write the model to `out`."""
    teacher, corpus = load("reference"), stdlib_corpus.read()
    work.mkdir(parents=True, exist_ok=True)
    assert teacher.tokenizer is not None  # the reference model has one
    train = load_or_encode(work / "train.npy", teacher.tokenizer, corpus.train)
    held_out = windows_of(encode(teacher.tokenizer, corpus.selection), training.window)[:96]
    params, history = fit(work, training, teacher, train, held_out)
    flat = {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(params)}
    stored = dict.fromkeys(flat, "float32")
    model = make_model(None, flat, stored, CONFIG, FAMILY, teacher.tokenizer, out.name)
    save_orbax(model, out)
    record = {"training": dataclasses.asdict(training), "corpus": corpus.digest, "teacher": teacher.digest}
    write_json(out / "training.json", record | {"student": model.digest, "history": history})


def fit(
    work: Path, training: Training, teacher: Model, train: np.ndarray, held_out: np.ndarray
) -> tuple[Any, list[dict[str, Any]]]:
    """The training loop. Returns the parameters and the history of held-out losses (nats per token)."""
    student = Decoder(parse_config(CONFIG), rngs=nnx.Rngs(training.seed))
    student.embed_tokens.embedding.set_value(jnp.array(teacher.params["embed_tokens.embedding"]))
    graph, params = nnx.split(student, nnx.Param)
    optimizer = make_optimizer(training)
    state = optimizer.init(params)
    manager = ocp.CheckpointManager((work / "student").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2))
    start = 0
    history: Any = []  # Orbax's JSON takes a list, though its types ask for an object
    if (latest := manager.latest_step()) is not None:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        restored = manager.restore(
            latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), history=ocp.args.JsonRestore())
        )
        (params, state), history, start = restored["state"], restored["history"], latest

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, known: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        target = teacher.apply(known, tokens)
        loss, grads = jax.value_and_grad(lambda p: kl(target, nnx.merge(graph, p)(tokens)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(lambda params, tokens: next_token_loss(nnx.merge(graph, params)(tokens), tokens))
    with shown():
        for step in track(range(start, training.steps), "student"):
            params, state, loss = update(params, state, teacher.params, batch_at(train, training, step, bos=0))
            done = step + 1
            if done % training.eval_every == 0 or done == training.steps:
                nll = float(np.mean([evaluate(params, b) for b in np.split(held_out, len(held_out) // 16)]))
                history.append({"step": done, "kl": float(loss), "held_out_nll": nll})
                print(history[-1], flush=True)
            if done % training.save_every == 0 or done == training.steps:
                kept = {"state": ocp.args.StandardSave((params, state)), "history": ocp.args.JsonSave(history)}
                manager.save(done, args=ocp.args.Composite(**kept))
    manager.wait_until_finished()
    return params, history


def kl(target: jax.Array, logits: jax.Array) -> jax.Array:
    """Mean KL(teacher || student), nats per token, of logits `[batch, time, vocab]`."""
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


if __name__ == "__main__":
    tyro.cli(main)
