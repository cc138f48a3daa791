"""Runs a language model once and writes its MLPs' inputs and outputs as activation stores."""

from machine import share_cores

share_cores()
