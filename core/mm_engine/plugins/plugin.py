"""A loaded plugin: every hook is called here, and what it did wrong is blamed on it here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from mm_engine.config import ModelContext
from mm_engine.errors import MMEngineError, PluginError
from mm_engine.plugins import defaults, hookspecs
from mm_engine.plugins.blame import (
    kind_of,
    may_be_the_users,
    one_line,
    place_of,
    with_time_limit,
)
from mm_engine.plugins.checks import (
    copies_of,
    copy_of,
    equal_items,
    equal_tensors,
    fault_of_mapped,
    fault_of_processed,
    fingerprint,
)
from mm_engine.plugins.config_watch import ConfigWatch
from mm_engine.plugins.hookspecs import Mapper
from mm_engine.plugins.placeholders import image_token, placeholder_token_id
from mm_engine.plugins.record import PluginRecord
from mm_engine.plugins.registration import hook_names, register
from mm_engine.plugins.retired import caller, retired_uses
from mm_engine.request import PromptInputs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HookCall:
    """One call of a hook, or of a model's method, as an observer is told of it."""

    hook: str
    place: str  # `mm_foo/plugin.py:42`, or that it was mm-engine's default
    seconds: float


class Plugin:
    """The hooks of one plugin, for one model in one process.

    Each method calls a hook (or does what the hook's default is) and checks the result. Whatever
    a plugin raises, SystemExit too, and whatever breaks the contract becomes a `PluginError` that
    names distribution, version, hook and place. Our own errors pass: with a `RequestError` a
    plugin says that the user's item is at fault. Hooks get copies of the user's images.
    """

    def __init__(
        self, record: PluginRecord, module: ModuleType, *, timeout: float | None = None
    ) -> None:
        """Check the hooks of `module`; hooks and mappers get `timeout` seconds a call.

        Raises:
            PluginError: the hooks don't fit the hook specifications.
        """
        self.record = record
        self.label = record.label
        self._timeout = timeout
        self._manager = register(module, self.label)
        #: Hook -> its function in the plugin; of a model's method, the method.
        self._functions: dict[str, Callable[..., Any]] = {
            name: found[0].function
            for name in hook_names()
            if (found := getattr(self._manager.hook, name).get_hookimpls())
        }
        self._ctx: ModelContext | None = None
        self._config: ConfigWatch | None = None
        self._model_class: type[nn.Module] | None = None
        self._mappers: dict[str, Mapper] = {}
        self._max_tokens: dict[str, int] = {}
        self._placeholder_texts: dict[tuple[str, int], str] = {}
        self._keys: dict[str, frozenset[str]] = {}
        #: One line for each retired hook or argument that the plugin still uses.
        self.notices = retired_uses(self._functions, self.label, hookspecs)
        #: Told of each call when it has ended; `engine plugins trace` sets it.
        self.observer: Callable[[HookCall], None] | None = None

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that the plugin implements; the others have core's defaults."""
        return tuple(self._functions)

    def blame(self, hook: str, fact: str, error: BaseException | None = None) -> PluginError:
        """Return the error that says what `hook` (or a method of the model) did wrong, and where.

        `fact` reads `expected …, got …`; with `error`, the place is the line that it came from.
        """
        function = self._functions.get(hook) or getattr(self._model_class, hook, None)
        if hook in hook_names() and hook not in self._functions:
            return PluginError(self._line(hook, "mm-engine's default", fact))
        if function is None:
            return PluginError(f"{self.label} · {hook}: {fact.rstrip('.')}.")
        return PluginError(self._line(hook, place_of(function, error), fact))

    def model_class(self, ctx: ModelContext) -> type[nn.Module]:
        """Return the class of the model."""
        cls = self._call("model_class", ctx=ctx)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            fact = f"expected a subclass of torch.nn.Module, got {kind_of(cls)}"
            raise self.blame("model_class", fact)
        self._model_class = cls
        return cls

    def max_tokens(self, ctx: ModelContext, modality: str) -> int:
        """Return the most tokens that one item can take; the hook is asked once."""
        self._prepare(ctx)
        if modality not in self._max_tokens:
            value = self._call("max_tokens", ctx=ctx, modality=modality)
            if type(value) is not int or value < 1:
                raise self.blame(
                    "max_tokens", f"expected an int of at least 1, got {kind_of(value)}"
                )
            self._max_tokens[modality] = value
        return self._max_tokens[modality]

    def mapper_key(self, ctx: ModelContext, modality: str) -> str:
        """Return a string that differs when the mapper or its options do; part of content keys."""
        mapper = self._mapper(ctx, modality)
        if mapper is defaults.map_image:
            return defaults.mapper_options(ctx.checkpoint)
        name = getattr(mapper, "__qualname__", type(mapper).__qualname__)
        return f"{self.label} {name} {place_of(mapper)}"

    def option_names(self, ctx: ModelContext, modality: str) -> frozenset[str] | None:
        """Names of the options that requests may give the mapper; None if only it knows them.

        A mapper without a parameter `options` takes none.
        """
        mapper = self._mapper(ctx, modality)
        if mapper is defaults.map_image:
            return defaults.option_names(ctx.checkpoint)
        takes = "options" in inspect.signature(mapper).parameters
        return None if takes else frozenset()

    def map_item(
        self,
        ctx: ModelContext,
        modality: str,
        item: Any,
        options: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Return one item's tensors: the keywords of `embed_<modality>s`, without batch dim.

        `options` are what a request asked of the mapper; see `option_names`.

        Raises:
            RequestError: the item is at fault.
            PluginError: the mapper is.
        """
        mapper = self._mapper(ctx, modality)
        hook = "register_input_mapper"
        ours = mapper is defaults.map_image
        place = "mm-engine's default" if ours else place_of(mapper)
        given = item if ours else copy_of(item)
        call: Callable[..., dict[str, Tensor]] = mapper
        if options:
            call = functools.partial(call, options=dict(options))
        line = self._line(hook, place)
        tensors, fault = self._unchanging(
            lambda: self._guard(hook, mapper, lambda: call(ctx, given), line)
        )
        fault = fault_of_mapped(tensors) or fault
        if fault is None and not equal_items(given, item):
            fault = f"expected the given {modality} unchanged, got it modified"
        keys = self._keys.setdefault(modality, frozenset(tensors)) if fault is None else None
        if keys is not None and keys != frozenset(tensors):
            fault = f"expected the tensors {sorted(keys)} for each item, got {sorted(tensors)}"
        if fault is not None:
            raise PluginError(self._line(hook, place, fault))
        return dict(tensors)

    def process(self, ctx: ModelContext, inputs: PromptInputs) -> PromptInputs:
        """Return the prompt with each item's placeholder expanded, checked against the contract.

        `inputs` holds ids and mapped tensors.

        Raises:
            RequestError: the prompt is at fault, as one with too few placeholders.
            PluginError: the processor is.
        """
        self._prepare(ctx)
        hook = "input_processor"
        own = hook in self._functions and any(inputs.mapped.values())
        originals, mapped = inputs.multi_modal_data, inputs.mapped
        if own:
            inputs = dataclasses.replace(
                inputs,
                multi_modal_data={n: tuple(map(copy_of, items)) for n, items in originals.items()},
                mapped={n: tuple(map(copies_of, items)) for n, items in mapped.items()},
            )
        before = fingerprint(inputs)
        # Without items there is nothing to expand: a placeholder left in the text is the
        # caller's fault, which the default says; the hook is for prompts with items.
        fault: str | None = None
        if own:
            result, fault = self._unchanging(lambda: self._call(hook, ctx=ctx, inputs=inputs))
        else:
            result = self.observed(
                hook,
                defaults.expand_to_max_tokens,
                lambda: defaults.expand_to_max_tokens(
                    ctx, inputs, lambda modality: self.max_tokens(ctx, modality)
                ),
            )
        same = fingerprint(inputs) == before and all(
            equal_items(given, item)
            for name, items in inputs.multi_modal_data.items()
            for given, item in zip(items, originals[name], strict=True)
        )
        # What is written through numpy or `.data` shows in the numbers alone.
        if own and same:
            same = all(
                equal_tensors(given, item)
                for name, items in inputs.mapped.items()
                for given, item in zip(items, mapped[name], strict=True)
            )
        if not same:
            raise self.blame(hook, "expected the given inputs unchanged, got them modified")
        fault = fault or fault_of_processed(
            inputs, result, lambda modality: self.max_tokens(ctx, modality)
        )
        if fault is not None:
            raise self.blame(hook, fault)
        return result

    def dummy_data(
        self, ctx: ModelContext, seq_len: int, counts: Mapping[str, int]
    ) -> PromptInputs:
        """Return the costliest prompt with `counts` items, raw."""
        if "dummy_data" not in self._functions:
            return defaults.largest_images(
                ctx, seq_len, counts, lambda modality: self.max_tokens(ctx, modality)
            )
        inputs = self._call("dummy_data", ctx=ctx, seq_len=seq_len, counts=dict(counts))
        if not isinstance(inputs, PromptInputs):
            raise self.blame("dummy_data", f"expected PromptInputs, got {kind_of(inputs)}")
        if (inputs.prompt is None) == (inputs.prompt_token_ids is None):
            raise self.blame("dummy_data", "expected either prompt or prompt_token_ids to be set")
        return inputs

    def placeholder_text(self, ctx: ModelContext, modality: str, index: int) -> str:
        """Return the text that stands for an item in a prompt."""
        self._prepare(ctx)
        if "placeholder_text" not in self._functions:
            return image_token(ctx)
        if (modality, index) not in self._placeholder_texts:
            hook = "placeholder_text"
            text = self._call(hook, ctx=ctx, modality=modality, index=index)
            if not isinstance(text, str) or not text:
                raise self.blame(hook, f"expected a non-empty str, got {kind_of(text)}")
            if "input_processor" not in self._functions:
                self._check_placeholder(ctx, text)
            self._placeholder_texts[modality, index] = text
        return self._placeholder_texts[modality, index]

    def _check_placeholder(self, ctx: ModelContext, text: str) -> None:
        """The default processor looks for the image token: the text must hold just one."""
        ids = ctx.tokenizer.encode(text, add_special_tokens=False)
        num_found = ids.count(placeholder_token_id(ctx))
        if num_found != 1:
            fact = f"expected a text with 1 token {image_token(ctx)}, got {num_found} of it"
            raise self.blame("placeholder_text", fact)

    def _unchanging(self, call: Callable[[], T]) -> tuple[T, str | None]:
        """Return `call()`, and what it wrote to the config as a fault; that is undone."""
        assert self._config is not None  # _prepare has been called
        with self._config:
            try:
                result = call()
            finally:
                changed = self._config.restore()
        return result, changed and f"expected ctx.hf_config unchanged, got another {changed}"

    def _mapper(self, ctx: ModelContext, modality: str) -> Mapper:
        self._prepare(ctx)
        if modality not in self._mappers:
            fact = f"expected a mapper for modality {modality}, got none"
            raise self.blame("register_input_mapper", fact)
        return self._mappers[modality]

    def _prepare(self, ctx: ModelContext) -> None:
        """Collect the mappers; what was learned about another context is forgotten."""
        if self._ctx is ctx:
            return
        mappers: dict[str, Mapper] = {"image": defaults.map_image}

        def add(modality: str, mapper: Mapper) -> None:
            if not isinstance(modality, str) or not callable(mapper):
                got = f"{kind_of(modality)}, {kind_of(mapper)}"
                fact = f"expected register(str, function), got register({got})"
                raise self.blame("register_input_mapper", fact)
            mappers[modality] = mapper

        if "register_input_mapper" in self._functions:
            self._call("register_input_mapper", ctx=ctx, register=add)
        self._max_tokens, self._placeholder_texts, self._keys = {}, {}, {}
        self._mappers, self._ctx = mappers, ctx
        self._config = ConfigWatch(ctx.hf_config)

    def _call(self, hook: str, **arguments: Any) -> Any:
        function = self._functions[hook]
        hook_caller = getattr(self._manager.hook, hook)
        what = self._line(hook, place_of(function))
        return self._guard(hook, function, lambda: hook_caller(**arguments), what)

    def _guard(
        self, hook: str, function: Callable[..., Any], call: Callable[[], Any], what: str
    ) -> Any:
        """Return `call()` with every foreign failure turned into a `PluginError`."""

        def guarded() -> Any:  # in the call's own thread, where no Ctrl-C arrives
            token = caller.set(f"{self.label} · {hook}")
            try:
                return call()
            except MMEngineError:
                raise
            except BaseException as error:  # SystemExit too: a plugin doesn't end the server
                if may_be_the_users(error):
                    raise
                line = self._line(hook, place_of(function, error), f"raised {one_line(error)}")
                raise PluginError(line) from error
            finally:
                caller.reset(token)

        return self.observed(hook, function, lambda: with_time_limit(guarded, self._timeout, what))

    def observed(self, hook: str, function: Callable[..., Any], call: Callable[[], Any]) -> Any:
        """Return `call()`, which calls `function`, and tell the observer of it if there is one."""
        if self.observer is None:
            return call()
        start = time.perf_counter()
        try:
            return call()
        finally:
            seconds = time.perf_counter() - start
            ours = getattr(function, "__module__", None) == defaults.__name__
            place = "mm-engine's default" if ours else place_of(function)
            self.observer(HookCall(hook, place, seconds))

    def _line(self, hook: str, place: str, fact: str | None = None) -> str:
        head = f"{self.label} · {hook} ({place})"
        return head if fact is None else f"{head}: {fact.rstrip('.')}."
