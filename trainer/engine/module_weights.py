"""The audio side's weights, gathered by DeepSpeed ZeRO-3 around the call of each module.

The audio side consists of the encoders, the router, the adapter and the projector.

Gathering per module needs the least memory, but many small collectives. Every call of an encoder gathers the weights of
each of its modules in the forward pass and again in the backward pass. `trainer.engine.whole_weights` is the
alternative.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.audio_output import AudioOutput
from model.encoders.base import AudioEncoder


class ModuleWeights:
    """The audio side's parameters.

    They are partitioned among the ranks, and gathered only while a module that uses them runs. Parameters smaller than
    `stage3_param_persistence_threshold` stay gathered.

    Collective: every rank of the world must create one.

    Args:
        engine: DeepSpeed's engine, which has partitioned all parameters.
        world: The number of ranks.
        ep: The size of the expert-parallel group.
        recompute_calls: True if every encoder call runs again in the backward pass.
    """

    calls_are_collective = True
    """A call gathers weights and reduces gradients, so all ranks must call each encoder the same number of times."""

    def __init__(self, engine: Any, world: int, ep: int, recompute_calls: bool) -> None:
        self._engine, self._zero, self.tower, self._world = engine, engine.optimizer, engine.module, world
        if ep > 1:
            # DeepSpeed records the order of module calls to prefetch weights, and the order must be the same on all
            # ranks. Ranks with different experts call different modules, so the recording is disabled.
            self._zero.parameter_offload.get_param_coordinator().record_module = lambda module: None
        self._drop_idle_hooks()
        self._keep_persistent()
        of_layers = any(isinstance(m, AudioEncoder) and m.recompute for m in self.tower.modules())
        self._recomputes = recompute_calls or of_layers

    def _drop_idle_hooks(self) -> None:
        """Remove DeepSpeed's hooks from modules whose parameters all persist, and gather these parameters.

        Collective: every rank of the world must call it.

        The hooks of such a module have nothing to fetch or release, but may take longer than its computation.
        """
        idle = [m for m in self.tower.modules() if all(p.ds_persist for p in m.parameters(recurse=False))]
        dicts = {id(hooks) for m in idle if m is not self.tower for hooks in (m._forward_pre_hooks, m._forward_hooks)}
        offload = self._zero.parameter_offload
        for handle in (*offload.forward_hooks, *offload.backward_hooks):
            if id(handle.hooks_dict_ref()) in dicts:
                handle.remove()
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def _keep_persistent(self) -> None:
        """Keep parameters below `stage3_param_persistence_threshold` gathered until the next update.

        DeepSpeed releases parameters after every call if the order of module calls changes between steps. The
        order does change here, because the number of encoder calls depends on the batch. DeepSpeed never releases a
        parameter that a module still uses, so these parameters are registered as used by a fictitious module.
        """
        for parameter in self.tower.parameters():
            if parameter.ds_persist:
                parameter.ds_active_sub_modules.add("persistent")

    def forward(self, *args: Any, **kwargs: Any) -> AudioOutput:
        """Compute the tower's forward pass.

        Collective: every rank of the world must call it.
        """
        output: AudioOutput = self._engine(*args, **kwargs)
        return output

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the sum of `loss` over all ranks.

        Collective: every rank of the world must call it.

        DeepSpeed averages gradients over the ranks, so `loss` is multiplied by their number first.
        """
        scaled = loss * self._world
        if not self._recomputes:
            self._engine.backward(scaled)
            return
        # With recomputation, a module produces one gradient per encoder call, and DeepSpeed would keep only the last
        # one. The gradients are therefore summed before they are reduced.
        with self._engine.coalesce_grad_reduction():
            self._engine.backward(scaled)
            self._reduce_whole_gradients()

    def _reduce_whole_gradients(self) -> None:
        """Reduce all gradients. The gradients of the experts are reduced last.

        Collective: every rank of the world must call it.

        With this order, the buckets of all other gradients are the same on all ranks; see `before_features_return`.
        """
        experts = {id(p) for p in self.tower.experts.parameters()}
        for of_experts in (False, True):
            for parameter in self.tower.parameters():
                if parameter.grad is not None and (id(parameter) in experts) == of_experts:
                    self._zero.reduce_independent_p_g_buckets_and_remove_grads(parameter)
            self.before_features_return()

    def before_features_return(self) -> None:
        """Reduce the gradients in ZeRO-3's buckets at the same point of the backward pass on all ranks.

        Collective: every rank of the world must call it.

        ZeRO-3 reduces a bucket as soon as a gradient of a different process group arrives. The gradients of the experts
        arrive between those of the adapter and those of the router. A rank without experts has no such gradients, and
        would reduce its bucket at a different point.
        """
        for dtype in self._zero.ipg_buckets:
            self._zero._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)

    def step(self) -> None:
        """Update the partitions.

        Collective: every rank of the world must call it.
        """
        self._engine.step()
        self._keep_persistent()

    def release(self, *, are_loaded: bool) -> None:
        """Do nothing, because DeepSpeed itself frees weights when the partitions get new values."""
