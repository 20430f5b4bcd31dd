"""Stock llama.cpp: a file run through the C API of the `xllamacpp` wheel, and its own quantizer.

Parameters of models and contexts are structs that differ between versions. They are taken as opaque memory, larger than
any of them: the library fills in its defaults and reads its own part back, so no version's layout is written down here.
Only the first fields of a context's, which have never moved, are set.

The wheel leaves `llama_model_quantize` out. Any build of llama.cpp has it, the one in the npm package
`@node-llama-cpp/linux-x64` for instance: `npm pack` it, unpack it, and name its folder `bins/linux-x64`.
"""

import ctypes
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq.types import MpqError


class _Opaque(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Quantization(ctypes.Structure):
    """`llama_model_quantize_params` of v0.5.0; `Quantizer` checks that a library's defaults agree with this layout."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(_Importance)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "tensor_type", "prune_layers")),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def _library() -> Any:
    try:
        module = importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise MpqError("llama.cpp is run by the package xllamacpp: pip install xllamacpp") from error
    library = ctypes.CDLL(str(module.__file__))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = _Opaque
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(library, name).restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Opaque]
    library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Opaque]
    library.llama_batch_init.restype = _Batch
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_batch_free.argtypes = [_Batch]
    library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    return library


class LlamaCpp:
    """A GGUF file, loaded.

    Args:
      path: the file.
      context: most tokens of a window.
      threads: that compute.
    """

    def __init__(self, path: str | os.PathLike[str], context: int, threads: int = 1):
        self._library = _library()
        model = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), model)
        assert self._model, f"llama.cpp does not load {path}"
        params = self._library.llama_context_default_params()
        params.words[0] = params.words[1] = params.words[2] = context  # n_ctx, n_batch, n_ubatch
        self._context = self._library.llama_init_from_model(self._model, params)
        assert self._context, "no context"
        self._library.llama_set_n_threads(ctypes.c_void_p(self._context), threads, threads)
        self._vocab = ctypes.c_void_p(self._library.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        self.num_tokens = self._library.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        """Free its memory."""
        self._library.llama_free(ctypes.c_void_p(self._context))
        self._library.llama_model_free(ctypes.c_void_p(self._model))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the BOS that the file asks for."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self._library.llama_tokenize(
            self._vocab, data, len(data), ids, len(ids), ctypes.c_bool(True), ctypes.c_bool(True)
        )
        assert count >= 0
        return list(ids[:count])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """`float32[len(tokens), vocabulary]` of one window."""
        memory = ctypes.c_void_p(self._library.llama_get_memory(ctypes.c_void_p(self._context)))
        self._library.llama_memory_clear(memory, ctypes.c_bool(True))
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert self._library.llama_decode(self._context, batch) == 0
        found = self._library.llama_get_logits(ctypes.c_void_p(self._context))
        values = np.ctypeslib.as_array(found, (len(tokens), self.num_tokens)).copy()
        self._library.llama_batch_free(batch)
        return values


def quantize_rows(w: np.ndarray, kind: int, row_bytes: int, importance: np.ndarray | None = None) -> np.ndarray:
    """llama.cpp's own quantizer on one weight.

    Args:
      w: `float32[k, n]`.
      kind: number of ggml's type.
      row_bytes: of a row of the file.
      importance: `float32[k]`, or None.

    Returns:
      `uint8[n, row_bytes]`.
    """
    rows = np.ascontiguousarray(w.T, np.float32)
    weight = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.zeros((len(rows), row_bytes), np.uint8)
    pointer = lambda a: None if a is None else ctypes.c_void_p(a.ctypes.data)
    written = _library().ggml_quantize_chunk(
        kind,
        pointer(rows),
        pointer(out),
        ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        pointer(weight),
    )
    assert written == out.size
    return out


FILE_TYPES = {"Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""Numbers of `llama_ftype`."""


class Quantizer:
    """llama.cpp's own: `llama_model_quantize`, what its program `llama-quantize` calls.

    Args:
      folder: with `libllama*.so` and the libraries beside it that it needs.

    Raises:
      MpqError: the folder has none, or one whose parameters are laid out otherwise than those known here.
    """

    def __init__(self, folder: Path):
        found = sorted(folder.glob("libllama.*so*"))
        if not found:
            raise MpqError(f"{folder} holds no libllama: give the folder of a build of llama.cpp's shared libraries")
        self._library: Any = ctypes.CDLL(str(found[0]))
        self._library.llama_model_quantize_default_params.restype = _Quantization
        self._library.llama_log_set(_SILENT, None)
        default = self._library.llama_model_quantize_default_params()
        flags = (default.requantize, default.output, default.only_copy, default.pure, default.keep_split)
        if default.ftype != FILE_TYPES["Q8_0"] or flags != (False, True, False, False, False) or default.imatrix:
            raise MpqError(f"{found[0]} lays its parameters out otherwise than v0.5.0 does: take that version")
        self.name = found[0].name

    def __call__(self, source: Path, out: Path, mix: str, importances: Mapping[str, np.ndarray]) -> int:
        """Quantize a file of plain floats.

        Args:
          source: the file.
          out: to write.
          mix: one of `FILE_TYPES`.
          importances: name of a tensor -> `float32[k]`, E[x^2] of its inputs.

        Returns:
          Bytes of the file.

        Raises:
          MpqError: llama.cpp refuses.
        """
        params = self._library.llama_model_quantize_default_params()
        params.ftype, params.nthread = FILE_TYPES[mix], 1
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in importances.items()}
        entries = (_Importance * (len(arrays) + 1))()  # the last one, without a name, ends the list
        for entry, (name, array) in zip(entries, arrays.items(), strict=False):
            pointer = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.name, entry.data, entry.size = name.encode(), pointer, array.size
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(_Importance))
        if self._library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
            raise MpqError(f"llama.cpp does not quantize {source} to {mix}")
        return out.stat().st_size
