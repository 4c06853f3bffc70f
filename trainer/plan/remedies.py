"""Ways to shorten the parts of a step or to save memory, except those that a recipe already uses."""

from __future__ import annotations

from trainer.config.schema import Recipe

_LARGER_BATCH = "a larger data.global_batch_samples"


def remedy(part: str, recipe: Recipe) -> str:
    """Return a phrase that names the changes that would make a part of the step shorter.

    Args:
        part: The name of the part, as in `StepTime.parts`.
        recipe: The recipe of the run.
    """
    options = [text for text, applies in _options(part, recipe) if applies]
    if not options:
        return "nothing in the recipe changes it much"
    return ", ".join(options[:-1]) + (" or " if len(options) > 1 else "") + options[-1]


def memory_remedy(part: str, recipe: Recipe, gathers_whole_weights: bool) -> str:
    """Return a phrase that names the changes that would make a part of a rank's memory smaller.

    Args:
        part: `states`, `LLM activations`, `encoder activations` or `buffers`.
        recipe: The recipe of the run.
        gathers_whole_weights: Whether the buffers contain the whole weights of the audio side.
    """
    train = recipe.train
    options = {
        "states": [("a larger parallel.tensor or parallel.pipeline", True), ("more ranks", True)],
        "LLM activations": [
            ("a smaller train.llm_tokens_per_microbatch", True),
            ("train.recompute_llm=full", train.recompute_llm != "full"),
            ("a larger parallel.context for long samples", True),
        ],
        "encoder activations": [
            ("train.recompute_encoder_calls=true", not train.recompute_encoder_calls),
            ("train.recompute_encoders=true", not train.recompute_encoders),
            ("a smaller train.encoder_batch_sec", train.recompute_encoder_calls),
            ("more ranks", True),
        ],
        "buffers": [
            ("train.gather_audio_weights=per_module", gathers_whole_weights),
            (
                "a smaller reduce_bucket_size or stage3_max_reuse_distance in train.deepspeed",
                not gathers_whole_weights,
            ),
        ],
    }[part]
    return ", or ".join(text for text, applies in options if applies)


def _options(part: str, recipe: Recipe) -> list[tuple[str, bool]]:
    """Return the ways to shorten a part. Each has a flag that is True if it still applies to the recipe."""
    parallel, train = recipe.parallel, recipe.train
    layers = recipe.model.llm.config.get("num_hidden_layers", 0)
    whole_stages = parallel.pipeline * parallel.virtual_stages < layers if layers else True
    per_update = train.gather_audio_weights == "per_update"
    return {
        "computing the LLM": [
            ("more ranks", True),
            ("a larger train.llm_tokens_per_microbatch for larger matmuls", True),
        ],
        "recomputing the LLM's activations": [
            ("train.recompute_llm=selective if there is enough memory", train.recompute_llm == "full"),
            ("train.recompute_llm=pointwise if there is enough memory", train.recompute_llm == "selective"),
            ("train.recompute_llm=none if there is enough memory", train.recompute_llm != "none"),
        ],
        "tensor-parallel collectives": [("a smaller parallel.tensor, so that its ranks are on one node", True)],
        "sending tokens to experts": [("a smaller parallel.ffn_expert, so that its ranks are on one node", True)],
        "gathering keys and values": [("a smaller parallel.context, so that its ranks are on one node", True)],
        "the pipeline's bubble": [
            ("more parallel.virtual_stages", whole_stages),
            (f"more micro-batches ({_LARGER_BATCH} or a smaller train.llm_tokens_per_microbatch)", True),
            ("a smaller parallel.pipeline", True),
        ],
        "transfers between stages": [("a smaller parallel.pipeline", True)],
        "gradients and weights over replicas": [
            (
                "parallel.overlap_grad_reduce=true and parallel.overlap_param_gather=true",
                not parallel.overlap_grad_reduce and not recipe.stages,
            ),
            (
                "parallel.overlap_param_gather=true",
                parallel.overlap_grad_reduce and not parallel.overlap_param_gather,
            ),
            ("parallel.grad_reduce_dtype=bf16", parallel.grad_reduce_dtype != "bf16" and train.precision == "bf16"),
            (_LARGER_BATCH, True),
        ],
        "computing the encoders": [
            ("train.recompute_encoders=false if there is enough memory", train.recompute_encoders),
            ("train.recompute_encoder_calls=false if there is enough memory", train.recompute_encoder_calls),
            ("more ranks", True),
        ],
        "ZeRO-3's collectives": [
            (
                "train.gather_audio_weights=per_update if there is enough memory",
                train.gather_audio_weights != "per_update",
            ),
            ("a larger parallel.expert", parallel.expert < len(recipe.model.experts)),
            ("parallel.audio_shard set to the ranks per node", per_update and parallel.audio_shard is None),
            (_LARGER_BATCH, per_update),
        ],
        "exchanging clips and embeddings": [],
        "updating the weights": [(f"{_LARGER_BATCH}, so that there are fewer updates", True)],
    }[part]
