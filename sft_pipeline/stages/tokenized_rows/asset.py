"""The asset `tokenized_rows`: chat template, token ids, and the mask of supervised tokens."""

from sft_pipeline.external_files import TOKENIZER_FILES, digest_files
from sft_pipeline.hub import without_revision
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.text.config import NAMED_TEMPLATES


def _config(branch: Branch) -> TokenizedRowsConfig:
    recipe = branch.require_recipe()
    return TokenizedRowsConfig(
        tokenizer=recipe.tokenizer,
        revision=recipe.model.revision,
        template=recipe.template,
        tokens=recipe.tokens,
    )


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    digests = digest_files(without_revision(recipe.tokenizer), TOKENIZER_FILES)
    template = recipe.template.chat_template
    if template != "tokenizer" and template not in NAMED_TEMPLATES:
        digests |= digest_files(template)
    return digests


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.tokenized_rows.build import build

    return build


STAGE = Stage(
    name="tokenized_rows",
    description="Each row rendered with the chat template, tokenized, and its supervised tokens marked; "
    "every mask derived two ways that agree.",
    kinds=frozenset({"parquet", "huggingface"}),
    inputs=("grouped_split",),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "supervised_everywhere", True, "every row has a supervised token, and position 0 never is one"
        ),
        CheckSpec(
            "mask_certificate",
            True,
            "character offsets and token prefix lengths give the same mask for every row",
        ),
        CheckSpec(
            "decode_round_trip",
            True,
            "decoding the supervised span gives exactly what the template emits after the prompt, with the "
            "completion in it once",
        ),
        CheckSpec(
            "prompt_prefix_exact",
            True,
            "the prompt that a server would send is a token-exact prefix of every row",
        ),
        CheckSpec(
            "served_prompt_equal",
            True,
            "the prompts of a sample with rows of every shape are, id by id, those that transformers' own "
            "apply_chat_template makes of the source rows",
        ),
        CheckSpec(
            "fields_rendered", True, "whatever a row says reaches the text, or the row is rejected by name"
        ),
        CheckSpec(
            "no_forged_control_tokens", True, "every control token in the output was placed by the template"
        ),
        CheckSpec(
            "fingerprints_recorded", True, "template, tokenizer and mask fingerprints are in formatting.json"
        ),
        CheckSpec(
            "turns_end", True, "the template ends an assistant's turn, so that the model learns to stop"
        ),
        CheckSpec("counts_add_up", True, "rows read = rows accepted + rows rejected"),
        CheckSpec("splits_not_empty", True, "no split that had rows has lost them all, and train has some"),
        CheckSpec("reject_rate", False, "at most 5 % of the rows are rejected or truncated"),
        CheckSpec(
            "tokenizer_skew",
            False,
            "AutoTokenizer, which servers use, gives the ids and the prompts of tokenizer.json on a sample "
            "of these rows",
        ),
        CheckSpec(
            "reply_opened", False, "a server's prompt ends where the reply begins (add_generation_prompt)"
        ),
        CheckSpec(
            "stop_token",
            False,
            "turns end with a single token at which a server stops, and the text does not depend on the "
            "clock",
        ),
    ),
    outside=_outside,
    reuses_rows=True,
    packages=("tokenizers", "jinja2", "transformers"),
)
