"""Exercises of lesson 06: which rank is enough."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("06_which_rank")
