"""The pairs of a subset, written as shards that other programs read."""

from pipeline.results.export.contract import KeptPair, Member, Writer
from pipeline.results.export.stage import Exported, export
from pipeline.results.export.webdataset import WebDataset

__all__ = ["Exported", "KeptPair", "Member", "WebDataset", "Writer", "export"]
