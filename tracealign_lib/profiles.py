"""Run profiles: how large a world and model, and how many seeds.

`smoke` only shows that everything runs; its numbers mean nothing. `laptop` is the default. `full` is
the laptop's world over several seeds: the published numbers. `gpu` is a larger world and model.
Settings were chosen by looking at seeds 0, 1, 2 and 7; seeds 3, 4 and 5, which `full` and `gpu`
publish, were not looked at before.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from tracealign_lib.errors import ParameterError
from tracealign_lib.world import WorldSettings


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Architecture and training of the book's model. Lengths are tokens, rates AdamW's.

    `base_epochs` passes over the corpus are packed into blocks of `block` tokens; `replay` documents
    are mixed into SFT so that alignment does not wipe out what pre-training taught.
    """

    vocab_size: int = 1400
    hidden: int = 160
    layers: int = 4
    heads: int = 4
    mlp: int = 480
    context: int = 256
    block: int = 128
    base_epochs: int = 12
    base_batch: int = 4
    base_rate: float = 2e-3
    sft_epochs: int = 4
    sft_batch: int = 8
    sft_rate: float = 1e-3
    replay: int = 400
    dpo_epochs: int = 1
    dpo_batch: int = 4
    dpo_rate: float = 1e-5
    dpo_beta: float = 0.1
    dpo_sft_weight: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
                raise ParameterError(
                    "A model setting is out of range.",
                    given=f"{field.name}={value!r}",
                    expected="a number of 0 or more",
                    mend="correct it in ModelSettings(...)",
                )


class Profile(NamedTuple):
    """Sizes of one run. `templates` and `samples` bound the prompts asked for each item."""

    name: str
    seeds: tuple[int, ...]
    world: WorldSettings
    model: ModelSettings
    templates: int  # requests of each attack for each item
    samples: int  # draws of the best-of-n attack

    def world_settings(self, seed: int) -> WorldSettings:
        """The world's settings for one seed."""
        return replace(self.world, seed=seed)


_SMOKE_WORLD = WorldSettings(
    unsafe=10, rare_benign=5, twins=5, recombinations=4, news=10, catalogues=4, stories=20, held_out=10
)
_SMOKE_MODEL = ModelSettings(vocab_size=800, hidden=32, layers=2, heads=2, mlp=64, base_epochs=2, replay=40)
_GPU_WORLD = WorldSettings(
    unsafe=2500,
    rare_benign=1250,
    twins=1250,
    recombinations=1250,
    news=3000,
    catalogues=1250,
    stories=11000,
    held_out=600,
)
_GPU_MODEL = ModelSettings(
    vocab_size=8000, hidden=512, layers=8, heads=8, mlp=1536, base_batch=32, base_rate=1e-3, replay=20000
)

PROFILES: dict[str, Profile] = {
    "smoke": Profile("smoke", (0,), _SMOKE_WORLD, _SMOKE_MODEL, templates=1, samples=2),
    "laptop": Profile("laptop", (0,), WorldSettings(), ModelSettings(), templates=3, samples=8),
    "full": Profile("full", (3, 4, 5), WorldSettings(), ModelSettings(), templates=3, samples=8),
    "gpu": Profile("gpu", (3, 4, 5), _GPU_WORLD, _GPU_MODEL, templates=1, samples=8),
}


def get_profile(name: str) -> Profile:
    """The profile of that name; an unknown one is a `ParameterError`."""
    if name not in PROFILES:
        raise ParameterError(
            "Unknown profile.",
            given=repr(name),
            expected=" or ".join(PROFILES),
            mend="choose one of them, for example: tracealign run --profile laptop",
        )
    return PROFILES[name]
