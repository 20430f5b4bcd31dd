"""Stock llama.cpp through the C API in the shared library of the `xllamacpp` wheel.

Parameters are structs that differ between versions. They are taken as opaque memory, larger than any of them: the
library fills in its defaults and reads its own part back, so no version's layout is written down here. Only the first
fields of a context's, which have never moved, are set.
"""

import ctypes

import numpy as np


class _Opaque(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * 256),)


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


def _library() -> ctypes.CDLL:
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
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
    """

    def __init__(self, path, context: int):
        self._library = _library()
        model = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(str(path).encode(), model)
        assert self._model, f"llama.cpp does not load {path}"
        params = self._library.llama_context_default_params()
        params.words[0] = params.words[1] = params.words[2] = context  # n_ctx, n_batch, n_ubatch
        self._context = self._library.llama_init_from_model(self._model, params)
        assert self._context, "no context"
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


def quantize(w: np.ndarray, kind: int, row_bytes: int, importance: np.ndarray | None = None) -> np.ndarray:
    """llama.cpp's own quantizer.

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
