"""The kinds of adapters that a recipe can name. This module imports nothing, so recipes are read without PyTorch."""

from __future__ import annotations

ADAPTERS: dict[str, object] = {
    "convolutions": "model.connectors.convolutions:Convolutions",
    "stacking": "model.connectors.stacking:Stacking",
    "queries": "model.connectors.queries:Queries",
    "pooling": "model.connectors.pooling:Pooling",
    "pooling_perceptron": "model.connectors.pooling:PoolingPerceptron",
    "swiglu": "model.connectors.swiglu:SwiGLU",
    "swiglu_post_norm": "model.connectors.swiglu:SwiGLUPostNorm",
}
"""The adapters by the value of `model.adapter.kind`: a subclass of `model.connectors.base.Adapter`, or its place as
`module:NAME`, which is imported at the first use. A new kind is one file and one line here; plug-ins add entries."""
