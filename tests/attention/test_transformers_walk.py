"""Every architecture of the installed Transformers that builds from a small config, against "eager".

With the attention of seqkernels registered, each model must compute the logits of "eager", be it with "eager" itself. A
wrong mask shows in the logits, in logits before a changed last token of a causal model, or in logits that depend on
padding.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import seqkernels.integrations.transformers as integration  # noqa: E402

AT_LEAST = 150  # architectures that are compared; Transformers 5.24 has 186
MOST_PARAMETERS = 8_000_000
SIZES = dict(
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "dim"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "num_attention_heads", "kv_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "window_size", "sliding_window"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 37),
    **dict.fromkeys(("n_inner", "hidden_dim", "ffn_hidden_size"), 37),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    mamba_chunk_size=8,
    vocab_size=50,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    decoder_start_token_id=1,
    use_cache=False,
    attention_types=[[["global", "local"], 1]],
)
# Options that not all configs support in these sizes.
LEFT_OUT = (), ("head_dim",), ("num_key_value_heads",), ("attention_types",), ("sliding_window", "window_size")


def architectures() -> Iterator[tuple[str, type, type, bool]]:
    """Name, config class and model class of each architecture that reads tokens alone, and whether it is causal."""
    auto = transformers.models.auto
    for name, config in auto.configuration_auto.CONFIG_MAPPING.items():
        if getattr(config, "sub_configs", None) and name != "mpt":
            continue  # of several models, with images or sound
        mappings = auto.modeling_auto
        try:
            causal = mappings.MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
            model = causal or mappings.MODEL_FOR_MASKED_LM_MAPPING.get(config, None)
            model = model or mappings.MODEL_MAPPING.get(config, None)
        except ValueError:  # Transformers does not export the class
            continue
        model = model[0] if isinstance(model, tuple) else model
        if model is not None and model.main_input_name == "input_ids":
            yield name, config, model, causal is not None


def small(cls: type):
    """A config of the class with SIZES."""
    names = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    names |= set(vars(cls()))
    for left_out in LEFT_OUT:
        try:
            return cls(**{k: v for k, v in SIZES.items() if k in names and k not in left_out})
        except Exception as error:
            found = error
    raise found


def made(model: type, config, implementation: str) -> torch.nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return model(config).eval()


def logits(model: torch.nn.Module, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    more = {"decoder_input_ids": decoder_ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more)[0]


IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, 5:] = 0


def compare(eager: torch.nn.Module, ours: torch.nn.Module, want: Tensor, causal: bool) -> list[str]:
    """The differences of a model from "eager"."""

    def change(model: torch.nn.Module, ids: Tensor, mask: Tensor, kept: Tensor) -> float:
        """Largest change of the logits that are kept, where the tokens change to ids."""
        before, after = (logits(model, i, mask, IDS) for i in (IDS, ids))
        return float((after - before)[kept].abs().max())

    found = []
    of_tokens = want.shape[:2] == MASK.shape
    kept = MASK.bool() if of_tokens else torch.ones(want.shape[:1], dtype=torch.bool)
    got = logits(ours, IDS, MASK, IDS)
    error, scale = float((got - want)[kept].abs().max()), float(want[kept].abs().max())
    if not error <= 2e-4 * max(1.0, scale):
        found.append(f"logits differ by {error:.2g}")
    if not of_tokens:
        return found
    last, padding = IDS.clone(), torch.where(MASK.bool(), IDS, IDS + 5)
    last[:, -1] += 1
    before_last = torch.arange(7).expand(2, 7) < 6
    cases = [("the padding", padding, MASK, MASK.bool())]
    if causal:
        cases.append(("the last token", last, torch.ones_like(MASK), before_last))
    for what, ids, mask, kept in cases:
        of_ours = change(ours, ids, mask, kept)
        if of_ours > 1e-4 and of_ours > change(eager, ids, mask, kept) + 1e-4:
            found.append(f"{what} changes the logits by {of_ours:.2g}")
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("raw_memory", "threads")
def test_all_architectures_match_eager(capsys: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1)  # the sizes are too small for two threads
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    used: dict[str, list[str]] = {integration.NAME: [], "eager": []}
    wrong: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config_class, model, causal in architectures():
            try:
                config = small(config_class)
                with torch.device("meta"):
                    parameters = sum(p.numel() for p in model(copy.deepcopy(config)).parameters())
                if parameters > MOST_PARAMETERS:
                    continue
                eager = made(model, config, "eager")
                want = logits(eager, IDS, MASK, IDS)
                assert want.is_floating_point() and want.isfinite().all()
            except Exception:  # does not build from a small config, or needs more than tokens
                continue
            try:
                ours = made(model, config, integration.NAME)
                ours.load_state_dict(eager.state_dict())
                found = compare(eager, ours, want, causal)
                used[ours.config._attn_implementation].append(name)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
            wrong += [f"{name}: {what}" for what in found]
    transformers.logging.set_verbosity(verbosity)
    counts = {implementation: len(names) for implementation, names in used.items()}
    with capsys.disabled():
        print(f"\narchitectures of Transformers {transformers.__version__} compared with eager: {counts}")
    assert not wrong, "\n".join(wrong)
    assert sum(counts.values()) >= AT_LEAST
    assert counts[integration.NAME] >= 2 / 3 * sum(counts.values()), used["eager"]
