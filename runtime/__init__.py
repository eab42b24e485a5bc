"""weightcache.runtime: the loader of an inference worker, and the only home of torch.

``load_file`` and ``safe_open`` stand in for those of safetensors. They take a path or any source (``s3://``, ``hf://``,
...), and give tensors over the cached file itself, each as soon as its bytes are there.
"""

from __future__ import annotations

from weightcache.runtime.loader import load_file, safe_open

__all__ = ["load_file", "safe_open"]
