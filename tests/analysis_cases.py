"""Made-up runs of every task, as `mpq.results` writes them, and their parsed form and drawings."""

import functools
import math
from typing import Any

import numpy as np

from analysis.figure import Drawing
from analysis.load import Result, parse_result
from analysis.report import draw

RECORD = {"schema": 1, "command": "mpq run quick.py", "commit": None, "config": {"name": "quick"}, "python": "3.11"}
SCHEMES = ("int2_g64", "int3_g64", "int4_g64", "int8_channel", "bf16")
ROLES = {
    "attention.q_proj": (256, 256, "attention_in"),
    "attention.k_proj": (256, 128, "attention_in"),
    "attention.v_proj": (256, 128, "attention_in"),
    "attention.o_proj": (256, 256, "attention_out"),
    "mlp.gate_proj": (256, 768, "mlp_in"),
    "mlp.up_proj": (256, 768, "mlp_in"),
    "mlp.down_proj": (768, 256, "mlp_out"),
}
OTHER_BYTES = 30_000
BUDGETS = {"3.0bpw": 3.0, "int3_g64": 3.25, "3.5bpw": 3.5, "int4_g64": 4.25}


def bits_of(scheme: str, k: int) -> float:
    return {"int2_g64": 2.25, "int3_g64": 3.25, "int4_g64": 4.25, "int8_channel": 8 + 16 / k, "bf16": 16.0}[scheme]


def make_weights(layers: int) -> list[dict[str, Any]]:
    weights = [{"path": "embed_tokens.embedding", "group": "embed", "k": 256, "n": 4096, "kind": "embedding+matmul"}]
    for layer in range(layers):
        for role, (k, n, group) in ROLES.items():
            path = f"layers.{layer}.{role}.kernel"
            weights.append({"path": path, "group": f"layers.{layer}.{group}", "k": k, "n": n, "kind": "matmul"})
    return [{**w, "macs": 2048 * w["k"] * w["n"], "size": w["k"] * w["n"]} for w in weights]


