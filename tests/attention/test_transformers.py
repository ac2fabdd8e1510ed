"""attn_implementation="seqkernels" in Hugging Face Transformers against "eager", on small random models."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import seqkernels.integrations.transformers as integration  # noqa: E402

B, T = 3, 9
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "Bert": ("BertModel", SIZES),
    "GPT2": ("GPT2LMHeadModel", dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "Llama": ("LlamaForCausalLM", dict(SIZES, num_key_value_heads=2)),  # grouped heads
    "Gemma2": (  # softcap, and a window in every second layer
        "Gemma2ForCausalLM",
        dict(SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=0.5),
    ),
    "GptOss": (  # attention sinks
        "GptOssForCausalLM",
        dict(SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1),
    ),
    "T5": ("T5ForConditionalGeneration", dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
}
LENGTHS = torch.tensor([T, 4, 1])


@pytest.fixture(autouse=True)
def quiet(threads):
    torch.set_num_threads(1)  # the sizes are too small for two threads
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def models(kind: str, **more):
    """The same model with "eager" and with "seqkernels"."""
    name, sizes = MODELS[kind]
    found = []
    for implementation in ("eager", integration.NAME):
        config = getattr(transformers, f"{kind}Config")(**sizes, **more, attn_implementation=implementation)
        torch.manual_seed(0)
        found.append(getattr(transformers, name)(config).eval())
        assert found[-1].config._attn_implementation == implementation
    with torch.no_grad():
        for p, q in zip(found[0].parameters(), found[1].parameters(), strict=True):
            p.add_(torch.randn_like(p) * 0.1)
            q.copy_(p)
    return found


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(2, 50, shape)


def paddings() -> dict[str, torch.Tensor | None]:
    right = torch.arange(T) < LENGTHS.view(-1, 1)
    holes = right.clone()
    holes[0, 3] = False
    return {"none": None, "right": right, "left": right.flip(1), "holes": holes, "ones": torch.ones(B, T).bool()}


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_match_eager(kind):
    found = models(kind)
    ids = ids_of(B, T)
    more = {"decoder_input_ids": ids_of(B, 6)} if kind == "T5" else {}
    for name, mask in paddings().items():
        outs = [m(input_ids=ids, attention_mask=None if mask is None else mask.long(), **more)[0] for m in found]
        # The outputs of padding are meaningless and differ.
        keep = torch.ones(outs[0].shape[:2], dtype=torch.bool) if mask is None or more else mask
        torch.testing.assert_close(
            outs[1][keep], outs[0][keep], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert outs[1].isfinite().all()
        upstream = torch.randn(outs[0].shape)
        grads = [
            torch.autograd.grad((o * upstream)[keep].sum(), list(m.parameters()), allow_unused=True)
            for o, m in zip(outs, found)
        ]
        for want, got in zip(*grads):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Gemma2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_matches_eager(kind, cache):
    """Greedy decoding of prompts of several lengths, with both caches of Transformers."""
    found = models(kind)
    mask = paddings()["left"].long()
    ids = ids_of(B, T)
    with torch.inference_mode():
        want, got = (
            m.generate(
                ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None,
                cache_implementation=cache, disable_compile=True,
            )
            for m in found
        )  # fmt: skip
    assert got.shape == (B, T + 5)
    assert torch.equal(got, want)


def test_chunks_of_a_prompt():
    """Several queries with a cache are aligned with the last key."""
    found = models("Llama")
    ids = ids_of(B, T)
    for mask in (None, paddings()["left"].long()):
        with torch.no_grad():
            whole = found[0](input_ids=ids, attention_mask=mask).logits
            past = found[1](input_ids=ids[:, :5], attention_mask=None if mask is None else mask[:, :5], use_cache=True)
            key = "cache" if hasattr(past, "cache") else "past_key_values"
            rest = found[1](input_ids=ids[:, 5:], attention_mask=mask, **{key: getattr(past, key)}).logits
        keep = torch.ones(B, 4, dtype=torch.bool) if mask is None else mask[:, 5:].bool()
        torch.testing.assert_close(rest[keep], whole[:, 5:][keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_packed_sequences(kind):
    """One row of packed sequences, as the collator for flash attention provides them."""
    found = models(kind)
    lengths = [4, 1, 7]
    parts = [ids_of(1, n) for n in lengths]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=7, max_length_k=7)
    with torch.no_grad():
        want = torch.cat([found[0](input_ids=p).logits[0] for p in parts])
        rows = torch.cat(parts, 1)
        for more in (packed,) if kind == "GptOss" else (packed, dict()):  # its "eager" ignores bounds
            got = found[1](input_ids=rows, position_ids=positions, use_cache=False, **more).logits[0]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attentions():
    found = models("Bert")
    ids, mask = ids_of(B, T), paddings()["right"].long()
    want = found[0](input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    layer, hidden = found[1].encoder.layer[0].attention.self, torch.randn(B, T, 32)
    got = found[1](input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert layer(hidden)[1] is None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_empty_steps_of_a_static_cache_are_not_read(steps, padded):
    module = torch.nn.Module()
    module.is_causal = True
    q, kv = torch.randn(B, 4, steps, 8), torch.randn(B, 2, 40, 8)
    at = 20 + steps
    padding = torch.ones(B, at, dtype=torch.bool)
    padding[0, :5] = False
    mask = integration.attention_mask(
        B, steps, 40, q_offset=torch.tensor(20), attention_mask=padding if padded else None, allow_is_causal_skip=False
    )
    assert mask.shape == (B, 1, steps, 40) and mask.seqkernels_parts.keys == at
    want, weights = integration.attention_forward(module, q, kv, kv, mask.clone(), output_attentions=True)
    same, of_parts = integration.attention_forward(module, q, kv, kv, mask, output_attentions=True)
    assert torch.equal(want, same) and torch.equal(weights, of_parts)
    kv[:, :, at:] = float("nan")
    got, _ = integration.attention_forward(module, q, kv, kv, mask)
    assert torch.equal(got, want)


def test_masks_are_passed_as_lengths_and_causality():
    """Trailing padding becomes lengths. Later writes into the mask are respected."""
    right = paddings()["right"]
    for causal in (True, False):
        function = integration.causal_mask_function if causal else integration.bidirectional_mask_function
        mask = integration.attention_mask(B, T, T, mask_function=function, attention_mask=right)
        assert mask.seqkernels_parts[0] is causal and torch.equal(mask.seqkernels_parts[1], LENGTHS)
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.randn(B, 2, T, 8)
    mask = integration.attention_mask(B, T, T, attention_mask=right)
    before, _ = integration.attention_forward(module, q, q, q, mask)
    plain, _ = integration.attention_forward(module, q, q, q, mask.clone())
    torch.testing.assert_close(before, plain)
    mask[:, :, :, 0] = False
    after, _ = integration.attention_forward(module, q, q, q, mask)
    plain, _ = integration.attention_forward(module, q, q, q, mask.clone())
    torch.testing.assert_close(after, plain)
    assert after[:, 0].abs().max() == 0  # the first query attends to no key


def test_dropout_and_compile():
    sizes = dict(MODELS["Llama"][1], num_hidden_layers=1)
    config = transformers.LlamaConfig(**sizes, attn_implementation=integration.NAME)
    model = transformers.LlamaForCausalLM(config)
    ids, mask = ids_of(B, T), paddings()["left"].long()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    got, want = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (compiled, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    outs = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits for _ in range(2)]
    assert not torch.allclose(*outs)


SIZES = dict(vocab_size=50, hidden_size=32, initializer_range=0.3)
WITHOUT_INTERFACE = {
    "Bloom": ("BloomForCausalLM", dict(n_layer=2, n_head=4)),
    "Falcon": ("FalconForCausalLM", dict(num_hidden_layers=2, num_attention_heads=4)),
    "GPTNeo": ("GPTNeoForCausalLM", dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])),
    "MPNet": ("MPNetModel", dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)),
    "RoFormer": ("RoFormerModel", dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)),
}


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_models_with_attention_of_their_own_run_eager(name: str) -> None:
    """They add the mask to the scores, or select their modules by the name of the implementation."""
    model_name, sizes = WITHOUT_INTERFACE[name]
    models = []
    for implementation in ("eager", integration.NAME):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **sizes, attn_implementation=implementation)
        models.append(getattr(transformers, model_name)(config).eval())
    eager, ours = models
    assert ours.config._attn_implementation == "eager"
    ids, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        got, want = (m(ids, attention_mask=mask)[0][mask.bool()] for m in (ours, eager))
    assert torch.equal(got, want)
