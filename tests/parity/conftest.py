"""Without the extras of `make parity` nothing here is collected, so that `pytest -m parity` fails for want of tests."""

import importlib.util

needed = {
    "test_*_transformers.py": ("torch", "transformers"),
    "test_llama_cpp.py": ("xllamacpp",),
    "test_onnxruntime.py": ("onnx", "onnxruntime"),
    "test_onnxruntime_activations.py": ("onnx", "onnxruntime"),
    "test_onnxruntime_cache.py": ("onnx", "onnxruntime"),
    "test_runtimes_experiment.py": ("onnx", "onnxruntime", "onnx_ir"),
    "test_pt2.py": ("torch",),
    "test_pt2e_experiment.py": ("torch", "onnx"),
    "test_images.py": ("torch", "onnx", "onnxruntime", "ai_edge_litert", "sklearn"),
    "test_qwix.py": ("qwix",),
    "test_refused_operations.py": ("torch", "onnx", "ai_edge_litert"),
    "test_litert.py": ("ai_edge_litert",),
    "test_litert_experiment.py": ("ai_edge_litert", "ai_edge_quantizer"),
    "test_runtimes_w8a8_experiment.py": ("onnx", "onnxruntime"),
    "test_hf_checkpoints.py": ("torch", "transformers", "compressed_tensors"),
    "test_bitsandbytes.py": ("torch",),
}
collect_ignore_glob = [
    pattern for pattern, names in needed.items() if not all(importlib.util.find_spec(name) for name in names)
]
