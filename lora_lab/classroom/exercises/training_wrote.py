"""Exercises of lesson 11: what training wrote into the weights."""

from __future__ import annotations

from lora_lab.classroom.exercise import exercises_of

exercise = exercises_of("11_what_training_wrote")
