"""A batch as LangChain hands it over, taken apart into single calls, and their results put together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

_Output = TypeVar("_Output")
Configs = RunnableConfig | Sequence[RunnableConfig] | None


def single_calls(
    invoke: Callable[..., _Output],
    inputs: Sequence[Any],
    config: Configs,
    options: Mapping[str, Any],
    *,
    return_exceptions: bool,
) -> list[Callable[[], _Output]]:
    """Return a call for each input of a batch, under its own config."""
    configs = get_config_list(config, len(inputs))
    run = partial(_caught, invoke) if return_exceptions else invoke
    return [partial(run, each, own, **options) for each, own in zip(inputs, configs, strict=True)]


def single_acalls(
    ainvoke: Callable[..., Awaitable[_Output]],
    inputs: Sequence[Any],
    config: Configs,
    options: Mapping[str, Any],
    *,
    return_exceptions: bool,
) -> list[Callable[[], Awaitable[_Output]]]:
    """Return a call for each input of a batch, under its own config, to be awaited."""
    configs = get_config_list(config, len(inputs))
    run = partial(_acaught, ainvoke) if return_exceptions else ainvoke
    return [partial(run, each, own, **options) for each, own in zip(inputs, configs, strict=True)]


def group_size(batch_size: int, config: Configs) -> int:
    """Return how many inputs may be computed together: LangChain's ``max_concurrency`` is a bound, too."""
    first = config if config is None or isinstance(config, Mapping) else next(iter(config), None)
    return min(batch_size, (first or {}).get("max_concurrency") or batch_size)


def merged(results: Sequence[LLMResult], llm_output: dict[str, Any]) -> LLMResult:
    """Return results of single calls as that of one call for all."""
    return LLMResult(
        generations=[each for result in results for each in result.generations],
        llm_output=llm_output,
        run=[each for result in results for each in result.run or ()] or None,
    )


def _caught(invoke: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return invoke(*arguments, **options)
    except Exception as error:  # of any kind: ``return_exceptions`` of LangChain promises to return it
        return error


async def _acaught(ainvoke: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
    try:
        return await ainvoke(*arguments, **options)
    except Exception as error:  # as above
        return error
