"""The kinds of adapters that a recipe can name.

This module has no imports, so that recipes can be read without PyTorch.
"""

from __future__ import annotations

ADAPTERS: dict[str, object] = {
    "convolutions": "model.connectors.convolutions:Convolutions",
    "stacked_convolutions": "model.connectors.stacked_convolutions:StackedConvolutions",
    "stacking": "model.connectors.stacking:Stacking",
    "queries": "model.connectors.queries:Queries",
    "pooling": "model.connectors.pooling:Pooling",
    "pooling_perceptron": "model.connectors.pooling:PoolingPerceptron",
    "swiglu": "model.connectors.swiglu:SwiGLU",
    "swiglu_post_norm": "model.connectors.swiglu:SwiGLUPostNorm",
}
"""The adapter for each value of `model.adapter.kind`. An entry is a subclass of `model.connectors.base.Adapter`, or a
string `module:NAME`, which is imported when it is used. A new kind needs one new file and one line in this table.
Plug-ins can add entries."""
