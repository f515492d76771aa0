"""Where the weights of a model start, and which of them decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from .model import LanguageModel


def initialise(model: LanguageModel) -> None:
    """As `LanguageModel.initialise`."""
    hidden = model.embed.embedding_dim
    std = (2 / (5 * hidden)) ** 0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            added = name.endswith((".mixer.output", ".mlp.down"))
            nn.init.normal_(
                module.weight, std=std / (2 * len(model.blocks)) ** 0.5 if added else std
            )


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """The parameters for an optimiser, of which only the matrices of linear layers decay.

    Embeddings, norms, biases, convolutions, decays and parameters per head do not, nor does a
    matrix that is an embedding too.

    Args:
        model: any module.
        weight_decay: of the first group; that of the second is 0.

    Returns:
        Two groups, for `torch.optim.AdamW` and the like.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]


def tensor_parallel() -> ParallelStyle:
    """A style that splits layers over the ranks of a mesh: mixers by heads, MLPs by channels.

    It is for torch's `parallelize_module`, with `RecurrentLayer`, attention and `SwiGLU` (Megatron:
    Shoeybi et al. 2019): `{"blocks.*.mixer": tensor_parallel(), "blocks.*.mlp":
    tensor_parallel()}`. Inputs and outputs of a layer are on every rank. Heads, value heads and
    inner channels must be multiples of the ranks. `state_dict` and `load_state_dict` have weights
    in the order of the whole layer, and every rank has to call them.

    Returns:
        The style; one serves any number of modules.
    """
    from .tensor_parallel import HeadsParallel  # imports torch.distributed

    return HeadsParallel()
