"""The models that benchmarks train: characters of tinyshakespeare, from nanoGPT's CPU recipe upwards."""

from __future__ import annotations

from typing import Any

VOCABULARY = 65
GPT_SMALL: dict[str, Any] = {"model": "transformer", "layers": 4, "width": 128, "heads": 4, "seq_len": 64}
LSTM: dict[str, Any] = {"model": "lstm", "layers": 2, "width": 256, "heads": 4, "seq_len": 64}
GPT: dict[str, Any] = {"model": "transformer", "layers": 6, "width": 384, "heads": 6, "seq_len": 256}
