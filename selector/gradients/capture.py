"""Collect the factors of per-sample gradients while a model runs backward.

For a linear layer y = x Wᵀ the gradient of one sample is G = Δᵀ X, with X the layer's inputs at the sample's tokens and Δ the
gradients of the sample's loss with respect to its outputs. Hooks keep X from the forward pass and receive Δ in the
backward pass; no gradient of a weight is ever computed, so that the pass costs about two thirds of a training step.

Modules that read one input (q, k and v; gate and up) are handed over together, as soon as the last of them has its Δ, so
that whoever takes them can share the work on X and free all of it before the next layer arrives.

Where activations are recomputed in the backward pass, keeping X from the forward pass would undo what that saves. There X is
taken from the recomputation, shortly before or after Δ arrives, and at most the activations of one layer are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from selector.errors import ModelError
from selector.gradients.checkpointing import decoder_layers, is_recomputed, recomputed
from selector.gradients.experts import ExpertRows, Observer, Routing, by_pair, observed_expert, observed_experts
from selector.gradients.sites import Call, Input, Kept, Site
from selector.gradients.targets import Target
from selector.gradients.tokens import Segment, TokenMap
from selector.types import LayerSpec

NAMES_SHOWN = 3


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Inputs of one layer and the output gradients of each projection that reads them; G = deltaᵀ x for each.

    Rows of padding tokens hold zeros in every delta, so they add nothing but zero singular values.
    """

    x: Float[Tensor, "N T I"]
    deltas: tuple[Float[Tensor, "N T _"], ...]
    specs: tuple[LayerSpec, ...]
    experts: ExpertRows | None = None
    """For routed experts, what the N rows are: pairs of a sample and an expert, in place of samples. A layer comes in several calls."""


Consumer = Callable[[LayerFactors], None]
"""Takes the factors of the modules that read one input. They are the model's own tensors: whoever keeps them for later holds their
memory, and has to see that nothing has overwritten them."""


