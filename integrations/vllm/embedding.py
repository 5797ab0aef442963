"""The input embedding of the model that a worker runs. Runs in the engine's workers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ngrpo_ops._patching import wrap


class InputEmbedding:
    """Finds the rows of a model's input embedding, and notices when its weights change.

    Args:
        model: vLLM's. A trainer's weights come in by its `load_weights`.
        vocabulary: the size of the vocabulary.

    Attributes:
        changed: whether the weights are others than at the last look. Who looks sets it to False.

    Raises:
        ValueError: the model does not have exactly one unquantized token embedding, of the whole vocabulary, or
            looks up a rank's rows alone and adds the ranks' up later.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.changed = True
        self.rows()  # rejects a model while the engine starts

        def patch_load_weights(original: Any) -> Any:
            def load_weights(*args: Any, **kwargs: Any) -> Any:
                self.changed = True
                return original(*args, **kwargs)

            return load_weights

        wrap(model, "load_weights", patch_load_weights)

    def rows(self) -> tuple[Tensor, Any]:
        """This rank's rows of the embedding, and the group whose ranks have the others, or None."""
        from vllm.distributed import get_tp_group
        from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        modules = [
            module
            for module in self.model.modules()
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ]
        if any(isinstance(module, VocabParallelEmbeddingWithLoRA) for module in self.model.modules()):
            raise ValueError(
                f"enable_lora cannot be mixed with {type(self.model).__name__}, whose embedding it wraps: the "
                "adapters' indices are those of the batch's tokens, and a mix looks up more"
            )
        if len(modules) != 1 or not modules[0].weight.is_floating_point() or modules[0].weight.element_size() < 2:
            raise ValueError(
                f"the model {type(self.model).__name__} has {len(modules)} unquantised token embeddings, expected one"
            )
        (module,) = modules
        if module.org_vocab_size != self.vocabulary or module.num_added_embeddings:
            raise ValueError(f"{module.num_embeddings} token embeddings but a vocabulary of {self.vocabulary}: refused")
        if not getattr(module, "reduce_results", True):
            raise ValueError(f"the model {type(self.model).__name__} adds its ranks' embeddings up itself: refused")
        rows = module.weight.data[: module.num_org_embeddings_per_partition]
        if module.tp_size == 1:
            return rows, None
        group = getattr(module, "parallel_group", None)  # None: the tensor-parallel one, as always until vLLM 0.31
        return rows, (get_tp_group() if group is None else group).device_group
