"""Memory layers in decoders of Hugging Face transformers (5.0 and later).

    from ultramem_cuda.integrations.transformers import add_memory

    model = AutoModelForCausalLM.from_pretrained("...")
    add_memory(model, config)            # every block: x + mlp(h) + memory(h)
    model.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)    # once this module is imported

The MLP of a chosen block is wrapped in :class:`FFNWithMemory`, so that no modeling code is touched:
attention, KV cache, gradient checkpointing and heads are those of transformers. The one table is a
module of the decoder.

What was saved says so: its model type is "ultramem", and ``config.ultramem`` holds the family and
what :func:`add_memory` was given. transformers without this module refuses such a checkpoint; under
the family's own type it would load the network, leave the memory out and run. To know the type
again, this module registers one configuration with ``AutoConfig``; it makes a subclass of the
family's configuration, and of its models, as it meets them. Nothing of transformers is replaced.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..block import ffn_with_memory
from ..config import UltraMemConfig
from ..layer import UltraMemLayer
from ..table import MemoryTable

try:
    import transformers
    from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "ultramem_cuda.integrations.transformers needs transformers >= 5.0: "
        'pip install "ultramem_cuda[transformers]"'
    ) from error

__all__ = ["FFNWithMemory", "add_memory", "memory_model_class"]

MODEL_TYPE = "ultramem"
# Of what config.ultramem holds.
FORMAT_VERSION = 1
_TABLE = "memory_table"
_AUTO_MODELS = (
    "MODEL",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "MODEL_FOR_TOKEN_CLASSIFICATION",
    "MODEL_FOR_QUESTION_ANSWERING",
)

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def add_memory(
    model: AnyModel,
    config: UltraMemConfig | Mapping[str, Any] | str,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    grad_mode: str = "dense",
    decoder_layers: str = "layers",
    mlp: str = "mlp",
) -> AnyModel:
    """Give a decoder a memory layer beside the MLP of each chosen block, in place.

    A block computes mlp(h) + memory(h) where it computed mlp(h), on the same normed h; a norm
    behind the MLP (OLMo 2, Gemma 2) takes the sum. Memory layers and table are drawn as
    ``config.init`` says, with torch's default generator, on the device of the MLPs; the layers in
    ``model.dtype`` and in the mode (train or eval) of the model. Everything is trainable.

    The model becomes an instance of :func:`memory_model_class` of its class, and its
    configuration, of which other models may hold the old object, a copy with ``ultramem``.

    Args:
        model: a decoder of transformers, with or without a head: Llama, Mistral, Qwen2, Qwen3,
            OLMo, OLMo 2 and any other whose blocks have an MLP that takes and returns one tensor.
        config: an :class:`~ultramem_cuda.UltraMemConfig`; its fields, of which ``d_model`` and
            ``num_layers`` may be left out; or the name of a preset.
        layers: indices of the blocks that get a memory layer, ascending; None for all. They are
            memory layers 0, 1, ... of ``config``.
        dtype: of the table; None for that of the model, now and whenever it is loaded.
        grad_mode: of the table, "dense" or "deferred"; see :class:`~ultramem_cuda.MemoryTable`.
        decoder_layers: path of the list of blocks, from ``model.base_model``.
        mlp: name of the MLP in a block.

    Returns:
        ``model``. Its table is ``model.memory_table``.

    Raises:
        TypeError, ValueError: naming the argument, before the model is changed. Where the model has
            no blocks at ``decoder_layers`` or those no ``mlp``, the message lists what there is.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: must be a PreTrainedModel of transformers, got {type(model).__name__}"
        )
    if any(isinstance(module, UltraMemLayer) for module in model.modules()):
        raise ValueError(f"model: must have no memory layers yet, this {type(model).__name__} has")
    blocks = _find_blocks(model, decoder_layers)
    chosen = _chosen_layers(layers, len(blocks))
    mlps = [_find_mlp(blocks[index], mlp) for index in chosen]
    memory = _checked_config(config, _hidden_size(model), len(chosen))
    placement = _Placement(
        base_model_type=model.config.model_type,
        config=memory,
        layers=chosen,
        decoder_layers=decoder_layers,
        mlp=mlp,
        grad_mode=grad_mode,
        table_dtype=None if dtype == model.dtype else dtype,
    )
    device = _common_device(mlps)
    copies = _with_memory_config(model.config, placement)
    family: Any = type(model)
    model_class = memory_model_class(family)
    # What from_pretrained will construct. Where that fails, it fails here, with nothing changed;
    # and transformers gets to know the class, which it does when one is constructed.
    with torch.device("meta"):
        model_class(copy.deepcopy(copies[id(model.config)]))
    _attach(model, placement, dtype=model.dtype, device=device)
    for module in model.modules():
        # Modules share the model's configuration, or a part of it.
        if id(getattr(module, "config", None)) in copies:
            module.config = copies[id(module.config)]
    # A conversion to the checkpoint format of the family does not know the new names.
    model.__dict__.pop("_weight_conversions", None)
    model.__class__ = model_class
    _register_models(model_class.base_class.config_class)
    return model


