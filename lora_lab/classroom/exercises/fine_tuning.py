"""Exercises of lesson 02: why one fine-tunes, and how to do it fairly."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("02_why_fine_tune")
