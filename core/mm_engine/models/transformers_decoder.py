"""Any text backbone that transformers can run, with its attention sent to the paged cache.

Nothing here knows one backbone from another. The model is built by transformers and run once over
two tokens: what its layers then ask of attention is what they get, or the checkpoint is refused.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.config import ModelContext
from mm_engine.models.joined_weights import JoinedWeights
from mm_engine.models.layers import Linear
from mm_engine.models.transformers_attention import (
    IMPLEMENTATION,
    LAYER,
    READING,
    Unsupported,
    answering,
    foreign_code,
    paged,
    read_layers,
)
from mm_engine.models.transformers_checks import (
    NOT_BEHIND_INTERFACE,
    behind_interface,
    check_behaviour,
    check_config,
    refusing,
)
from mm_engine.models.transformers_parallel import share_out
from mm_engine.models.transformers_parts import (
    CalledLinear,
    Composite,
    HandOver,
    TiedHead,
    composite_of,
    keep_float32,
    path_of,
)

logger = logging.getLogger(__name__)


class TransformersDecoder(nn.Module):
    """A text backbone of transformers with the methods of the native decoder.

    It serves what is causal, with sliding windows by layer, soft-capped scores and any scale;
    everything that isn't attention is transformers' own code. Logits are those of the model that
    transformers has for the whole checkpoint (`ctx.hf_config`): many of them run a plain head on
    backbones whose causal model scales or caps logits. Names of parameters are those of
    transformers' backbone, and `lm_head`.

    Raises:
        StartupError: transformers has no causal language model for the config, or it asks for more
            than the paged cache gives. What neither config nor a dry run tells is found when the
            loaded model first runs, which is the profile run.
    """

    def __init__(self, config: Any, ctx: ModelContext) -> None:
        super().__init__()
        self.model_type: str = config.model_type
        self.max_len = ctx.max_model_len
        self.is_checked = False
        with (
            refusing(self.model_type),
            behind_interface(check_config(config, self.max_len)),
            foreign_code(),
        ):
            self.causal: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # transformers writes to it
                attn_implementation=READING,
                dtype=torch.get_default_dtype(),
            )
            self.causal.eval().requires_grad_(False)
            keep_float32(self.causal)
            base = self.causal.base_model
            if base is self.causal:  # some name the attribute otherwise
                base = self.causal.model
            self.backbone_path = path_of(self.causal, base)
            self.head_path = path_of(self.causal, self.causal.get_output_embeddings())
            embedding = base.get_input_embeddings()
            #: Where a checkpoint's embeddings are; they may stand for a head that it lacks.
            self.embeddings_name = path_of(base, embedding)
            self.handover = HandOver(base)
            tied = (getattr(c, "tie_word_embeddings", False) for c in (config, ctx.hf_config))
            if any(tied):
                self.causal.set_submodule(self.head_path, TiedHead(embedding))
            self._install_layers(config.num_hidden_layers)
            self.causal.set_attn_implementation(IMPLEMENTATION)
        if ctx.shard.size > 1:
            plan = getattr(self.causal.base_model.config, "base_model_tp_plan", None)
            if not share_out(self.backbone, plan, ctx.shard):
                logger.warning(
                    "Each of the %d processes holds all of the text backbone: transformers has no "
                    "plan by which to share out %s.",
                    ctx.shard.size,
                    self.model_type,
                )
        self.composite = self._find_composite(ctx.hf_config, config)
        if self.composite is not None and not self.composite.has_bias:
            head: Any = self._head
            head.bias = None
        #: Checkpoint names of the parts, as `checkpoint_names` reads them.
        self.weight_aliases = {
            "": f"causal.{self.backbone_path}",
            "lm_head": f"causal.{self.head_path}",
        }

    @property
    def backbone(self) -> Any:
        """transformers' model without its head."""
        return self.causal.get_submodule(self.backbone_path)

    @property
    def lm_head(self) -> nn.Module | None:
        """The head; None if it is tied to the embeddings."""
        return None if isinstance(self._head, TiedHead) else self._head

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self.causal.get_submodule(self.head_path)
        return head

    def untie(self) -> Linear:
        """Make a head, uninitialised: the checkpoint brings one, whatever its config says."""
        like = self.backbone.get_input_embeddings().weight
        head = Linear(like.shape[1], like.shape[0]).to(like.device, like.dtype)
        self.causal.set_submodule(self.head_path, head)
        return head

    def joined_weights(self) -> JoinedWeights:
        """What turns a checkpoint's tensors into those of these modules, where they differ."""
        return JoinedWeights(self.causal, self.backbone_path)

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """`[T]` ids to `[T, hidden]`, scaled where transformers' embedding module scales.

        A backbone that scales its embeddings later scales the rows of images with them.
        """
        embeddings: Tensor = self.backbone.get_input_embeddings()(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run one step: `[T]` ids (or `[T, hidden]` embeddings) to normed hidden states.

        Raises:
            StartupError: this is the first step, and the model turns out to mix tokens elsewhere
                than in attention or to need more than embeddings and positions.
        """
        if not self.is_checked:
            with refusing(self.model_type):
                check_behaviour(
                    self.causal, self.embed_tokens, self._run, self._causal_logits, self.max_len
                )
            self.is_checked = True
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        with refusing(self.model_type), answering(paged(attn_metadata)):
            return self._run(x, positions)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """`[N, hidden]` to `[N, vocab]`, as transformers' model of the whole checkpoint makes them.

        That is with the scaling and capping of the composite model, which may have none; where the
        backbone's causal model is what transformers runs, with the causal model's.
        """
        if self.composite is None:
            return self._causal_logits(hidden)
        return self.composite.logits(hidden, self._head)

    def _find_composite(self, hf_config: Any, config: Any) -> Composite | None:
        try:
            composite = composite_of(hf_config, config)
            if composite is not None:
                like = self.backbone.get_input_embeddings().weight
                composite.logits(like.new_zeros(1, like.shape[1]), self._head)
        except Exception as error:  # code of any model
            logger.warning(
                "Logits are made as %s makes them: transformers' model of the whole checkpoint "
                "doesn't make them of hidden states alone (%s).",
                type(self.causal).__name__,
                type(error).__name__,
            )
            return None
        return composite

    def _causal_logits(self, hidden: Tensor) -> Tensor:
        with self.handover.of(hidden[None]):
            logits: Tensor = self.causal(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def _run(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.backbone(
            inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False
        ).last_hidden_state[0]
        return hidden

    def _install_layers(self, num_layers: int) -> None:
        """Run once, give each attention module its place in the cache, swap in our `Linear`."""
        called: set[nn.Module] = set()
        hooks = [
            module.register_forward_hook(lambda module, *_: called.add(module))
            for module in self.causal.modules()
            if type(module) is nn.Linear
        ]
        like = self.backbone.get_input_embeddings().weight

        def run() -> None:
            embeddings = torch.zeros(1, 2, like.shape[1], dtype=like.dtype)
            positions = torch.arange(2)[None]
            self.causal(inputs_embeds=embeddings, position_ids=positions, use_cache=False)

        layers = read_layers(run, self.max_len)
        if len(layers) != num_layers:
            raise Unsupported(f"{len(layers)} of {num_layers} layers: {NOT_BEHIND_INTERFACE}")
        if self.handover.output_class is None:
            raise Unsupported("its head doesn't run on its backbone's output")
        for module, layer in layers:
            setattr(module, LAYER, layer)
        for hook in hooks:
            hook.remove()
        # Only what was called: code that reads a layer's weight needs it where it was.
        for path, module in list(self.causal.named_modules()):
            if module in called:
                self.causal.set_submodule(path, CalledLinear(module))
