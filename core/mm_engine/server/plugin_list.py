"""What `GET /v1/plugins` tells: the plugin at work, and the others, read without importing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_engine.contract import contract_version
from mm_engine.plugins.discovery import installed
from mm_engine.server.responses import PluginCard, PluginList

if TYPE_CHECKING:
    from mm_engine.inputs.pipeline import InputPipeline


def plugin_list(pipeline: InputPipeline) -> PluginList:
    """The served plugin first; then what is installed now, one entry for each architecture.

    It reads the metadata of what is installed: call it in a thread.
    """
    plugin, ctx = pipeline.plugin, pipeline.ctx
    served = plugin.record
    modalities = [name for name, limit in ctx.limits.items() if limit]
    first = PluginCard(
        distribution=served.distribution,
        version=served.version,
        architecture=served.architecture,
        module=served.module,
        served=True,
        hooks=list(plugin.hooks),
        max_tokens={name: plugin.max_tokens(ctx, name) for name in modalities},
    )
    others = [
        PluginCard(
            distribution=record.distribution,
            version=record.version,
            architecture=record.architecture,
            module=record.module,
            served=False,
        )
        for record in installed()
        if record != served
    ]
    return PluginList(object="list", contract=contract_version(), data=[first, *others])
