"""What Prometheus sees of a node: read off it at each scrape, so nothing counts twice and nothing idles."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.registry import Collector

from weightcache.node.node import Node

__all__ = ["CONTENT_TYPE", "render"]


class _NodeCollector(Collector):
    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        node = self._node
        moved = node.transfers.moved
        received = CounterMetricFamily(
            "weightcache_received_bytes", "Bytes that became had, by where they came from", labels=["via"]
        )
        received.add_metric(["origin"], moved.origin)
        received.add_metric(["peer"], sum(moved.peers.values()))
        received.add_metric(["local"], moved.local)
        yield received
        yield CounterMetricFamily(
            "weightcache_sent_bytes", "Bytes of chunks sent to peers", value=sum(node.serving.sent.values())
        )
        yield GaugeMetricFamily(
            "weightcache_served_connections", "Connections over which peers are served", value=node.serving.connections
        )
        yield CounterMetricFamily(
            "weightcache_source_failures", "Failures of peers and origins", value=node.transfers.failures
        )
        yield SummaryMetricFamily(
            "weightcache_load_seconds", "Loads done, and what they took", node.ended.done, node.ended.seconds
        )
        yield CounterMetricFamily("weightcache_failed_loads", "Loads that failed", value=node.ended.failed)
        yield GaugeMetricFamily("weightcache_loads", "Blobs on their way", value=len(node.transfers.all()))
        yield GaugeMetricFamily("weightcache_peers", "Peers connected", value=len(node.swarm.peers))
        if (registry := node.swarm.rolls.registry) is not None:
            yield GaugeMetricFamily(
                "weightcache_directory_up", "Whether the directory answers", value=not registry.trouble
            )
        yield GaugeMetricFamily("weightcache_store_used_bytes", "Bytes reserved by blobs", value=node.store.used)
        yield GaugeMetricFamily(
            "weightcache_store_free_bytes", "Bytes that blobs may still take", value=node.store.free
        )
        yield CounterMetricFamily(
            "weightcache_evicted_bytes", "Bytes that evictions made free", value=node.store.evicted
        )
        states = GaugeMetricFamily("weightcache_blobs", "Blobs in the store", labels=["state"])
        infos = node.store.blobs()
        complete = sum(info.state == "complete" for info in infos)
        states.add_metric(["complete"], complete)
        states.add_metric(["partial"], len(infos) - complete)
        yield states


def render(node: Node) -> bytes:
    """The metrics of a node in the exposition format."""
    registry = CollectorRegistry()
    registry.register(_NodeCollector(node))
    return generate_latest(registry)
