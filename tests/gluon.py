"""Configurations whose scans are printed in Gluon."""

from __future__ import annotations

from dataclasses import replace

from chunkwise.codegen.config import Config, KernelConfig, Printer

SCANS = ("forward_scan", "backward_states", "backward_reverse")


def in_gluon(config: Config, v_tile: int, stages: int = 2) -> Config:
    """`config` with its scans in Gluon, `v_tile` values of a state a program."""
    own = KernelConfig(v_tile, v_tile // 16, stages, printer=Printer.GLUON)
    rest = [(n, k) for n, k in config.kernels if n not in SCANS]
    return replace(config, kernels=(*rest, *((n, own) for n in SCANS)))
