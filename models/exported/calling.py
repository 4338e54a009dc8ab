"""The call of an exported pipeline: presets, few steps and no guidance unless the user asks for it."""

from __future__ import annotations

from typing import Any, ClassVar


class FewStepCall:
    """Mixin before a diffusers pipeline class. own_defaults: arguments of its call where the user
    gives none; they turn guidance off."""

    own_defaults: ClassVar[dict[str, Any]] = {}

    def __call__(
        self,
        *args: Any,
        preset: str | None = None,
        num_inference_steps: int | None = None,
        generator: Any = None,
        **options: Any,
    ) -> Any:
        """As the base class's, but: preset is 1nfe, 2nfe, 4nfe, fewN, anyN or multiN (N steps; the last two follow the
        trajectory, fewN re-noises); num_inference_steps alone takes the default preset's family; the generator draws
        the fresh noise of re-noising presets, too. Guidance was trained in and is off."""
        me: Any = self
        # Copies: ZImagePipeline writes its chat template into the caller's list of prompts.
        args = tuple(list(value) if isinstance(value, list) else value for value in args)
        options = {key: list(value) if isinstance(value, list) else value for key, value in options.items()}
        sampler = me.scheduler.choose(preset, num_inference_steps)
        given = {**self.own_defaults, **(me.scheduler.config.call_defaults or {}), **options}
        with me.scheduler.sampling(sampler, generator), me.transformer.following(me.scheduler):
            return super().__call__(  # type: ignore[misc]
                *args, num_inference_steps=sampler.steps, generator=generator, **given
            )
