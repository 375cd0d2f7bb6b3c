"""Exercises of lesson 08: forgetting."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("08_forgetting")
