"""DeepSpeed engines: the one place where parameters are partitioned, stepped, gathered and saved.

Different from DeepSpeed's own defaults: the gradient of an optimizer batch is the gradient of *one* sum divided by
*one* denominator, whatever the micro-batch size, the accumulation and the number of ranks; clipping is always written
(its default is 1.0); the optimizer is a client one, so that CPU and GPU runs share torch's AdamW.
"""

import copy
import gc
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from tasks.config import EngineConfig, OptimizerConfig
from tasks.training.lora import merged
from tasks.training.models import Policy, decoder_layers
from tasks.training.ranks import all_sum, rank, world_size
from tasks.training.types import Engine, Micro, StepReport

LOG = logging.getLogger(__name__)
REDUCED_TOGETHER = 200_000_000
"""Elements of a bucket of gradients that several ranks reduce at once."""
PREFETCHED = 50_000_000
"""Elements that ZeRO-3 gathers ahead; DeepSpeed's default."""


class TrainEngine:
    """A DeepSpeed engine with an optimizer."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine = engine
        self.device = device

    @property
    def module(self) -> Any:
        return self.engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def optimizer_step(
        self, micro_batches: Sequence[Micro], loss_of: Callable[[Micro], Tensor], denominator: float
    ) -> StepReport:
        loss = self.accumulate(micro_batches, loss_of, denominator)
        return self.step()._replace(loss=loss)

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled (fp16), so that a step can overflow."""
        return bool(self.engine.fp16_enabled())

    def accumulate(
        self, micro_batches: Sequence[Micro], loss_of: Callable[[Micro], Tensor], denominator: float
    ) -> float:
        """The first half of `optimizer_step`: all gradients, no step yet. Returns: the loss."""
        if world_size() > 1:
            denominator = float(all_sum(torch.tensor(denominator, dtype=torch.float64, device=self.device)))
        # DeepSpeed averages gradients over ranks; a mean over the whole batch needs their sum over its denominator.
        scale = world_size() / denominator
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            loss = loss_of(micro_batch)
            losses.append(loss.detach())
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            if not last:
                self.engine.step()
        # Read here: after the step it would wait for the update, during which the next batch can be prepared.
        return float(all_sum(torch.stack(losses).sum())) / denominator

    def overflowed(self) -> bool:
        """Whether a gradient of any rank overflowed, asked between `accumulate` and `step`. All ranks call it."""
        optimizer = self.engine.optimizer
        return bool(optimizer.has_overflow(getattr(optimizer, "partition_gradients", True)))

    def step(self, skip: bool = False) -> StepReport:
        """The second half of `optimizer_step`; with `skip` the gradients are dropped as in an overflow."""
        learning_rate, norm = self.engine.get_lr()[0], self._plain_grad_norm()
        if skip:
            with _found_overflow(self.engine.optimizer):
                self.engine.step()
        else:
            self.engine.step()
        if not self.engine.was_step_applied():
            return StepReport(math.nan, learning_rate, skipped=True)
        return StepReport(float(self.engine.get_global_grad_norm() or norm), learning_rate)

    def _plain_grad_norm(self) -> float:
        """The norm of whole fp32 gradients, by which DeepSpeed clips without ZeRO but which it does not tell."""
        if self.engine.zero_optimization() or self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            return 0.0
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def save(self, folder: Path) -> None:
        """Write the engine's part of a checkpoint (trained parameters, optimizer, schedule) into `folder`."""
        self.engine.save_checkpoint(str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`. Raises ValueError if it does not fit this engine."""
        path, _ = self.engine.load_checkpoint(str(folder), tag="state", custom_load_fn=_load_trained)
        if path is None:
            raise ValueError(f"the checkpoint in {folder} does not fit: it holds no engine state")


class Step(NamedTuple):
    """One engine's share of a step that several engines take together: the arguments of `optimizer_step`."""

    engine: Engine
    micro_batches: Sequence[Any]
    loss_of: Callable[[Any], Tensor]
    denominator: float


def step_together(steps: Sequence[Step]) -> list[StepReport]:
    """An optimizer step of each engine; where all are in fp16 and one overflows, none of them steps."""
    trained = [step.engine for step in steps if isinstance(step.engine, TrainEngine) and step.engine.scales_loss]
    if len(trained) < len(steps):
        # One after the other, so that the gradients of two networks are never held at once.
        return [step.engine.optimizer_step(*step[1:]) for step in steps]
    for engine, step in zip(trained, steps, strict=True):
        engine.accumulate(*step[1:])
    overflows = [engine.overflowed() for engine in trained]  # a list: every rank asks every engine
    return [engine.step(skip=any(overflows)) for engine in trained]


@contextmanager
def _found_overflow(optimizer: Any) -> Iterator[None]:
    """DeepSpeed's optimizer takes its gradients for overflowed; those that did not overflow keep their loss scale."""
    real = bool(optimizer.has_overflow(getattr(optimizer, "partition_gradients", True)))
    scaler = copy.copy(vars(optimizer.loss_scaler))
    optimizer.has_overflow = lambda *args, **kwargs: True
    try:
        yield
    finally:
        del optimizer.has_overflow
        if not real:
            vars(optimizer.loss_scaler).update(scaler)


def _load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights. Raises ValueError if anything but frozen parameters is missing, or any is left."""
    result = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    missing = [name for name in result.missing_keys if name not in frozen]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit this model: missing {missing or 'none'}, left over "
            f"{result.unexpected_keys or 'none'}; start the stage afresh with --force"
        )


def start(device: str) -> torch.device:
    """Set up this process as one rank: its device, the process group, DeepSpeed on that device.

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment, as torchrun sets them.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device == "cpu":
        # DeepSpeed's shared-memory collectives are compiled with g++ on first use; gloo does the same without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    gc.freeze()  # DeepSpeed collects garbage six times for a bf16 optimizer; what is imported is none
    deepspeed.init_distributed("gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False)
    return torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def train_engine(
    model: Any,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    steps: int,
    device: torch.device,
    where: str,
    head_rate: float | None = None,
) -> TrainEngine:
    """A model under DeepSpeed with AdamW and a schedule of `steps` optimizer steps.

    `where` is the config path of the engine, for messages; `head_rate` the learning rate of a ScalarModel's head, where
    it is another one. Raises ValueError for what this machine cannot do.
    """
    import deepspeed

    _check_device(config, device, where)
    if config.precision != "fp32" and config.zero_stage == 0:
        # DeepSpeed's optimizer for half precision without ZeRO cannot be asked whether a step overflows, adds up the
        # gradients of micro-batches in bf16, and from its second step on leaves the path of fp32 and of ZeRO 1 to 3.
        config = config.model_copy(update={"zero_stage": 1})
    if config.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile_layers:
        _compile_layers(model, config.zero_stage)
    adam = _adam(model, config, optimizer, device, where, head_rate)
    schedule = get_scheduler(
        optimizer.schedule, adam, num_warmup_steps=round(optimizer.warmup_ratio * steps), num_training_steps=steps
    )
    settings = _deepspeed_config(config, gradient_clipping=optimizer.max_grad_norm, layer=_largest_layer(model))
    with _reduced_one_by_one():
        engine, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=adam, lr_scheduler=schedule, config=settings
        )
    if world_size() == 1:
        from tasks.training.one_rank import take_over

        take_over(engine)
    _announce_head(model)
    engine.train()
    LOG.info("%s is ready", where)
    return TrainEngine(engine, device)


def frozen_engine(model: nn.Module, config: EngineConfig, device: torch.device, where: str) -> nn.Module:
    """A model that is only read: partitioned under ZeRO-3, whole otherwise. Raises ValueError as `train_engine`."""
    import deepspeed

    _check_device(config, device, where)
    model.requires_grad_(False)
    stage = 3 if config.zero_stage == 3 else 0
    if config.compile_layers:
        _compile_layers(model, stage)
    same = config.model_copy(update={"zero_stage": stage, "offload_optimizer": False})
    settings = _deepspeed_config(same, layer=_largest_layer(model))
    engine, *_ = deepspeed.initialize(model=model.to(device), config=settings)
    _announce_head(model)
    engine.eval()  # DeepSpeed's returns nothing
    LOG.info("%s is ready", where)
    return engine


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """The parameters of a network are whole on every rank inside, to be read; all ranks call it.

    Without ZeRO-3 they always are. Its hooks are off inside, as they would release what a module has read, and gather
    it again for the next token.
    """
    import deepspeed

    if not any(hasattr(parameter, "ds_id") for parameter in network.parameters()):
        yield
        return
    parts = [parameter for parameter in network.parameters() if parameter.numel() < _elements(parameter)]
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
        hooks = [(module, kind, getattr(module, kind)) for module in network.modules() for kind in kinds]
        for module, kind, _ in hooks:
            setattr(module, kind, OrderedDict())
        try:
            yield
        finally:
            for module, kind, theirs in hooks:
                setattr(module, kind, theirs)


def _announce_head(model: nn.Module) -> None:
    """Tell ZeRO-3 that a policy reads its head's parameters outside of the head, for the loss without the logits.

    DeepSpeed notices by itself, but only in a pass that finds them partitioned, and then the order of parameters that
    it has recorded no longer holds.
    """
    import deepspeed

    if not isinstance(model, Policy):
        return
    for parameter in model.model.get_output_embeddings().parameters():
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(model, parameter)


def export(
    module: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, averages: Mapping[str, Tensor] | None = None
) -> None:
    """Write a Policy or ScalarModel as a plain Hugging Face folder (safetensors), from rank 0; all ranks must call it.

    Partitioned parameters are gathered one at a time, so no rank holds more than one whole tensor on its device. With
    `averages` (`Ema.weights`) these are written instead of the trained parameters. Adapters are merged into their base.
    """
    model = module.model
    own = {name.removeprefix("model."): average for name, average in (averages or {}).items()}
    weights = _gathered(model, own)
    if rank() == 0:
        buffers = dict(model.named_buffers())
        persistent = [name for name in model.state_dict() if name in buffers]
        weights.update({name: buffers[name].detach().cpu() for name in persistent})
        weights = merged(model, weights)
        for tied in model.all_tied_weights_keys:
            weights.pop(tied, None)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        LOG.info("%s is written", folder.name)


def _gathered(model: nn.Module, instead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole parameters by name on the CPU of rank 0, gathered one at a time; nothing on the others.

    Those in `instead` are taken from there.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in instead:
            weights[name] = instead[name]
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _adam(
    model: Any,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    device: torch.device,
    where: str,
    head_rate: float | None,
) -> torch.optim.Optimizer:
    head = [] if head_rate is None else list(model.model.score.parameters())
    apart = {id(parameter) for parameter in head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    matrices = [p for p in rest if p.ndim >= 2]
    vectors = [p for p in rest if p.ndim < 2]  # norms and biases do not decay
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, optimizer.weight_decay), (vectors, 0.0))
        if parameters
    ]
    if head:
        groups.append({"params": head, "weight_decay": optimizer.weight_decay, "lr": head_rate})
    settings: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": optimizer.betas, "eps": optimizer.eps}
    if config.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder

        if not CPUAdamBuilder().is_compatible(verbose=False):
            raise ValueError(
                f"{where}.offload_optimizer needs DeepSpeed's CPU Adam, which is compiled with g++ on first use and "
                "cannot be here; install g++, or set offload_optimizer: false"
            )
        return DeepSpeedCPUAdam(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=device.type == "cuda")


def _compile_layers(model: Any, zero_stage: int = 0) -> None:
    """Compile each decoder layer when it is first called; they share their code, so one compilation serves all that are
    trained, and another one each those that are frozen and the first one above them, whose input needs no gradient.

    ZeRO-3 gathers and releases parameters in hooks of every module, which compiled code cannot hold. There the layer is
    the unit that it gathers, and the layer's forward is compiled without the hooks around it. The backward pass reads
    the parameters themselves, gathered again, not what the forward pass saw: none of it stays in memory between.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder_layers(model):
        if zero_stage == 3:
            set_z3_leaf_module(layer, True)
            layer.forward = torch.compile(layer.forward)
        else:
            layer.compile()
    model.compiled = True


def _largest_layer(model: Any) -> int:
    """Parameters of the largest decoder layer, 0 without one."""
    sizes = [sum(_elements(parameter) for parameter in layer.parameters()) for layer in decoder_layers(model)]
    return max(sizes, default=0)


def _elements(parameter: Any) -> int:
    """Of the whole parameter, also where ZeRO-3 holds a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def _reduced_one_by_one() -> Iterator[None]:
    """Engines that are made inside reduce each gradient as it is made, also those of a layer that is gathered whole.

    For such a layer ZeRO-3 waits for the hook at the end of its backward pass. Where a layer's input needs no gradient
    (the first one, with adapters on a frozen base) torch calls that hook before the layer's gradients are made: zeros
    would be reduced, and what is made afterwards be lost.
    """
    from deepspeed.runtime.zero import stage3

    theirs = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = theirs


def _check_device(config: EngineConfig, device: torch.device, where: str) -> None:
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError(f"{where}.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")


def _deepspeed_config(config: EngineConfig, gradient_clipping: float = 0.0, layer: int = 0) -> dict[str, Any]:
    """DeepSpeed's settings: what `config` decides, then its raw keys, then what is fast on several ranks.

    `layer`: parameters of the largest decoder layer.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # unused: batches are counted by the loops
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
    }
    if config.precision == "bf16" and config.zero_stage == 1:
        # Gradients of micro-batches add up in fp32, and those of all parameters lie flat in two buffers, one per group.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
        ours["bf16"] = {"enabled": True, "immediate_grad_update": True}
    return _merged(_merged(ours, config.deepspeed), {"zero_optimization": _fast(config, layer)})


def _fast(config: EngineConfig, layer: int) -> dict[str, Any]:
    """Settings of ZeRO 2 and 3 that hide communication behind the backward pass, where DeepSpeed's own do not.

    Gradients go in buckets of 2e8 elements, not 5e8: the last one has nothing to hide behind. ZeRO-3 gathers the whole
    next layer while one computes; DeepSpeed's 5e7 elements are less than a layer of 1.7B, and the rest of it would be
    waited for. Its own linear function, which takes torch's place in all networks of the process, keeps eager layers
    from holding what was gathered; compiled ones hold nothing.
    """
    settings: dict[str, Any] = {}
    compiled = config.zero_stage == 3 and config.compile_layers
    if compiled:
        settings["memory_efficient_linear"] = False
    if world_size() > 1 and config.zero_stage >= 2 and not config.offload_optimizer:
        settings |= {"overlap_comm": True, "reduce_bucket_size": REDUCED_TOGETHER}
        if compiled:
            settings["stage3_prefetch_bucket_size"] = max(layer, PREFETCHED)
    return settings


def _merged(ours: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of settings as one; where they have a leaf in common, ours counts."""
    both = {
        key: _merged(value, more[key]) if isinstance(value, Mapping) and isinstance(more.get(key), Mapping) else value
        for key, value in ours.items()
    }
    return {**more, **both}
