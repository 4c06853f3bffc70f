"""Registration of the exported models of earshot with vLLM, which calls `register` in each of its processes."""


def register() -> None:
    """Add the architecture to vLLM's table of models. The model itself is imported at its first use."""
    from vllm import ModelRegistry

    if "EarshotForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("EarshotForCausalLM", "earshot_vllm_model:EarshotForCausalLM")