class FFNWithMemory(nn.Module):
    """In the place of a block's MLP: ``ffn(x) + memory(x, table)``, x and the result [..., D].

    Attributes:
        ffn: the MLP that was there.
        memory: the block's :class:`~ultramem_cuda.UltraMemLayer`.
    """

    def __init__(self, ffn: nn.Module, memory: UltraMemLayer, table: MemoryTable) -> None:
        super().__init__()
        self.ffn = ffn
        self.memory = memory
        # In a tuple, so that it is no submodule: it appears once in the model, at its top. Copies
        # and pickles of the model keep the two the same object.
        self._table = (table,)

    @property
    def table(self) -> MemoryTable:
        """The model's table."""
        return self._table[0]

    def forward(self, x: Tensor) -> Tensor:
        return ffn_with_memory(self._run_ffn, self.memory, x, self.table)

    def _run_ffn(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"mlp: must return a tensor for memory to be added to, "
                f"{type(self.ffn).__name__} returned a {type(y).__name__}"
            )
        return y


# ---- what config.ultramem holds ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placement:
    """Memory layers and where they are in a model of a family."""

    base_model_type: str
    config: UltraMemConfig
    layers: tuple[int, ...]
    decoder_layers: str
    mlp: str
    grad_mode: str
    table_dtype: torch.dtype | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for config.json."""
        dtype = None if self.table_dtype is None else str(self.table_dtype).removeprefix("torch.")
        return {
            "version": FORMAT_VERSION,
            "base_model_type": self.base_model_type,
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "decoder_layers": self.decoder_layers,
            "mlp": self.mlp,
            "grad_mode": self.grad_mode,
            "table_dtype": dtype,
        }

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Placement:
        """That of a model's configuration."""
        data = dict(_saved_placement(getattr(config, "ultramem", None)))
        del data["version"]
        dtype = data.pop("table_dtype")
        return cls(
            config=UltraMemConfig.from_dict(data.pop("config")),
            layers=tuple(data.pop("layers")),
            table_dtype=None if dtype is None else getattr(torch, dtype),
            **data,
        )


def _saved_placement(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(
            f"config: 'ultramem' must hold the memory layers' configuration, got {data!r}; "
            "add_memory sets it"
        )
    if data.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"config: 'ultramem' has version {data.get('version')!r}, this ultramem_cuda reads "
            f"{FORMAT_VERSION}"
        )
    return data


# ---- classes of a family -------------------------------------------------------------------------


class _MemoryConfig:
    """Mixed into the configuration of a family."""

    base_class: type[PreTrainedConfig]
    model_type = MODEL_TYPE

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no importable name.
        return _new_config, (self.base_class,), self.__dict__


