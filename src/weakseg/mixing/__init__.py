"""Mixes: one file each, behind the contract of :mod:`weakseg.mixing.base`."""

from weakseg.mixing.base import Mix, Scene, build_mix, mixes, partners, paste, present, settle_mix

__all__ = ["Mix", "Scene", "build_mix", "mixes", "partners", "paste", "present", "settle_mix"]
