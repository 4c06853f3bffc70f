"""The transition from one stage of training to the next in both engines."""

from __future__ import annotations

from trainer.checkpoint import audio_state, llm_state
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.engine.optim import OptimConfig
from trainer.engine.stages import Stage, stage_at, stages_of


class StageSwitch:
    """A switch that prepares both engines for the stage of training to which a step belongs.

    Args:
        optim: The optimizer settings, including the stages of the run.
        num_steps: The number of steps of the run.
        audio: The engine of the audio modules.
        llm: The engine of the LLM.
    """

    def __init__(self, optim: OptimConfig, num_steps: int, audio: AudioEngine, llm: LLMEngine) -> None:
        self._optim, self._num_steps, self._audio, self._llm = optim, num_steps, audio, llm
        self._stages = stages_of(optim, num_steps)
        self._entered: int | None = None
        self.updated = 0
        """The number of steps completed when the optimizers' moments were last updated. It must be set after a
        checkpoint has been loaded."""

    def at(self, step: int) -> tuple[int, Stage]:
        """Return the index of the stage that contains a step, and the stage.

        Args:
            step: The number of steps completed before this one.
        """
        index = stage_at(self._optim, step, self._num_steps)
        return index, self._stages[index]

    def enter(self, step: int) -> tuple[int, Stage]:
        """Prepare the engines for a step.

        Only the parameters trained in the step's stage get gradients, and the optimizers' moments are reset when a new
        stage begins.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed before this one.

        Returns:
            The result of `at`.
        """
        index, stage = self.at(step)
        if len(self._stages) > 1 and index != self._entered:
            self._audio.begin_stage(index)
            self._llm.begin_stage(index)
        self._entered = index
        if 0 < stage.start and self.updated <= stage.start:
            audio_state.reset_moments(self._audio)
            llm_state.reset_moments(self._llm)
        return index, stage