class _MemoryModel:
    """Mixed into a model of a family."""

    base_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        placement = _Placement.of(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # Of the default dtype and device, as the rest of the model was.
        _attach(self, placement)

    @property
    def memory_table(self) -> MemoryTable:
        """The table that all memory layers share, a module of ``base_model``."""
        return self.base_model._modules[_TABLE]  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``nn.Module.zero_grad``; deferred gradients of the table are cleared, too."""
        super().zero_grad(set_to_none)  # type: ignore[misc]
        self.memory_table.zero_grad(set_to_none)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.from_pretrained``.

        Memory weights that the checkpoint lacks are drawn as the memory's configuration says.

        Raises:
            ValueError: the checkpoint's table has a scale, which a dense table has no place for.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        _settle(model, info)
        return (model, info) if output_loading_info else model

    # transformers looks for these two in the source of the class's module, which is not this one.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base_class._can_set_experts_implementation()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no importable name.
        return _new_model, (self.base_class,), self.__dict__


@functools.cache
def memory_model_class(base: Any) -> Any:
    """The subclass of a model class of transformers, such as ``LlamaForCausalLM``, that has memory
    layers.

    Its ``from_pretrained`` loads what ``save_pretrained`` wrote after :func:`add_memory`, which
    ``AutoModelForCausalLM`` and its like do by themselves; use it for a class that they do not
    know.
    """
    names = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with memory layers beside its MLPs.",
        "base_class": base,
        "config_class": _memory_config_class(base.config_class),
    }
    return type(f"UltraMem{base.__name__}", (_MemoryModel, base), names)


@functools.cache
def _memory_config_class(base: Any) -> Any:
    names = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with 'ultramem', the configuration of memory layers.",
        "base_class": base,
        "model_type": MODEL_TYPE,
    }
    return type(f"UltraMem{base.__name__}", (_MemoryConfig, base), names)


def _new_config(base: Any) -> Any:
    cls = _memory_config_class(base)
    return cls.__new__(cls)


def _new_model(base: Any) -> Any:
    cls = memory_model_class(base)
    return cls.__new__(cls)


@functools.cache
def _register_models(base: Any) -> None:
    """Have AutoModelForCausalLM and its like construct models with memory layers for
    configurations with them."""
    for name in _AUTO_MODELS:
        mapping = getattr(transformers, f"{name}_MAPPING")
        model_class = mapping.get(base, None)
        # Some families have several, in a tuple.
        if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
            mapping.register(_memory_config_class(base), memory_model_class(model_class))


class _SavedConfig(PreTrainedConfig):
    """What AutoConfig knows the model type by: makes the configuration of the family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base_type = _saved_placement(config_dict.get("ultramem")).get("base_model_type")
        if base_type not in transformers.CONFIG_MAPPING:
            raise ValueError(
                f"config: 'ultramem' names the model type {base_type!r}, which transformers "
                f"{transformers.__version__} does not know"
            )
        base = transformers.CONFIG_MAPPING[base_type]
        _register_models(base)
        return _memory_config_class(base).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, _SavedConfig)


def _with_memory_config(config: PreTrainedConfig, placement: _Placement) -> dict[int, Any]:
    """Copies, by the id of what they are copies of, of a configuration and all in it."""
    copies: dict[int, Any] = {}
    new = copy.deepcopy(config, copies)
    family: Any = type(config)
    new.__class__ = _memory_config_class(family)
    new.ultramem = placement.to_dict()
    return copies


# ---- parts of add_memory -------------------------------------------------------------------------


def _find_blocks(model: PreTrainedModel, path: str) -> nn.ModuleList:
    try:
        blocks = model.base_model.get_submodule(path)
    except AttributeError:
        blocks = None
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return blocks
    lists = [name for name, m in model.base_model.named_modules() if isinstance(m, nn.ModuleList)]
    found = ", ".join(repr(name) for name in lists) or "none"
    raise ValueError(
        f"decoder_layers: {type(model).__name__} has no list of blocks at {path!r} of its "
        f"base_model; lists there: {found}"
    )


