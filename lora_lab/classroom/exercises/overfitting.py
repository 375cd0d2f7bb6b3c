"""Exercises of lesson 07: overfitting."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("07_overfitting")
