"""What the code published with Block-Attention does with kept blocks, to compare with: join, turn, run."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache

from rag_blockcache.block_source import BlockSource
from rag_blockcache.evaluation.requests import FirstToken, make_plan
from rag_blockcache.evaluation.stopwatch import Clock
from rag_blockcache.evaluation.token_prompts import TokenPrompt
from rag_blockcache.reuse import BLOCK
from rag_blockcache.rotary import rotate_keys


@torch.inference_mode()
def naive_first_token(source: BlockSource, prompt: TokenPrompt) -> FirstToken:
    """Join position-free blocks layer by layer, turn the keys of the whole run, and let transformers run.

    That blocks are kept without positions is in its favour: taking them out is not timed.

    Args:
        source: Has all blocks of the prompt, exact and on the model's device.
        prompt: The prompt.

    Source:
        The server of https://arxiv.org/abs/2409.15355
    """
    model = source.model
    clock = Clock(model.device)
    start = clock()
    plan = make_plan(source, prompt, BLOCK)
    named = clock()
    states = source.load(plan)
    loaded = clock()
    blocks = [placed.states.unpack() for placed in plan.placements(states)]
    computed = plan.computed()
    cache = DynamicCache()
    for index, layer in enumerate(model.layers) if blocks else ():
        keys = torch.cat([block.keys[index] for block in blocks], dim=1)
        values = torch.cat([block.values[index] for block in blocks], dim=1)
        if layer.rotary is not None:
            positions = torch.arange(keys.shape[1], device=model.device)
            angles = layer.rotary.angles(positions, total_length=prompt.num_tokens)
            keys = rotate_keys(keys, angles, interleaved=layer.rotary.interleaved)
        cache.update(keys[None], values[None], index)
    assembled = clock()
    with model.inference():
        logits = model.network(
            input_ids=computed.token_ids[None].to(model.device),
            position_ids=computed.positions[None].to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[0, -1]
    int(logits.argmax())
    done = clock()
    return FirstToken(
        logits,
        seconds=done - start,
        name_seconds=named - start,
        load_seconds=loaded - named,
        assemble_seconds=assembled - loaded,
        compute_seconds=done - assembled,
        passes=(computed.positions.tolist(),),
    )
