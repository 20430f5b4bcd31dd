"""Decoders in float64 NumPy, from the papers: position by position, and from the names of the checkpoint's tensors.

What a model has (biases, query norms, fused projections, experts) is seen from its tensors, what it computes with them
from its `config.json`; nothing of `mpq` is used.
"""

import math

import numpy as np
from scipy import special

ACTIVATIONS = {
    "silu": lambda x: x * special.expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]
PREFIXES = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
NAMES = {
    "attention": ("self_attn", "attn", "attention"),
    "output": ("o_proj", "c_proj", "out_proj", "dense"),
    "first": ("input_layernorm", "ln_1", "self_attn_layer_norm"),
    "second": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm"),
    "up": ("mlp.up_proj", "mlp.c_fc", "fc1", "mlp.dense_h_to_4h"),
    "down": ("mlp.down_proj", "mlp.c_proj", "fc2", "mlp.dense_4h_to_h"),
    "fused": ("qkv_proj", "c_attn", "query_key_value"),
}


def numpy_logits(config: dict, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits `float64[time, vocab]` of one text `int[time]`."""
    return Oracle(config, tensors)(tokens)


class Oracle:
    def __init__(self, config, tensors):
        self.config, self.kind = config, config["model_type"]
        self.w = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.heads = config.get("num_attention_heads") or config["n_head"]
        self.width = config.get("hidden_size") or config["n_embd"]
        self.head_dim = config.get("head_dim") or self.width // self.heads
        self.key_heads = config.get("num_key_value_heads") or self.heads
        names = ("hidden_activation", "hidden_act", "activation_function")  # where both are, the second means nothing
        self.activate = ACTIVATIONS[next(config[name] for name in names if name in config)]
        self.gemma = self.kind.startswith("gemma")

    def __call__(self, tokens):
        w, c, kind = self.w, self.config, self.kind
        table = w[self.pick("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "model.decoder.embed_tokens")]
        x = table[tokens] * (math.sqrt(self.width) if self.gemma else 1)
        if "model.decoder.project_in.weight" in w:
            x = self.linear("model.decoder.project_in", x)
        if kind == "gpt2":
            x = x + w["transformer.wpe.weight"][: len(tokens)]
        if kind == "opt":
            x = x + w["model.decoder.embed_positions.weight"][2 : len(tokens) + 2]
        for i in range(c.get("num_hidden_layers") or c["n_layer"]):
            x = self.block(i, x)
        last = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm")
        if self.has(*last):
            x = self.norm(self.pick(*last)[: -len(".weight")], x)
        if "model.decoder.project_out.weight" in w:
            x = self.linear("model.decoder.project_out", x)
        logits = x @ (w[self.pick("lm_head", "embed_out")] if self.has("lm_head", "embed_out") else table).T
        cap = c.get("final_logit_softcapping")
        return logits if cap is None else cap * np.tanh(logits / cap)

    def block(self, i, x):
        at = f"{PREFIXES.get(self.kind, 'model.layers')}.{i}."
        part = lambda role: self.pick(*(at + name for name in NAMES[role]))[: -len(".weight")]
        attend = lambda y: self.attention(at, i, y)
        feed = lambda y: self.feed(at, part, y)
        first, second = (lambda y: self.norm(part("first"), y)), (lambda y: self.norm(part("second"), y))
        if self.gemma:
            x = x + self.norm(at + "post_attention_layernorm", attend(first(x)))
            return x + self.norm(at + "post_feedforward_layernorm", feed(second(x)))
        if self.kind == "gpt_neox" and self.config["use_parallel_residual"]:
            return x + attend(first(x)) + feed(second(x))
        if self.kind == "opt" and not self.config["do_layer_norm_before"]:
            x = first(x + attend(x))
            return second(x + feed(x))
        x = x + attend(first(x))
        return x + feed(second(x))

    def attention(self, at, i, x):
        c, d = self.config, self.head_dim
        attn = at + next(name for name in NAMES["attention"] if self.starts(at + name + "."))
        if self.has(*(f"{attn}.{name}" for name in NAMES["fused"])):
            fused = self.pick(*(f"{attn}.{name}" for name in NAMES["fused"]))[: -len(".weight")]
            y = self.linear(fused, x)
            if self.kind == "gpt_neox":  # head by head: query, key, value
                q, k, v = y.reshape(len(x), self.heads, 3, d).transpose(2, 0, 1, 3)
            else:
                y = y.reshape(len(x), -1, d)
                q, k, v = y[:, : self.heads], y[:, self.heads : -self.key_heads], y[:, -self.key_heads :]
        else:
            q, k, v = (self.linear(f"{attn}.{name}_proj", x).reshape(len(x), -1, d) for name in "qkv")
        if f"{attn}.q_norm.weight" in self.w:
            q, k = self.norm(f"{attn}.q_norm", q), self.norm(f"{attn}.k_norm", k)
        slides = self.slides(i)
        if self.kind not in ("gpt2", "opt"):
            theta = c.get("rope_theta", c.get("rotary_emb_base", 10000.0))
            if self.kind == "gemma3_text" and slides:
                theta = c["rope_local_base_freq"]
            q, k = (rotate(y, theta, int(d * c.get("rotary_pct", 1.0))) for y in (q, k))
        scale = c.get("query_pre_attn_scalar", d) ** -0.5
        y = self.mix(q, k, v, scale, c["sliding_window"] if slides else len(x), c.get("attn_logit_softcapping"))
        return self.linear(self.pick(*(f"{attn}.{name}" for name in NAMES["output"]))[: -len(".weight")], y)

    def slides(self, i):
        c = self.config
        if self.kind == "gemma2":
            return i % 2 == 0
        if self.kind == "gemma3_text":
            return (i + 1) % c["sliding_window_pattern"] != 0
        if self.kind in ("qwen2", "qwen3"):
            return c.get("use_sliding_window", False) and i >= c["max_window_layers"]
        return c.get("sliding_window") is not None

    def mix(self, q, k, v, scale, window, cap):
        out = np.zeros_like(q)
        for t in range(len(q)):
            for head in range(self.heads):
                shared = head * self.key_heads // self.heads
                seen = slice(max(0, t - window + 1), t + 1)
                scores = scale * k[seen, shared] @ q[t, head]
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                out[t, head] = special.softmax(scores) @ v[seen, shared]
        return out.reshape(len(q), -1)

    def feed(self, at, part, x):
        sparse = at + ("block_sparse_moe" if self.kind == "mixtral" else "mlp")
        if f"{sparse}.gate.weight" in self.w:
            return np.stack([self.experts(sparse, token) for token in x])
        if f"{at}mlp.gate_up_proj.weight" in self.w:
            gate, up = np.split(self.linear(f"{at}mlp.gate_up_proj", x), 2, axis=-1)
            return self.linear(part("down"), self.activate(gate) * up)
        if f"{at}mlp.gate_proj.weight" in self.w:
            return self.glu(at + "mlp", x)
        return self.linear(part("down"), self.activate(self.linear(part("up"), x)))

    def glu(self, at, x, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = (f"{at}.{name}" for name in names)
        return self.linear(down, self.activate(self.linear(gate, x)) * self.linear(up, x))

    def experts(self, at, token):
        weight = special.softmax(self.linear(f"{at}.gate", token))
        chosen = np.argsort(-weight)[: self.config["num_experts_per_tok"]]
        if self.kind == "mixtral" or self.config.get("norm_topk_prob"):
            weight = weight / weight[chosen].sum()
        names = ("w1", "w3", "w2") if self.kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        y = sum(weight[e] * self.glu(f"{at}.experts.{e}", token, names) for e in chosen)
        if f"{at}.shared_expert_gate.weight" in self.w:
            gate = special.expit(self.linear(f"{at}.shared_expert_gate", token))
            y = y + gate * self.glu(f"{at}.shared_expert", token)
        return y

    def norm(self, name, x):
        c, scale, bias = self.config, self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        eps = c.get("rms_norm_eps") or c.get("layer_norm_eps") or c.get("layer_norm_epsilon") or 1e-5
        if bias is not None:
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (scale + self.gemma)
        return y if bias is None else y + bias

    def linear(self, name, x):
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias", 0.0)
        return x @ (weight if self.kind == "gpt2" else weight.T) + bias

    def pick(self, *names):
        return next(f"{name}.weight" for name in names if f"{name}.weight" in self.w)

    def has(self, *names):
        return any(f"{name}.weight" in self.w for name in names)

    def starts(self, prefix):
        return any(name.startswith(prefix) for name in self.w)


def rotate(x: np.ndarray, theta: float, dim: int) -> np.ndarray:
    """Turn the first `dim` features of `x[time, heads, head_dim]` in the planes `(i, i + dim / 2)`."""
    half, out = dim // 2, x.copy()
    for t in range(len(x)):
        for i in range(half):
            angle = t * theta ** (-2 * i / dim)
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out[t, :, [i, i + half]] = turn @ x[t, :, [i, i + half]]
    return out
