"""What is trained: shapes of randomly initialised Llama-style models, and how much of the rows an update holds."""

from dataclasses import dataclass, replace

VOCABULARIES = {"1k": 1_024, "49k": 49_152, "152k": 151_936}
KINDS = ("lora", "full")


@dataclass(frozen=True)
class Setting:
    """One model and one way of training it. The rows follow from it (`rows.write`).

    Attributes:
        name: As the report calls it.
        parameterization: "lora" or "full".
        tied: The output projection is the embedding's transpose, as in the 1B of the family.
        tokens: In a block: a micro-batch of the packed sides, and on average of the padded ones.
        examples: In a block.
        supervised: Share of an example's tokens that is scored.
        blocks: In an update, hence the steps of gradient accumulation where a micro-batch is a block.
        precision: "fp32" or "bf16".
        checkpointing: Activations are computed again in the backward pass, on all sides.
    """

    name: str
    parameterization: str
    vocabulary: int
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 1_024
    tied: bool = False
    tokens: int = 2_048
    examples: int = 8
    supervised: float = 0.3
    blocks: int = 2
    precision: str = "fp32"
    checkpointing: bool = False
    seed: int = 42

    @property
    def wide(self) -> bool:
        """Whether the vocabulary is one where the output projection dominates."""
        return self.vocabulary >= VOCABULARIES["49k"]


def cpu_settings(vocabularies: list[str], kinds: list[str], hidden: int, tokens: int) -> list[Setting]:
    """The small model, once per vocabulary and kind."""
    return [
        Setting(
            f"{name}, {kind}", kind, VOCABULARIES[name], hidden=hidden, intermediate=4 * hidden, tokens=tokens
        )
        for name in vocabularies
        for kind in kinds
    ]


def gpu_settings(hidden: int | None, tokens: int | None) -> list[Setting]:
    """The 1B and 8B of the Llama 3 family, 4,096 tokens, bf16.

    Args:
        hidden: Another width with 4 layers, to try the code on a small device or none.
        tokens: Another size of a block.
    """
    base = Setting("", "lora", vocabulary=128_256, heads=32, kv_heads=8, tokens=4_096, precision="bf16")
    one = replace(base, hidden=2_048, layers=16, intermediate=8_192, tied=True)
    eight = replace(base, hidden=4_096, layers=32, intermediate=14_336, checkpointing=True)
    found = [
        replace(one, name="1B, lora"),
        replace(one, name="1B, full", parameterization="full"),
        replace(eight, name="8B, lora"),
    ]
    if hidden:
        small = replace(
            base, vocabulary=4_096, hidden=hidden, intermediate=4 * hidden, layers=4, heads=4, kv_heads=2
        )
        found = [
            replace(
                small,
                name=f"{s.name} at hidden {hidden}",
                parameterization=s.parameterization,
                tied=s.tied,
                checkpointing=s.checkpointing,
            )
            for s in found
        ]
    return [replace(s, tokens=tokens) for s in found] if tokens else found
