"""Exercises of lesson 05: the time of a training step."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("05_speed")
