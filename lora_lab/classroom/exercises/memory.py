"""Exercises of lesson 04: the memory of a training step."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("04_memory")