def make_tables(weights: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Loss falls four-fold a bit; groups differ by a log-normal factor; metrics differ by noise."""
    factor = {w["group"]: rng.lognormal(0, 1.1) for w in weights}
    base = np.array([[0.0 if s == "bf16" else 4.0 ** -bits_of(s, 512) for s in SCHEMES] for _ in weights])
    rows = np.array([0.05 * factor[w["group"]] * math.sqrt(w["size"] / 65536) for w in weights])
    tables = {}
    for metric, noise in {"kl": 0.05, "fisher": 0.35, "hessian_trace": 0.7}.items():
        loss = base * rows[:, None] * rng.lognormal(0, noise, base.shape)
        stderr = 0.06 * loss + 2e-6 * (base > 0)
        if metric == "kl" and len(loss) > 3:  # a measured increase may come out below zero
            loss[3, 3] = -1e-6
        tables[metric] = {
            "metric": f"{metric}(windows=8)",
            "weights": [w["path"] for w in weights],
            "schemes": list(SCHEMES),
            "loss_increase": loss.tolist(),
            "stderr": stderr.tolist(),
        }
    return tables


def hull(weights: list[dict[str, Any]], loss: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """(bits, loss, column of every weight) of the plans that some price of a bit selects, ascending."""
    bits = np.array([[w["size"] * bits_of(s, w["k"]) for s in SCHEMES] for w in weights])
    points: dict[float, tuple[float, float, np.ndarray]] = {}
    for price in np.geomspace(1e-14, 1e-5, 1200):
        choice = np.argmin(loss + price * bits, axis=1)
        rows = np.arange(len(weights))
        points[float(bits[rows, choice].sum())] = (bits[rows, choice].sum(), loss[rows, choice].sum(), choice)
    return [points[size] for size in sorted(points)]


def task_of(name: str) -> dict[str, str]:
    """The key `task` of a result."""
    quality, agreement = {
        "causal_lm": ("perplexity", "top1_agreement"),
        "classification": ("accuracy", "top1_agreement"),
        "embedding": ("spearman", "cosine"),
        "regression": ("mse", "likeness"),
    }[name]
    unit = "token" if name == "causal_lm" else "example"
    return {"name": name, "unit": unit, "quality": quality, "agreement": agreement}


COUNTS = {
    "causal_lm": {"num_documents": 24, "num_outputs": 16320},
    "classification": {"num_documents": 932, "num_outputs": 932},
    "embedding": {"num_documents": 1379, "num_outputs": 2758},  # pairs of sentences
    "regression": {"num_documents": 500, "num_outputs": 500},
}


def evaluation(task: str, kl: float, *, labels: bool = True) -> dict[str, Any]:
    """Plausible numbers of a model that is so many nats from the original, under the keys of its task."""
    alike = math.exp(-1.4 * math.sqrt(kl))
    accuracy, rho, mse = 0.1 + 0.82 * alike, 0.83 * math.exp(-kl), 0.25 + 0.5 * kl
    own = {
        "causal_lm": {"perplexity": 7.9 * math.exp(kl), "perplexity_stderr": 0.24, "top1_agreement": alike},
        "classification": {
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / 932),
            "top1_agreement": alike,
        },
        "embedding": {"spearman": rho, "spearman_stderr": (1 - rho**2) / math.sqrt(1376), "cosine": 1 - 0.05 * kl},
        "regression": {"mse": mse, "mse_stderr": 0.06 * mse, "likeness": math.exp(-kl)},
    }[task]
    short = task_of(task)["agreement"].removesuffix("_agreement")
    body = {
        **own,
        f"{short}_stderr": 0.004 if kl else 0.0,
        "nll": None if task == "embedding" else math.log(7.9) + kl,
        "nll_stderr": None if task == "embedding" else 0.031,
        "kl": kl,
        "kl_stderr": 0.05 * kl,
        **COUNTS[task],
    }
    quality = task_of(task)["quality"]
    return body if labels else body | dict.fromkeys((quality, f"{quality}_stderr", "nll", "nll_stderr"))


def make_result(layers: int = 8, seed: int = 0, *, task: str = "causal_lm", labels: bool = True) -> dict[str, Any]:
    """A result such as `mpq.results` writes: every key, with numbers of the size that a small model gives."""
    rng = np.random.default_rng(seed)
    weights = make_weights(layers)
    values = sum(w["size"] for w in weights)
    tables = make_tables(weights, rng)
    loss, stderr = (np.array(tables["kl"][key]) for key in ("loss_increase", "stderr"))
    points = hull(weights, loss)
    rows = np.arange(len(weights))
    columns = {}
    for budget, bpw in BUDGETS.items():
        fitting = [point for point in points if point[0] <= bpw * values]
        columns[f"mixed@{budget}"] = max(fitting, key=lambda point: point[0])[2]
    columns |= {s: np.full(len(weights), i) for i, s in enumerate(SCHEMES)}
    plans, comparisons = [], []
    for method, worse in {"gptq": 1.12, "rtn": 1.9}.items():
        for name, choice in columns.items():
            size = sum(w["size"] * bits_of(SCHEMES[c], w["k"]) for w, c in zip(weights, choice, strict=True))
            kl = (
                worse
                * float(np.maximum(loss, 0)[rows, choice].sum())
                * (1 if name == "bf16" else rng.lognormal(0, 0.05))
            )
            plans.append(
                {
                    "name": name,
                    "kind": "mixed" if name.startswith("mixed") else "uniform",
                    "scheme": None if name.startswith("mixed") else name,
                    "method": method,
                    "handed_out": method == "gptq" and name.startswith("mixed"),
                    "predicted_kl": float(loss[rows, choice].sum()),
                    "predicted_stderr": float(np.sqrt((stderr[rows, choice] ** 2).sum())),
                    **evaluation(task, kl, labels=labels),
                    "size_bytes": int(size) // 8 + OTHER_BYTES,
                    "bits_per_weight": size / values,
                    "choices": {w["path"]: SCHEMES[c] for w, c in zip(weights, choice, strict=True)},
                }
            )
    by_name = {p["name"]: p for p in plans if p["method"] == "gptq"}
    for budget, bpw in BUDGETS.items():
        plan = by_name[f"mixed@{budget}"]
        baseline = min((by_name[s] for s in SCHEMES if by_name[s]["bits_per_weight"] <= bpw), key=lambda p: p["kl"])
        difference, error = plan["kl"] - baseline["kl"], 0.04 * baseline["kl"]
        comparisons.append(
            {
                "budget": budget,
                "plan": plan["name"],
                "method": "gptq",
                "bits_per_weight": plan["bits_per_weight"],
                "baseline": baseline["name"],
                "kl_difference": difference,
                "stderr": error,
                "z": difference / error,
            }
        )
    return {
        "schema": 1,
        "name": "quickstart",
        "task": task_of(task),
        "model": {
            "name": "reference",
            "digest": "5f" * 32,
            "parameters": values + 17 * 256,
            "weights": values,
            "reference_size_bytes": 2 * values + OTHER_BYTES,
        },
        "data": {
            name: {"source": f"reference ({name})", "digest": digest * 32, **COUNTS[task]}
            for name, digest in {"calibration": "a1", "selection": "b2", "test": "c3"}.items()
        },
        "reference": evaluation(task, 0.0, labels=labels),
        "frontier": {
            "metric": "kl(windows=8)",
            "bits_per_weight": [p[0] / values for p in points],
            "size_bytes": [int(p[0]) // 8 + OTHER_BYTES for p in points],
            "predicted_kl": [float(p[1]) for p in points],
            "predicted_stderr": [float(np.sqrt((stderr[rows, p[2]] ** 2).sum())) for p in points],
        },
        "plans": plans,
        "comparisons": comparisons,
        "tables": tables,
        "weights": weights,
        "agreement": {"fisher vs kl": {"kendall_tau": 0.81, "spearman": 0.95}},
        "seconds": {"trace": 0.4, "calibrate": 6.1, "sensitivity kl": 48.0},
    }


@functools.cache
def parsed(layers: int = 8, task: str = "causal_lm", *, labels: bool = True) -> Result:
    """`make_result` as figures read it."""
    return parse_result(make_result(layers, task=task, labels=labels))


@functools.cache
def drawn(layers: int = 8, task: str = "causal_lm", *, labels: bool = True) -> dict[str, Drawing]:
    """All figures of `parsed`."""
    return draw(parsed(layers, task, labels=labels))
