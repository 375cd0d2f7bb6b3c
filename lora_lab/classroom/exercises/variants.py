"""Exercises of lesson 10: variants of LoRA."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("10_variants")
