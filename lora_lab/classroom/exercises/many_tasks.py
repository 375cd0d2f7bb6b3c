"""Exercises of lesson 09: one base, many tasks."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("09_many_tasks")