def _find_mlp(block: nn.Module, name: str) -> nn.Module:
    mlp = block._modules.get(name)
    if mlp is None:
        found = ", ".join(name for name, _ in block.named_children())
        raise ValueError(
            f"mlp: {type(block).__name__} has no module {name!r}; its modules: {found}"
        )
    return mlp


def _chosen_layers(layers: Sequence[int] | None, num_blocks: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(num_blocks))
    chosen = tuple(layers)
    integers = all(isinstance(index, int) and not isinstance(index, bool) for index in chosen)
    if not chosen or not integers or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"layers: must be ascending indices of blocks, got {layers!r}")
    if chosen[0] < 0 or chosen[-1] >= num_blocks:
        raise ValueError(f"layers: must be in [0, {num_blocks}), got {layers!r}")
    return chosen


def _hidden_size(model: PreTrainedModel) -> int:
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(f"model: the configuration of {type(model).__name__} has no hidden_size")
    return size


def _checked_config(
    config: UltraMemConfig | Mapping[str, Any] | str, d_model: int, num_layers: int
) -> UltraMemConfig:
    wanted = {"d_model": d_model, "num_layers": num_layers}
    if isinstance(config, str):
        config = UltraMemConfig.preset(config)
    elif isinstance(config, Mapping):
        config = UltraMemConfig.from_dict({**wanted, **config})
    elif not isinstance(config, UltraMemConfig):
        raise TypeError(
            "config: must be an UltraMemConfig, its fields or the name of a preset, "
            f"got {type(config).__name__}"
        )
    if config.d_model != d_model:
        raise ValueError(
            f"config: d_model must be {d_model}, the model's hidden size, got {config.d_model}"
        )
    if config.num_layers != num_layers:
        raise ValueError(
            f"config: num_layers must be {num_layers}, the number of blocks that get a memory "
            f"layer, got {config.num_layers}"
        )
    return config


def _common_device(mlps: Sequence[nn.Module]) -> torch.device:
    devices = {parameter.device for mlp in mlps for parameter in mlp.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"model: its MLPs must be on one device, where the table will be, got {found}"
        )
    return devices.pop()


def _attach(
    model: PreTrainedModel,
    placement: _Placement,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    blocks = _find_blocks(model, placement.decoder_layers)
    table = MemoryTable.from_config(
        placement.config,
        dtype=placement.table_dtype or dtype,
        device=device,
        grad_mode=placement.grad_mode,
    )
    wrapped = []
    for layer_index, block_index in enumerate(placement.layers):
        ffn = _find_mlp(blocks[block_index], placement.mlp)
        memory = UltraMemLayer(placement.config, layer_index, dtype=dtype, device=device)
        wrapped.append(FFNWithMemory(ffn, memory, table))
    # Once everything has found its memory.
    setattr(model.base_model, _TABLE, table.train(model.training))
    for block_index, module in zip(placement.layers, wrapped, strict=True):
        setattr(blocks[block_index], placement.mlp, module.train(model.training))


# ---- loading -------------------------------------------------------------------------------------


def _settle(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Once transformers has put tensors in the place of parameters on the meta device: draw what
    was not in the checkpoint, and have tables and layers know the tensors that they now have."""
    for name in info["unexpected_keys"]:
        if name.endswith(f"{_TABLE}.scale"):
            raise ValueError(
                f"{name}: the checkpoint's table has deferred gradients and a scale, the "
                "configuration asks for 'dense'; load it as it was saved"
            )
    undrawn = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    for name, module in model.named_modules():
        if isinstance(module, MemoryTable | UltraMemLayer):
            # A move to where they are: addressing, factors and references follow the tensors.
            module._apply(lambda tensor: tensor)
            loaded = {
                key: tensor
                for key, tensor in module.state_dict().items()
                if f"{name}.{key}" not in undrawn
            }
            if len(loaded) < len(module.state_dict()):
                loaded = {key: tensor.clone() for key, tensor in loaded.items()}
                module.reset_parameters()
                module.load_state_dict(loaded, strict=False)
