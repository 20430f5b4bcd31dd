"""GGUF, the file format of llama.cpp: blocks of ggml bit by bit, names, tokenizers, and the file itself."""