class GradientCapture:
    """Hooks on the target modules of one model, for the time of a `with` block. The model is left as it was.

    Compiled models run uncompiled in the block, because a compiled graph leaves out hooks that came after it.

    Args:
        model: a causal language model.
        targets: matrices to measure, from `find_targets`.
        consumer: called once for each group of modules that share an input, in the order of the backward pass.
        checkpoint: recompute each decoder layer in the backward pass, so that the activations of one layer at a time are
            held; dropout stays off. Models that recompute on their own account need not say so.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], consumer: Consumer, *, checkpoint: bool = False
    ) -> None:
        self.model, self.targets, self.consumer, self.checkpoint = model, targets, consumer, checkpoint
        modules = dict(model.named_modules())
        grouped: dict[tuple[int, str], list[Target]] = {}
        for target in targets:
            grouped.setdefault((id(target.module), target.stack.name if target.stack else ""), []).append(target)
        self._sites: list[Site] = []
        for first, *others in grouped.values():
            for expert in range(len(first.module)) if isinstance(first.module, nn.ModuleList) else (0,):
                self._sites.append(Site((first, *others), _ancestors(modules, first.spec.name), expert))
        self._tokens = TokenMap(1)
        self._forget()

    def __enter__(self) -> GradientCapture:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # stopping early would leave out the last modules of a layer, whose inputs are needed here though not by autograd
            stack.enter_context(set_checkpoint_early_stop(False))
            if self.checkpoint:
                stack.enter_context(recomputed(decoder_layers(self.model, [target.spec for target in self.targets])))
            observers: dict[nn.Module, dict[str, Observer]] = {}
            for site in self._sites:
                observer = partial(self._observe, site)
                if site.stack is None:
                    handle = site.module.register_forward_hook(partial(self._hook, site))
                    stack.callback(handle.remove)
                elif isinstance(site.module, nn.ModuleList):
                    stack.enter_context(
                        observed_expert(
                            site.module[site.expert], site.stack.name, observer, site.expert, len(site.module)
                        )
                    )
                else:
                    observers.setdefault(site.module, {})[site.stack.name] = observer
            if observers:
                stack.enter_context(observed_experts(observers))
            stack.callback(self._forget)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def begin(self, *, samples: int, segments: Sequence[Segment] = ()) -> None:
        """Start a batch. What the model does outside of batches passes unnoticed.

        Args:
            samples: number of samples.
            segments: which tokens belong to which sample where sequences are joined without padding; when empty, each sample
                has an equal number of consecutive sequences, whose gradients add.
        """
        self._forget()
        self._measuring = True
        self._tokens = TokenMap(samples, segments)
        self._recomputed = {id(s) for s in self._sites if self.checkpoint or is_recomputed(s.ancestors)}

    def finish(self) -> None:
        """End a batch: hand over what is left where some module got no gradient.

        Raises:
            ModelError: a target's hooks did not run, so that its gradient is unknown.
        """
        silent = list(dict.fromkeys(site.name for site in self._sites if site.name not in self._reached))
        if silent:
            raise ModelError(
                "hooks did not run, so that these layers cannot be measured", got=_shown(silent), allowed="modules that the model calls",
                fix="switch off fused kernels that bypass the modules, or leave these layers out by --layers or --projections",
            )  # fmt: skip
        missed = [call.site.name for call in self._calls.values() if call.delta is not None and call.input is None]
        if missed:
            raise ModelError(
                "inputs were not recomputed in the backward pass", got=_shown(missed), allowed="activation checkpointing of torch or transformers",
                fix="switch off the model's own activation checkpointing",
            )  # fmt: skip
        for group in self._inputs:
            self._hand_over(group)
        self._forget()

    def _forget(self) -> None:
        self._inputs: list[Input] = []
        self._calls: dict[int, Call] = {}
        self._measuring = False
        self._reached: set[str] = set()
        self._recomputed: set[int] = set()

    def _hook(self, site: Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._observe(site, inputs[0], output)

    def _observe(self, site: Site, x: Tensor, output: Tensor, routing: Callable[[], Routing] | None = None) -> None:
        """Note that a site was computed, in the forward pass or again in the backward pass."""
        if not self._measuring:
            return
        self._reached.add(site.name)
        in_backward = torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint asks as well
        call = self._calls.get(id(site))
        if call is not None and in_backward:
            if call.input is None:
                self._take_input(call, x, routing)
            return
        if not output.requires_grad:
            return  # the first of two passes with reentrant checkpointing, or nothing below needs a gradient
        if call is not None:
            raise ModelError(
                "a layer is used twice in one pass",
                got=site.name,
                allowed="layers with weights of their own",
                fix="leave it out by --layers or --projections",
            )
        self._calls[id(site)] = call = Call(site)
        if in_backward or id(site) not in self._recomputed:
            self._take_input(call, x, routing)
        output.register_hook(partial(self._receive, call))

    def _take_input(self, call: Call, x: Tensor, routing: Callable[[], Routing] | None) -> None:
        if not (self._inputs and routing is None and self._inputs[-1].is_of(x)):
            self._inputs.append(Input(Kept(x), routing() if routing else None))
        call.input = self._inputs[-1]
        call.input.calls.append(call)
        if call.delta is not None:
            self._hand_over(call.input)

    def _receive(self, call: Call, delta: Tensor) -> None:
        call.delta = Kept(delta)
        if call.input is not None and all(other.delta is not None for other in call.input.calls):
            self._hand_over(call.input)

    @torch.no_grad()
    def _hand_over(self, group: Input) -> None:
        """Give the consumer what has arrived for one input, and let go of it."""
        x, deltas = group.release()
        if x is None or not deltas:
            return
        if group.routing is not None:
            owners = self._tokens.owners(group.routing.tokens, x.device)
            for site, delta in deltas:
                for inputs, outputs, pairs in by_pair(x, delta, group.routing, owners):
                    self._consume(inputs, site.parts(outputs), pairs)
            return
        rows = self._tokens.split(x)
        shared: list[tuple[LayerSpec, Tensor]] = []
        for site, delta in deltas:
            if site.factors is None:
                shared += site.parts(self._tokens.split(delta))
            else:
                inputs, outputs = site.factors(rows, self._tokens.split(delta))
                self._consume(inputs, site.parts(outputs))
        if shared:
            self._consume(rows, shared)

    def _consume(self, x: Tensor, parts: list[tuple[LayerSpec, Tensor]], experts: ExpertRows | None = None) -> None:
        specs, deltas = zip(*parts, strict=True)
        self.consumer(LayerFactors(x=x, deltas=deltas, specs=specs, experts=experts))


def _ancestors(modules: dict[str, nn.Module], name: str) -> list[nn.Module]:
    """The modules that hold a module, nearest first."""
    parts = name.split(".")
    return [modules[".".join(parts[:i])] for i in range(len(parts) - 1, -1, -1)]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def gradients_of_activations_only(model: nn.Module) -> Iterator[None]:
    """Let a backward pass reach every layer but no weight, without dropout; everything is restored afterwards.

    Weights stop requiring gradients and the embeddings' output starts to, so that autograd goes through the layers for
    their inputs' sake alone.

    Args:
        model: a Hugging Face model.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    embeddings: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    handle = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for name, module in model.named_modules():
            module.training = training[name]
